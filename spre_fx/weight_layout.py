"""The layouts in which the engine reads weights; engine.h describes them.

A packed N:M weight is an integer tensor of shape

    (groups, ceil(O / 16), ceil(C / channel_group), kH * kW, slots, 2, lanes)

with O outputs and C inputs in each of the groups: int32 with 16 lanes for float32 weights, int16
with 32 lanes for bfloat16 ones. Values are stored bit for bit, next to the channels that they
multiply. Every output keeps as many slots as the fullest one needs, so any pattern, and a dense
weight too, can be packed; the fewer non-zeros the smaller. Zeros of either sign are not stored, so
that -0.0 comes back as 0.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from spre_fx.errors import ModelError

BLOCK = 16  # outputs that are computed together, one a lane
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
_FLOATS = {bits: dtype for dtype, bits in _BITS.items()}


@dataclass(frozen=True)
class _Cut:
    """How the channels of a weight are cut into channel groups.

    Attributes:
        channel_group: Channels of each.
        slots: The most slots that any output needs in any of them, 1 at least.
        pairs: Non-zeros in a slot: 1 for float32, 2 for bfloat16.
    """

    channel_group: int
    slots: int
    pairs: int


def packable(dtype: torch.dtype) -> bool:
    """Whether weights of this type can be packed: float32 and bfloat16."""
    return dtype in _BITS


def weight_dtype(packed: torch.dtype) -> torch.dtype:
    """The type of a weight that is packed into integers of a type."""
    return _FLOATS[packed]


def slots_and_channel_group(
    packed: tuple[int, ...], shape: tuple[int, ...], groups: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Read what is not fixed about a layout from the shape of a packed weight.

    Args:
        packed: Its shape.
        shape: `(C_out, C_in/groups, kH, kW)`.
        groups: Of the convolution.
        dtype: Of the weight.

    Returns:
        Slots of each output in each channel group at each tap, and channels of a channel group.

    Raises:
        ModelError: If this is not the shape that such a weight is packed in.
    """
    by_16 = dtype == torch.float32 and len(packed) == 7 and packed[2] == -(-shape[1] // 16)
    channel_group = 16 if by_16 else 32
    slots = packed[4] if len(packed) == 7 else 0
    counts = _counts(shape, groups, channel_group)
    expected = (groups, *counts, slots, 2, BLOCK if dtype == torch.float32 else 2 * BLOCK)
    if packed != expected or slots < 1:
        raise ModelError(
            f"expected a packed weight of shape {expected}, with 1 slot or more, for a weight of "
            f"shape {shape} in {groups} groups, found {packed}."
        )
    return slots, channel_group


def pack(weight: Tensor, groups: int = 1) -> Tensor:
    """Pack the weight of an N:M convolution.

    Args:
        weight: `(C_out, C_in/groups, kH, kW)`, float32 or bfloat16.
        groups: Of the convolution.

    Returns:
        Shape and type as the module says. float32 weights take channel groups of 16 or 32,
        whichever needs fewer slots in all, and 16 where they need the same.

    Raises:
        ModelError: If the weight is of another type.
    """
    if not packable(weight.dtype):
        raise ModelError(f"expected a weight of float32 or bfloat16, found {weight.dtype}.")
    weight = weight.detach()
    cut = _cut(weight)
    entries = cut.slots * cut.pairs
    rows = _rows(weight, groups, cut.channel_group)
    kept = rows != 0
    counts = kept.view(-1, cut.channel_group).sum(1)
    place = kept.view(-1).nonzero().squeeze(1)
    row, channel = place // cut.channel_group, place % cut.channel_group
    first = torch.arange(len(counts), device=place.device) * entries - counts.cumsum(0) + counts
    entry = first[row].add_(torch.arange(len(row), device=place.device))
    packed = rows.new_zeros(2, len(counts) * entries, dtype=_BITS[weight.dtype])
    packed[0].scatter_(0, entry, rows.view(-1)[place].view(packed.dtype))
    packed[1].scatter_(0, entry, channel.to(packed.dtype))
    # (2, G, O/16, C/cg, taps, lane, slot, pair) to (G, O/16, C/cg, taps, slot, 2, lane, pair)
    apart = packed.view(2, *rows.shape[:-1], cut.slots, cut.pairs)
    ordered: Tensor = apart.permute(1, 2, 3, 4, 6, 0, 5, 7).flatten(-2)
    return ordered.contiguous()


def unpack(packed: Tensor, shape: tuple[int, ...], groups: int = 1) -> Tensor:
    """The weight that was packed, with the strides of a new tensor.

    Args:
        packed: What `pack` made.
        shape: `(C_out, C_in/groups, kH, kW)`.
        groups: Of the convolution.

    Raises:
        ModelError: If the packed tensor is not one of such a weight.
    """
    dtype = weight_dtype(packed.dtype)
    slots, channel_group = slots_and_channel_group(tuple(packed.shape), shape, groups, dtype)
    blocks, cuts, taps = _counts(shape, groups, channel_group)
    pairs = packed.shape[6] // BLOCK
    apart = packed.view(groups, blocks, cuts, taps, slots, 2, BLOCK, pairs)
    values, channels = apart.permute(5, 0, 1, 2, 3, 6, 4, 7).flatten(1, 5).flatten(2)
    # Added, since a free slot holds zero bits and channel 0, where a value may stand already.
    rows = values.new_zeros(len(values), channel_group).scatter_add_(1, channels.long(), values)
    ordered = rows.view(groups, blocks, cuts, taps, BLOCK, channel_group)
    outputs = ordered.permute(0, 1, 4, 2, 5, 3).reshape(groups, blocks * BLOCK, -1, taps)
    weight: Tensor = outputs[:, : shape[0] // groups, : shape[1]].reshape(shape)
    return weight.contiguous().view(dtype)


def padded_outputs(out_channels: int, groups: int = 1) -> int:
    """Numbers in a packed bias: those of each group, and zeros up to a multiple of 16."""
    return groups * -(-out_channels // (groups * BLOCK)) * BLOCK


def pack_bias(bias: Tensor | None, groups: int = 1) -> Tensor | None:
    """Pad a bias, `(C_out,)`, with zeros to 16 outputs in each group, as float32 and flat."""
    if bias is None:
        return None
    return _pad_to(bias.detach().float().view(groups, -1), 1, BLOCK).flatten().clone()


def unpack_bias(packed: Tensor, out_channels: int, groups: int = 1) -> Tensor:
    """The bias that was padded, `(C_out,)`, as float32."""
    return packed.view(groups, -1)[:, : out_channels // groups].flatten()


def pack_dense(weight: Tensor) -> Tensor:
    """Lay out the weight of a dense convolution with few input channels.

    Args:
        weight: `(C_out, C_in, kH, kW)`.

    Returns:
        `(ceil(C_out / 16), kH, kW, C_in, 16)`, in the type of the weight.
    """
    blocks: Tensor = _pad_to(weight.detach(), 0, BLOCK).unflatten(0, (-1, BLOCK))
    return blocks.permute(0, 3, 4, 2, 1).contiguous()


def pack_depthwise(weight: Tensor) -> Tensor:
    """Lay out the weight of a depthwise convolution.

    Args:
        weight: `(C, 1, kH, kW)`.

    Returns:
        `(kH * kW, ceil(C / 16) * 16)`, in the type of the weight.
    """
    return _pad_to(weight.detach().flatten(1), 0, BLOCK).t().contiguous()


def _cut(weight: Tensor) -> _Cut:
    pairs = 1 if weight.dtype == torch.float32 else 2
    by_16 = _pad_to((weight != 0).flatten(2), 1, 32).unflatten(1, (-1, 16)).sum(2)
    most_16, most_32 = (
        max(int(counts.max()), 1) if counts.numel() else 1
        for counts in (by_16, by_16.unflatten(1, (-1, 2)).sum(2))
    )
    channels = weight.shape[1]
    if pairs == 1 and -(-channels // 16) * most_16 <= -(-channels // 32) * most_32:
        return _Cut(16, most_16, pairs)
    return _Cut(32, -(-most_32 // pairs), pairs)


def _counts(shape: tuple[int, ...], groups: int, channel_group: int) -> tuple[int, int, int]:
    """Blocks of outputs and channel groups in each group, and taps."""
    return -(-shape[0] // (groups * BLOCK)), -(-shape[1] // channel_group), prod(shape[2:])


def _rows(weight: Tensor, groups: int, channel_group: int) -> Tensor:
    """`(groups, ceil(O / 16), ceil(C / channel_group), taps, 16, channel_group)`, zero-padded."""
    outputs = _pad_to(weight.flatten(2).unflatten(0, (groups, -1)), 1, BLOCK)
    whole = _pad_to(outputs, 2, channel_group)
    apart: Tensor = whole.unflatten(2, (-1, channel_group)).unflatten(1, (-1, BLOCK))
    return apart.permute(0, 1, 3, 5, 2, 4).contiguous()


def _pad_to(tensor: Tensor, axis: int, multiple: int) -> Tensor:
    """Pad an axis with zeros to a multiple."""
    padding = [0, 0] * (tensor.ndim - axis)
    padding[-1] = -tensor.shape[axis] % multiple
    return F.pad(tensor, padding)
