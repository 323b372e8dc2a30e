"""Where the channels of a value are after its axes were flattened, reduced, moved, cut or joined.

Each rule takes a value and the rest of a call's arguments, and returns the new value, a list of
values where the call returns several, or None where it does not know the case.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from spre_fx.passes.channel_flow import Channels


def joined(values: Sequence[Channels], dim: Any) -> Channels | None:
    """A concatenation: of the channels, or along another axis of values with equal channels."""
    first = values[0]
    axis = _from_right(first, dim)
    if axis is None or any(
        (value.axis, value.ndim, value.spread) != (first.axis, first.ndim, False)
        for value in values
    ):
        return None
    if axis == first.axis:
        return replace(first, atoms=tuple(atom for value in values for atom in value.atoms))
    return first if len({len(value.atoms) for value in values}) == 1 else None


def index(values: Sequence[Channels], which: Any) -> Channels | None:
    """One of the values a chunk or split returns."""
    return values[which] if isinstance(which, int) else None


def _from_right(value: Channels, dim: Any) -> int | None:
    """An axis counted from the right, None where it is unknown."""
    if not isinstance(dim, int):
        return None
    return dim if dim < 0 else None if value.ndim is None else dim - value.ndim


def _flatten(value: Channels, args: Sequence[Any]) -> Channels | None:
    """Channels and everything behind them become one axis: each channel spans what was behind."""
    start, end = (*args, *(0, -1)[len(args) :])[:2]
    if value.ndim is None or value.spread:
        return None
    if (start, end) in ((1, -1), (1, value.ndim - 1)) and value.is_feature_map:
        return Channels(value.atoms, axis=-1, ndim=2, spread=value.ndim > 2)
    behind = _from_right(value, start)
    if end in (-1, value.ndim - 1) and behind is not None and behind > value.axis:
        return replace(value, axis=value.axis - behind - 1, ndim=value.ndim + behind + 1)
    return None


def _view(value: Channels, args: Sequence[Any]) -> Channels | None:
    """`(batch, -1)` of a feature map, or `(batch, C, 1, 1)` of a vector."""
    shape = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
    if value.ndim is None or not value.is_feature_map or len(shape) < 2:
        return None
    if len(shape) == 2:
        return _flatten(value, (1,)) if _keeps_batch(value, *shape) else None
    count = shape[1]
    as_many = isinstance(count, Node) or count == len(value.atoms)
    ones = all(size == 1 for size in shape[2:])
    if value.ndim == 2 and not value.spread and as_many and ones and isinstance(shape[0], Node):
        return Channels(value.atoms, axis=1 - len(shape), ndim=len(shape))
    return None


def _keeps_batch(value: Channels, batch: Any, features: Any) -> bool:
    if isinstance(features, int) and features > 0:
        whole = features % len(value.atoms) == 0
        return whole and (batch == -1 or isinstance(batch, Node))
    return isinstance(batch, Node) and (features == -1 or isinstance(features, Node))


def _reduce(value: Channels, args: Sequence[Any]) -> Channels | None:
    """A mean or the like over axes other than the channels'."""
    dims, keep = (*args, *((), False)[len(args) :])[:2]
    dims = dims if isinstance(dims, list | tuple) else (dims,)
    axes = [_from_right(value, dim) for dim in dims]
    if value.spread or not axes or None in axes or value.axis in axes:
        return None
    if keep:
        return value
    behind = sum(axis > value.axis for axis in axes if axis is not None)
    ndim = None if value.ndim is None else value.ndim - len(axes)
    return replace(value, axis=value.axis + behind, ndim=ndim)


def _squeeze(value: Channels, args: Sequence[Any]) -> Channels | None:
    """An axis of one element goes; which, must be said."""
    return _reduce(value, args) if len(args) == 1 else None


def _unsqueeze(value: Channels, args: Sequence[Any]) -> Channels | None:
    """An axis of one element comes in behind the channels."""
    dim = args[0] if args else None
    if not isinstance(dim, int) or value.ndim is None or value.spread:
        return None
    axis = dim if dim < 0 else dim - value.ndim - 1
    if axis <= value.axis:
        return replace(value, ndim=value.ndim + 1)
    return replace(value, axis=value.axis - 1, ndim=value.ndim + 1)


def _permute(value: Channels, args: Sequence[Any]) -> Channels | None:
    dims = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
    if value.ndim is None or value.spread or not all(isinstance(dim, int) for dim in dims):
        return None
    axes = [_from_right(value, dim) for dim in dims]
    if sorted(axis or 0 for axis in axes) != list(range(-value.ndim, 0)):
        return None
    return replace(value, axis=axes.index(value.axis) - value.ndim)


def _transpose(value: Channels, args: Sequence[Any]) -> Channels | None:
    axes = [_from_right(value, dim) for dim in args]
    if len(axes) != 2 or None in axes or value.spread:
        return None
    first, second = axes
    moved = {first: second, second: first}.get(value.axis, value.axis)
    return None if moved is None else replace(value, axis=moved)


def _chunk(value: Channels, args: Sequence[Any]) -> list[Channels] | None:
    count, dim = (*args, *(None, 0)[len(args) :])[:2]
    if not isinstance(count, int) or _from_right(value, dim) != value.axis:
        return None
    return _cut(value, -(-len(value.atoms) // count))


def _split(value: Channels, args: Sequence[Any]) -> list[Channels] | None:
    sizes, dim = (*args, *(None, 0)[len(args) :])[:2]
    if _from_right(value, dim) != value.axis:
        return None
    return _cut(value, sizes)


def _cut(value: Channels, sizes: Any) -> list[Channels] | None:
    total = len(value.atoms)
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    if value.spread or not all(isinstance(size, int) for size in sizes) or sum(sizes) != total:
        return None
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    return [
        replace(value, atoms=value.atoms[end - size : end])
        for size, end in zip(sizes, ends, strict=True)
    ]


SHAPES: dict[Any, Callable[[Channels, Sequence[Any]], Any]] = {
    operator.getitem: lambda _, __: None,
    torch.flatten: _flatten,
    "flatten": _flatten,
    "view": _view,
    "reshape": _view,
    torch.reshape: _view,
    torch.mean: _reduce,
    "mean": _reduce,
    "sum": _reduce,
    torch.sum: _reduce,
    "amax": _reduce,
    torch.amax: _reduce,
    "squeeze": _squeeze,
    torch.squeeze: _squeeze,
    "unsqueeze": _unsqueeze,
    torch.unsqueeze: _unsqueeze,
    "permute": _permute,
    torch.permute: _permute,
    "transpose": _transpose,
    torch.transpose: _transpose,
    "chunk": _chunk,
    torch.chunk: _chunk,
    "split": _split,
    torch.split: _split,
}
