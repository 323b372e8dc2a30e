"""Which nodes of a deployed graph the engine can run, and as which steps.

Images are `(N, C, H, W)` in memory as channels-last, everything else is rows `(..., C)`: both are
pixels of C channels to the engine. A step is made for the shapes of one run; where its operands lie
in memory is not decided here.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from spre_fx.batch_norm import affine
from spre_fx.engine import Kind, Step
from spre_fx.layer_steps import LayerStep, layer_step, window_fields
from spre_fx.packed_layers import PackedConv2d, PackedLinear
from spre_fx.packed_ops import ACTIVATIONS, TYPES
from spre_fx.passes.activations import activation_of, in_place
from spre_fx.passes.graph_view import GraphView
from spre_fx.subclasses import plain_base
from spre_fx.weight_layout import pack_bias


@dataclass(frozen=True)
class Value:
    """What a node computed in one run, without its numbers.

    Attributes:
        shape: `(N, C, H, W)` of an image, `(..., C)` of rows.
        dtype: Its type.
        is_view: Whether it shares its memory with an argument of the node.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_view: bool = field(default=False, compare=False)

    @property
    def channels(self) -> int:
        """C."""
        return self.shape[1] if len(self.shape) == 4 else self.shape[-1]

    @property
    def pixels(self) -> int:
        """How often there are C numbers."""
        return prod(self.shape) // max(1, self.channels)

    @property
    def image(self) -> tuple[int, int, int]:
        """Batch, height and width; rows are pixels of one high image."""
        if len(self.shape) == 4:
            return self.shape[0], self.shape[2], self.shape[3]
        return 1, self.pixels, 1

    def stand_in(self) -> Tensor:
        """A tensor of this shape and type that takes no memory."""
        return torch.empty((), dtype=self.dtype).expand(self.shape)


@dataclass(frozen=True, eq=False)
class Operation:
    """A step of the engine, and what its operands are.

    Attributes:
        step: All of it but for where the operands lie.
        result: The node whose value it computes.
        x: The node it reads.
        residual: The node whose value it adds, if any.
        weight: As the engine reads it, if any.
        bias: Likewise.
    """

    step: Step
    result: Node
    x: Node
    residual: Node | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


Values = Mapping[Node, Value]
_Maker = Callable[[GraphView, Node, Values], "Operation | None"]


def operation_of(view: GraphView, node: Node, values: Values) -> Operation | None:
    """The step that computes what a node does; None where the engine has none.

    Args:
        view: The graph, in evaluation mode.
        node: The node.
        values: The values of one run, of all nodes that compute a tensor.
    """
    value = values.get(node)
    if value is None or value.dtype not in TYPES or not value.shape or not prod(value.shape):
        return None
    maker = _maker(view, node)
    return None if maker is None else maker(view, node, values)


def _maker(view: GraphView, node: Node) -> _Maker | None:
    module = view.module_of(node)
    if module is not None:
        base = plain_base(module, list(_MODULES))
        found = None if base is None else _MODULES[base]
    else:
        found = _FUNCTIONS.get(node.target)
    if found is None and activation_of(view, node) and not in_place(view, node):
        return _activation
    return found


def with_activation(view: GraphView, operation: Operation, values: Values) -> Operation:
    """The operation and the activation behind it in one, if only that reads its result."""
    users = list(operation.result.users)
    if operation.step.activation or len(users) != 1 or users[0] not in values:
        return operation
    name = activation_of(view, users[0])
    if name is None:
        return operation
    step = _copy(operation.step)
    step.activation = ACTIVATIONS[name][0]
    return replace(operation, step=step, result=users[0])


def is_alias(view: GraphView, node: Node, values: Values) -> bool:
    """Whether a node only names the pixels of its input in another way: flatten of 1x1 images."""
    module = view.module_of(node)
    flat = (node.target in (torch.flatten, "flatten") and node.args[1:] == (1,)) or (
        isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    )
    source = node.args[0] if node.args else None
    if not flat or node.kwargs or not isinstance(source, Node) or source not in values:
        return False
    return len(values[source].shape) == 4 and values[source].shape[2:] == (1, 1)


