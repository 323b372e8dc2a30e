"""What may stand between a conv and its batch norm: operations that leave channels alone.

Identities, and views that keep the batch and channel axes as they are. A batch norm maps each
channel affinely, so it commutes with all of them: folding moves it in front of the chain.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

from spre_fx.batch_norm import is_batch_norm
from spre_fx.modules import NMLayer
from spre_fx.passes.functional_calls import reads_metadata
from spre_fx.passes.graph_view import GraphView, input_of, is_item
from spre_fx.subclasses import has_hooks


@dataclass(frozen=True)
class Chain:
    """The way from the output of a conv to whatever uses it.

    Attributes:
        nodes: The operations on the way, in order; none if the conv is used directly.
        users: What uses the values at its end. Asking for a shape or type is no use.
    """

    nodes: tuple[Node, ...]
    users: tuple[Node, ...]


def follow(view: GraphView, conv: Node, layer: _ConvNd) -> Chain:
    """The chain behind a call of `layer`."""
    values, rank = [view.feature_map(conv)], layer.weight.dim()
    while True:
        users = tuple(user for user in view.users(values[-1]) if not reads_metadata(user))
        if len(users) != 1 or not users[0].args or users[0].args[0] is not values[-1]:
            break
        after = _Step(view, conv, layer, values, rank, users[0]).rank_after()
        if after is None:
            break
        rank = after
        values.append(users[0])
    return Chain(tuple(values[1:]), users)


def is_identity(view: GraphView, node: Node) -> bool:
    """Whether a node calls a module that returns its input."""
    module = view.module_of(node)
    return isinstance(module, nn.Identity) or (isinstance(module, _DropoutNd) and module.p == 0)


def repeats(one: Node, other: Node) -> bool:
    """Whether two nodes do the same to their first arguments."""
    same = (one.op, one.target, one.args[1:], one.kwargs)
    return same == (other.op, other.target, other.args[1:], other.kwargs)


@dataclass(frozen=True)
class _Step:
    """One operation that may be part of the chain: it takes the last of `values`.

    That has `rank` axes or more: whether a squeeze removes one is not known. Fewer are safe to
    count with, as an axis counted from the right is further to the right, if anything, than it
    seems.
    """

    view: GraphView
    conv: Node
    layer: _ConvNd
    values: list[Node]
    rank: int
    node: Node

    def rank_after(self) -> int | None:
        """How many axes the result has at least; None if the operation ends the chain."""
        module = self.view.module_of(self.node)
        if module is not None:
            return self._after_module(module)
        if self.node.op not in ("call_function", "call_method") or self.node.kwargs:
            return None
        target: Any = self.node.target
        rule = _RULES[getattr(target, "__name__", target)] if target in _KNOWN else None
        return None if rule is None else rule(self, self.node.args[1:])

    def _after_module(self, module: nn.Module) -> int | None:
        if has_hooks(module) or len(self.node.args) != 1:
            return None
        if is_identity(self.view, self.node):
            return self.rank
        if type(module) is nn.Flatten:
            return self._flattened((module.start_dim, module.end_dim))
        return None

    def _axis(self, dim: Any, rank: int) -> int | None:
        """An axis behind those of the batch and the channels, counted from the left."""
        if not isinstance(dim, int):
            return None
        axis = dim + rank if dim < 0 else dim
        return axis if 2 <= axis < rank else None

    def _same(self, args: Sequence[Any]) -> int | None:
        return None if args else self.rank

    def _flattened(self, args: Sequence[Any]) -> int | None:
        start, end = (self._axis(dim, self.rank) for dim in (*args, *(0, -1)[len(args) :]))
        return None if start is None or end is None else self.rank - (end - start)

    def _unsqueezed(self, args: Sequence[Any]) -> int | None:
        return None if self._axis(args[0], self.rank + 1) is None else self.rank + 1

    def _squeezed(self, args: Sequence[Any]) -> int | None:
        known = len(args) == 1 and self._axis(args[0], self.rank) is not None
        return self.rank - 1 if known else None

    def _viewed(self, args: Sequence[Any]) -> int | None:
        sizes = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
        if len(sizes) < 3:
            return None
        channels = sizes[1] == self.layer.out_channels or self._is_size(sizes[1], 1, self.values)
        if not channels:
            return None
        kept = self._is_size(sizes[0], 0, self.values) or self._is_size(sizes[0], 0, self._batch())
        return len(sizes) if kept else None

    def _is_size(self, size: Any, axis: int, values: Sequence[Node]) -> bool:
        """Whether `size` is the length of an axis of one of the values."""
        if not isinstance(size, Node):
            return False
        if size.target == "size" and size.args[1:] == (axis,):
            return size.args[0] in values
        if not is_item(size, axis):
            return False
        shape = size.args[0]
        if not isinstance(shape, Node) or not shape.args:
            return False
        whole = (shape.target, *shape.args[1:]) in ((getattr, "shape"), ("size",))
        return whole and shape.args[0] in values

    def _batch(self) -> list[Node]:
        """Values before the conv that surely have the batch axis of its output."""
        values = [input_of(self.conv)]
        while True:
            maker = _same_batch(self.view, values[-1])
            if maker is None:
                return values
            values.append(maker)


_RULES = {
    "contiguous": _Step._same,
    "flatten": _Step._flattened,
    "unsqueeze": _Step._unsqueezed,
    "squeeze": _Step._squeezed,
    "view": _Step._viewed,
    "reshape": _Step._viewed,
}
_KNOWN = frozenset(_RULES) | {torch.flatten, torch.unsqueeze, torch.squeeze, torch.reshape}
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Hardswish, nn.Sigmoid)
_KEEP_BATCH = (_ConvNd, _BatchNorm, _AvgPoolNd, _MaxPoolNd, _DropoutNd, nn.Identity, *_ACTIVATIONS)
_KEEP_BATCH_CALLS = frozenset(["relu", "relu_", nn.functional.relu, torch.relu])


def _same_batch(view: GraphView, node: Node) -> Node | None:
    """The input of a node that keeps the batch axis, None for any other."""
    module = view.module_of(node)
    if module is not None:
        return input_of(node) if isinstance(module, _KEEP_BATCH) or is_batch_norm(module) else None
    if node.target in _KEEP_BATCH_CALLS:
        return input_of(node)
    makers = [maker for maker in node.args if isinstance(maker, Node)]
    if node.target is operator.add and len(makers) == 2:  # both branches of a site
        norms = all(is_batch_norm(m) for m in map(view.module_of, makers) if m is not None)
        return makers[0] if norms and all(view.module_of(m) for m in makers) else None
    layer = view.module_of(makers[0]) if makers else None
    return makers[0] if isinstance(layer, NMLayer) and is_item(node, 0) else None
