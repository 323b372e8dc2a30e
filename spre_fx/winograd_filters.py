"""Filters transformed for Winograd's minimal filtering, made of packed weights when they are run.

They are up to four times as large as dense weights, so a packed layer neither saves nor copies
them: it keeps its packed weight, and whoever runs it asks here for the filters of that weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from spre_fx.weight_layout import BLOCK, pack_winograd, unpack_blocks

if TYPE_CHECKING:
    from spre_fx.packed_layers import PackedConv2d


class _Filters(NamedTuple):
    """Transformed filters, and what they were made of: a tensor, and its numbers by `key`."""

    packed: Tensor
    key: tuple[int, int, int]
    filters: Tensor


# Of each layer that has any: all programs of its graphs share them.
_known: WeakKeyDictionary[nn.Module, _Filters] = WeakKeyDictionary()


def winograd_refusal(layer: nn.Conv2d | PackedConv2d) -> str | None:
    """Why Winograd's filtering cannot compute a convolution, in a sentence; None where it can."""
    dtype = layer.weight.dtype if isinstance(layer, nn.Conv2d) else layer.dtype
    if (dtype, layer.kernel_size, layer.groups) != (torch.float32, (3, 3), 1):
        return (
            "expected a float32 weight with a kernel of (3, 3) in 1 group, found "
            f"{dtype} with {layer.kernel_size} in {layer.groups}."
        )
    if (*layer.stride, *layer.dilation) != (1, 1, 1, 1):
        return f"expected a stride and dilation of 1, found {layer.stride} and {layer.dilation}."
    return None


def filters_of(layer: PackedConv2d) -> Tensor:
    """The transformed filters of a layer's weight as it is now, for tiles of `layer.winograd`.

    The weight must be no inference tensor: nobody could tell when it changes.
    """
    packed, side = layer.packed, layer.winograd
    key = packed.data_ptr(), packed._version, side
    known = _known.get(layer)
    if known is None or known.packed is not packed or known.key != key:
        shape = layer.out_channels, layer.in_channels, *layer.kernel_size
        known = _known[layer] = _Filters(packed, key, transform_packed(packed, shape, side))
    return known.filters


def transform_packed(packed: Tensor, shape: tuple[int, int, int, int], side: int) -> Tensor:
    """What `pack_winograd` makes of a weight that is packed.

    Outputs are unpacked and transformed 16 at a time: in float64, and on the way there, those of a
    whole layer take several times the memory of the result.

    Args:
        packed: What `weight_layout.pack` made of a float32 weight in one group.
        shape: `(C_out, C_in, 3, 3)`.
        side: Outputs on a side of a tile, 2 or 4.

    Returns:
        `(ceil(C_out / 16), side + 2, side + 2, C_in, 16)`, float32.
    """
    points, blocks = side + 2, -(-shape[0] // BLOCK)
    size = blocks, points, points, shape[1], BLOCK
    filters = packed.new_empty(size, dtype=torch.float32)
    for to, outputs in zip(filters, unpack_blocks(packed, shape), strict=True):
        to.copy_(pack_winograd(outputs, side)[0])
    return filters