def concatenated(node: Node, values: Values) -> list[Node] | None:
    """The operands of a concatenation along channels; None for any other node."""
    if node.target not in (torch.cat, torch.concat) or node not in values or not node.args:
        return None
    operands = node.args[0]
    axis = (
        node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    )
    rank = len(values[node].shape)
    if axis not in ((1, -3) if rank == 4 else (rank - 1, -1)) or not isinstance(
        operands, list | tuple
    ):
        return None
    nodes = [operand for operand in operands if isinstance(operand, Node)]
    same = all(n in values and values[n].dtype == values[node].dtype for n in nodes)
    known = same and all(len(values[n].shape) == rank for n in nodes)
    return nodes if known and len(nodes) == len(operands) else None


def copy_step(value: Value) -> Step:
    """A copy of one value, pixel by pixel."""
    return _step(Kind.COPY, value, value)


def _step(kind: Kind, x: Value, y: Value, **fields: int) -> Step:
    batch, height, width = x.image
    _, out_height, out_width = y.image
    ones = dict.fromkeys(
        ("kernel_h", "kernel_w", "stride_h", "stride_w", "dilation_h", "dilation_w", "groups"), 1
    )
    sizes = {"batch": batch, "height": height, "width": width, "channels": x.channels}
    out = {"out_height": out_height, "out_width": out_width, "out_channels": y.channels}
    none = {"weight": -1, "bias": -1, "residual": -1}
    return Step(kind=kind, type=TYPES[y.dtype], **ones | none | sizes | out | fields)


def _copy(step: Step) -> Step:
    copied = Step()
    ctypes.pointer(copied)[0] = step
    return copied


