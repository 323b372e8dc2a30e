"""Reads calls such as `F.conv2d(x, self.conv.weight)`: which module could make them instead.

Analysis only. A conv, linear or batch norm written as a function call on the parameters of one
module, with constant settings, is what an ordinary torch layer in that module's place computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_NORM = (
    *("input", "running_mean", "running_var", "weight", "bias"),
    *("training", "momentum", "eps"),
)
_LAYERS: dict[Any, type[nn.Module]] = {
    function: kind
    for name, kind in (
        ("conv1d", nn.Conv1d),
        ("conv2d", nn.Conv2d),
        ("conv3d", nn.Conv3d),
        ("linear", nn.Linear),
    )
    for function in (getattr(nn.functional, name), getattr(torch, name, None))
    if function is not None
}
_TRANSPOSED: set[Any] = {
    getattr(module, f"conv_transpose{rank}d")
    for rank in (1, 2, 3)
    for module in (nn.functional, torch)
}
LAYER_FUNCTIONS = frozenset(_LAYERS) | _TRANSPOSED
BATCH_NORM: Callable[..., torch.Tensor] = nn.functional.batch_norm


@dataclass(frozen=True)
class FunctionalCall:
    """What a module has to be to make a call.

    Attributes:
        owner: The name of the module that holds the weight.
        kind: The class of torch; None for a batch norm, whose class depends on its input's rank.
        tensors: What each tensor argument is called in its owner, None where the call has none.
        settings: The constants of the call.
        flag: The node that says whether the model is training, None but for batch norms.
    """

    owner: str
    kind: type[nn.Module] | None
    tensors: tuple[tuple[str, bool], ...]
    settings: tuple[tuple[str, Any], ...]
    flag: Node | None = field(default=None)

    def has(self, name: str) -> bool:
        """Whether the call passes that tensor."""
        return dict(self.tensors)[name]


def arguments_of(node: Node) -> dict[str, Any]:
    """The arguments of a call of one of the functions above, by name, without defaults."""
    names = _NORM if node.target is BATCH_NORM else _CONV
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def owner_of(node: Node) -> str | None:
    """The module of which a functional conv or linear takes `weight`; None for any other weight."""
    weight = arguments_of(node).get("weight")
    if not isinstance(weight, Node) or weight.op != "get_attr":
        return None
    owner, _, name = str(weight.target).rpartition(".")
    return owner if owner and name == "weight" else None


def read_call(graph_module: GraphModule, node: Node) -> FunctionalCall | str:
    """What a module would have to be to make this call, or what speaks against one, in words.

    Args:
        graph_module: The model.
        node: A call of a conv, a linear or a batch norm.
    """
    return _read_norm(node) if node.target is BATCH_NORM else _read_layer(graph_module, node)


def _read_layer(graph_module: GraphModule, node: Node) -> FunctionalCall | str:
    arguments, function = arguments_of(node), getattr(node.target, "__name__", str(node.target))
    called = f"{function} is called as a function"
    if node.target in _TRANSPOSED:
        return f"{called}, and a transposed conv sums over output channels, not in groups of inputs"
    weight = arguments.get("weight")
    if not isinstance(weight, Node):
        return f"{called}, its weight is no parameter"
    if weight.op != "get_attr":
        return (
            f"{called}, its weight belongs to no conv or linear module: {weight.name} makes it. "
            "Where it is a parameter, pass that itself"
        )
    owner, _, name = str(weight.target).rpartition(".")
    if name != "weight":
        return (
            f"{called}, its weight is the parameter {weight.target!r}. Name it 'weight', or use "
            f"nn.{_LAYERS[node.target].__name__}"
        )
    if not owner:
        return (
            f"{called}, its weight belongs to the whole model. Put it into an "
            f"nn.{_LAYERS[node.target].__name__} of its own"
        )
    return _of_owner(graph_module, node, owner, called)


def _of_owner(
    graph_module: GraphModule, node: Node, owner: str, called: str
) -> FunctionalCall | str:
    arguments = arguments_of(node)
    kind, bias = _LAYERS[node.target], arguments.pop("bias", None)
    settings = {n: value for n, value in arguments.items() if n not in ("input", "weight")}
    parameters = graph_module.get_submodule(owner)._parameters
    weight = parameters.get("weight")
    if weight is None:
        return f"{called}, its weight is the tensor {owner}.weight, which is no parameter"
    if bias is not None and not _is(bias, f"{owner}.bias"):
        return f"{called}, its bias is no parameter {owner}.bias. Use nn.{kind.__name__}"
    for name, value in settings.items():
        if _holds_node(value):
            return f"{called}, its {name} is computed. Use nn.{kind.__name__}"
    if kind is nn.Linear and (weight.dim() != 2 or _odd_bias(bias, parameters, len(weight))):
        return f"{called}, with a weight of shape {tuple(weight.shape)} and a bias of another width"
    tensors = (("weight", True), ("bias", bias is not None))
    return FunctionalCall(owner, kind, tensors, tuple(sorted(settings.items())))


def _odd_bias(bias: object, parameters: Any, width: int) -> bool:
    return bias is not None and tuple(parameters["bias"].shape) != (width,)


def _read_norm(node: Node) -> FunctionalCall | str:
    defaults = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
    arguments = defaults | arguments_of(node)
    mean, flag = arguments["running_mean"], arguments["training"]
    if not _is_attribute(mean) or not str(mean.target).endswith(".running_mean"):
        return "its statistics are not the buffers running_mean and running_var of a module"
    owner = str(mean.target).rpartition(".")[0]
    for name in ("running_var", "weight", "bias"):
        value = arguments[name]
        if not _is(value, f"{owner}.{name}") and (name == "running_var" or value is not None):
            return f"its {name} is not {owner}.{name}"
    if not isinstance(flag, Node) or flag.op != "call_module":
        return f"its argument training is {flag}, not the mode of the model"
    if not isinstance(arguments["momentum"], float | int) or _holds_node(arguments["eps"]):
        return "its momentum or eps is computed"
    tensors = tuple((name, arguments[name] is not None) for name in ("weight", "bias"))
    settings = tuple((name, arguments[name]) for name in ("eps", "momentum"))
    return FunctionalCall(owner, None, tensors, settings, flag)


def _is_attribute(value: Any) -> bool:
    return isinstance(value, Node) and value.op == "get_attr"


def _is(value: Any, target: str) -> bool:
    return _is_attribute(value) and value.target == target


def _holds_node(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_holds_node, value))
    return isinstance(value, Node)


def counts_batches(node: Node) -> bool:
    """Whether a node adds 1 to a `num_batches_tracked` in training, as `nn.BatchNorm2d` does."""
    if (node.op, node.target) != ("call_method", "add_") or len(node.args) != 2 or node.kwargs:
        return False
    buffer, count = node.args
    if not isinstance(buffer, Node) or buffer.op != "get_attr":
        return False
    if not str(buffer.target).endswith(".num_batches_tracked"):
        return False
    if isinstance(count, Node):
        return count.op == "call_module" and tuple(count.args) == (1, 0)
    return type(count) is int and count == 1


METADATA = frozenset(["shape", "ndim", "dtype", "device", "layout", "is_cuda"])
_METADATA_METHODS = frozenset(
    ["size", "dim", "ndimension", "numel", "nelement", "is_floating_point"]
)


def reads_metadata(node: Node) -> bool:
    """Whether a node asks a tensor for its shape, type or device, and nothing of its values."""
    if node.target is getattr:
        return node.args[1] in METADATA
    return node.op == "call_method" and node.target in _METADATA_METHODS
