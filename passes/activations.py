"""Which nodes of a graph apply an activation that an epilogue can take up, or do nothing at all."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torchvision
from torch import nn
from torch.fx import Node
from torch.nn import functional as F

from spre_fx.passes.graph_view import GraphView
from spre_fx.subclasses import has_hooks, plain_base

_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
_METHODS = {"relu": "relu", "relu_": "relu"}
_IN_PLACE: tuple[Any, ...] = (
    *(operator.iadd, operator.isub, operator.imul, operator.imatmul),
    *(operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow),
    *(operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
    operator.setitem,
)
_NOTHING = (
    nn.Identity,
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
    torchvision.ops.StochasticDepth,
)


def activation_of(view: GraphView, node: Node) -> str | None:
    """The name of the activation that a node applies to its first argument; None for others."""
    if node.op == "call_module":
        module = view.module_of(node)
        return None if module is None or has_hooks(module) else _of_module(module)
    if node.target in (F.hardtanh, F.hardtanh_):
        limits = dict(zip(("min_val", "max_val"), node.args[1:], strict=False)) | node.kwargs
        return "relu6" if (limits.get("min_val"), limits.get("max_val")) == (0, 6) else None
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    return _FUNCTIONS.get(node.target)


def _of_module(module: nn.Module) -> str | None:
    if isinstance(module, nn.Hardtanh) and plain_base(module, [nn.Hardtanh]):
        return "relu6" if module.min_val == 0 and module.max_val == 6 else None
    base = plain_base(module, list(_MODULES))
    return None if base is None else _MODULES[base]


def in_place(view: GraphView, node: Node) -> bool:
    """Whether a node may write over its first argument."""
    if node.op == "get_attr":  # it has none
        return False
    module = view.module_of(node)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    name, home = (getattr(node.target, each, "") for each in ("__name__", "__module__"))
    if node.target in _IN_PLACE or (name.endswith("_") and home != "_operator"):  # and_, not_
        return True
    return bool(node.kwargs.get("inplace")) or True in _inplace_argument(node)


def _inplace_argument(node: Node) -> tuple[Any, ...]:
    """The argument called inplace, if it is there and has no name at the call."""
    assert callable(node.target)
    position = _position("inplace", node.target)
    return () if position is None else node.args[position : position + 1]


@cache
def _position(parameter: str, function: Callable[..., Any]) -> int | None:
    """Which parameter of a function has that name; None of what Python cannot look into."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index(parameter) if parameter in names else None


def does_nothing(view: GraphView, node: Node) -> bool:
    """Whether a node returns its first argument as it is, in evaluation."""
    module = view.module_of(node)
    if module is not None:
        return plain_base(module, _NOTHING) is not None and not has_hooks(module)
    if node.target is F.dropout:
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
        return training is False
    if node.target is torchvision.ops.stochastic_depth:
        training = node.args[3] if len(node.args) > 3 else node.kwargs.get("training", True)
        return training is False
    return False