def _source(node: Node, values: Values) -> Node | None:
    """The first argument, where it is a tensor of a type that the engine knows, like the result."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or source not in values:
        return None
    return source if values[source].dtype == values[node].dtype else None


def _packed(view: GraphView, node: Node, values: Values) -> Operation | None:
    layer: Any = view.module_of(node)
    source, residual = _source(node, values), node.args[1] if len(node.args) > 1 else None
    if source is None or node.kwargs:
        return None
    if residual is not None and (not isinstance(residual, Node) or residual not in values):
        return None
    if isinstance(residual, Node) and values[residual] != values[node]:
        return None
    added = None if residual is None else values[node].stand_in()
    made = layer_step(layer, values[source].stand_in(), added)
    return None if made is None else _operation(made, node, source, residual)


def _conv(view: GraphView, node: Node, values: Values) -> Operation | None:
    conv: Any = view.module_of(node)
    source = _source(node, values)
    if source is None or len(node.args) > 1 or node.kwargs:
        return None
    made = layer_step(conv, values[source].stand_in())
    return None if made is None else _operation(made, node, source, None)


def _operation(made: LayerStep, node: Node, source: Node, residual: Node | None) -> Operation:
    return Operation(made.step, node, source, residual, made.weight, made.bias)


def _batch_norm(view: GraphView, node: Node, values: Values) -> Operation | None:
    norm: Any = view.module_of(node)
    source = _source(node, values)
    if source is None or norm.running_mean is None or norm.training:
        return None
    scale, shift = affine(norm)
    step = _step(Kind.AFFINE, values[source], values[node])
    return Operation(step, node, source, None, scale.float(), pack_bias(shift))


def _activation(view: GraphView, node: Node, values: Values) -> Operation | None:
    source, name = _source(node, values), activation_of(view, node)
    if source is None or name is None:
        return None
    step = _step(Kind.AFFINE, values[source], values[node], activation=ACTIVATIONS[name][0])
    return Operation(step, node, source)


def _add(view: GraphView, node: Node, values: Values) -> Operation | None:
    operands = [a for a in node.args if isinstance(a, Node) and values.get(a) == values[node]]
    if len(operands) != 2 or len(node.args) != 2 or node.kwargs:
        return None
    if in_place(view, node) and not _is_its_own(operands[0], values):
        return None
    x, residual = operands
    return Operation(_step(Kind.AFFINE, values[node], values[node]), node, x, residual)


def _is_its_own(written: Node, values: Values) -> bool:
    """Whether nobody but its only reader sees that a value is written over."""
    given = written.op in ("placeholder", "get_attr") or values[written].is_view
    return not given and len(written.users) == 1


def _pool_module(view: GraphView, node: Node, values: Values) -> Operation | None:
    return _pool(view.module_of(node), node, values)


def _pool(pool: Any, node: Node, values: Values) -> Operation | None:
    source = _source(node, values)
    if source is None or len(values[source].shape) != 4:
        return None
    if isinstance(pool, nn.MaxPool2d):
        if pool.return_indices:
            return None
        step = _step(Kind.MAX_POOL, values[source], values[node], **window_fields(pool))
        return Operation(step, node, source)
    padded = pool.count_include_pad
    if pool.divisor_override is not None or (padded and pool.ceil_mode):
        return None
    window = window_fields(pool) | {"count_inside": int(not padded)}
    step = _step(Kind.AVERAGE_POOL, values[source], values[node], **window)
    return Operation(step, node, source)


_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVERAGE_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")


def _max_pool(view: GraphView, node: Node, values: Values) -> Operation | None:  # noqa: ARG001
    return _pool_function(nn.MaxPool2d, _MAX_POOL, node, values)


def _average_pool(view: GraphView, node: Node, values: Values) -> Operation | None:  # noqa: ARG001
    return _pool_function(nn.AvgPool2d, (*_AVERAGE_POOL, "divisor_override"), node, values)


def _pool_function(
    kind: Any, names: tuple[str, ...], node: Node, values: Values
) -> Operation | None:
    """A pool written as a function call, if its settings are constants."""
    settings = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    if any(isinstance(value, Node) for value in settings.values()) or not node.args:
        return None
    settings = {name: value for name, value in settings.items() if value != []}
    return _pool(kind(**settings), node, values)


def _global_average(view: GraphView, node: Node, values: Values) -> Operation | None:
    """AdaptiveAvgPool2d(1), or the mean over both sides of an image."""
    source = _source(node, values)
    if source is None or len(values[source].shape) != 4 or not _is_global(view, node):
        return None
    x, y = values[source], values[node]
    _, height, width = x.image
    window = {"kernel_h": height, "kernel_w": width, "stride_h": 1, "stride_w": 1}
    step = _step(Kind.AVERAGE_POOL, x, y, **window | {"out_height": 1, "out_width": 1})
    return Operation(step, node, source)


def _is_global(view: GraphView, node: Node) -> bool:
    module = view.module_of(node)
    if module is not None:
        return getattr(module, "output_size", None) in (1, (1, 1), [1, 1])
    arguments = node.args[1:]
    if node.target is F.adaptive_avg_pool2d:
        return not node.kwargs and len(arguments) == 1 and arguments[0] in (1, (1, 1), [1, 1])
    axes = arguments[0] if arguments else node.kwargs.get("dim")
    named = set(node.kwargs) <= {"dim", "keepdim"}
    sides = isinstance(axes, list | tuple) and sorted(axis % 4 for axis in axes) == [2, 3]
    return named and sides


_MODULES: dict[type[nn.Module], _Maker] = {
    PackedConv2d: _packed,
    PackedLinear: _packed,
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _batch_norm,
    nn.MaxPool2d: _pool_module,
    nn.AvgPool2d: _pool_module,
    nn.AdaptiveAvgPool2d: _global_average,
}
_FUNCTIONS: dict[Any, _Maker] = {
    operator.add: _add,
    operator.iadd: _add,
    torch.add: _add,
    "add": _add,
    "add_": _add,
    F.max_pool2d: _max_pool,
    torch.max_pool2d: _max_pool,
    F.avg_pool2d: _average_pool,
    F.adaptive_avg_pool2d: _global_average,
    torch.mean: _global_average,
    "mean": _global_average,
}
