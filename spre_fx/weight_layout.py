"""The layouts in which the engine reads weights; engine.h describes them.

A packed N:M weight is an integer tensor of shape

    (groups, ceil(O / 16), ceil(C / channel_group), kH * kW, parts, slots / parts, 2, lanes)

with O outputs and C inputs in each of the groups: int32 with 16 lanes for float32 weights, int16
with 32 lanes for bfloat16 ones. Values are stored bit for bit, next to the channels that they
multiply. Every output keeps as many slots as the fullest one needs, so any pattern, and a dense
weight too, can be packed; the fewer non-zeros the smaller. There are 2 parts where each half of a
channel group needs half of the slots, which shorter registers read faster, and else 1. Zeros of
either sign are not stored, so that -0.0 comes back as 0.0.

A quartered one, for kernels that shuffle bytes, has 4 parts where each quarter of a channel group
needs a quarter of the slots. Channels are then given by the places of their four bytes.

A planar one, for kernels that take neighbouring pixels together instead of outputs, is of float32
and has the shape

    (groups, O, ceil(C / channel_group), kH * kW, slots, 2)

Weights of dense convolutions are float32 or bfloat16, laid out by `pack_dense`, `pack_depthwise`
and `pack_winograd`.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from spre_fx.errors import ModelError

BLOCK = 16  # outputs that are computed together, one a lane
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
_AXES, _PLANAR_AXES = 8, 6
_QUARTERS = 4
_FOUR_BYTES, _BYTES = 0x04040404, 0x03020100  # the bytes of channel c: c times the one + the other
_FLOATS = {bits: dtype for dtype, bits in _BITS.items()}


class Layout(NamedTuple):
    """What differs from one packed weight to the next.

    Attributes:
        slots: Of each output in each channel group at each tap, 1 at least. A slot holds one
            non-zero of a float32 weight and two of a bfloat16 one.
        channel_group: Input channels that are looked at together, 16 or 32.
        parts: 2 where either half of the slots belongs to a half of the channel group, 4 where each
            quarter belongs to a quarter, else 1.
        planar: Whether it is for kernels that take neighbouring pixels together.
    """

    slots: int
    channel_group: int
    parts: int
    planar: bool = False

    @property
    def quartered(self) -> bool:
        """Whether it is for kernels that shuffle bytes."""
        return self.parts == _QUARTERS


def packable(dtype: torch.dtype) -> bool:
    """Whether weights of this type can be packed: float32 and bfloat16."""
    return dtype in _BITS


def weight_dtype(packed: torch.dtype) -> torch.dtype:
    """The type of a weight that is packed into integers of a type."""
    return _FLOATS[packed]


def layout(
    packed: tuple[int, ...], shape: tuple[int, ...], groups: int, dtype: torch.dtype
) -> Layout:
    """Read the layout of a packed weight from its shape.

    Args:
        packed: Its shape.
        shape: `(C_out, C_in/groups, kH, kW)`.
        groups: Of the convolution.
        dtype: Of the weight.

    Raises:
        ModelError: If this is not the shape that such a weight is packed in.
    """
    if len(packed) == _PLANAR_AXES:
        return _planar_layout(packed, shape, groups, dtype)
    parts, slots = packed[4:6] if len(packed) == _AXES else (1, 1)
    by_16 = dtype == torch.float32 and len(packed) == _AXES and packed[2] == -(-shape[1] // 16)
    found = Layout(slots * parts, 16 if by_16 else 32, parts)
    expected = (groups, *_counts(shape, groups, found.channel_group), parts, slots, 2)
    possible = slots >= 1 and parts in ((1, 2, 4) if by_16 else (1,))
    if packed != (*expected, BLOCK * _pairs(dtype)) or not possible:
        raise _misshapen(packed, (*expected, BLOCK * _pairs(dtype)), shape, groups, dtype)
    return found


def _planar_layout(
    packed: tuple[int, ...], shape: tuple[int, ...], groups: int, dtype: torch.dtype
) -> Layout:
    slots, cuts, taps = packed[4], -(-shape[1] // 16), prod(shape[2:])
    found = Layout(slots, 16 if packed[2] == cuts else 32, 1, True)
    expected = (groups, shape[0] // groups, -(-shape[1] // found.channel_group), taps, slots, 2)
    if packed != expected or slots < 1 or dtype != torch.float32:
        raise _misshapen(packed, expected, shape, groups, dtype)
    return found


def _misshapen(
    packed: tuple[int, ...],
    expected: tuple[int, ...],
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
) -> ModelError:
    return ModelError(
        f"expected a packed weight of shape {expected} for a {dtype} weight of shape {shape} in "
        f"{groups} groups, found {packed}."
    )


def pack(
    weight: Tensor, groups: int = 1, *, planar: bool = False, quartered: bool = False
) -> Tensor:
    """Pack the weight of an N:M convolution.

    Args:
        weight: `(C_out, C_in/groups, kH, kW)`, float32 or bfloat16.
        groups: Of the convolution.
        planar: For kernels that take neighbouring pixels together; of float32.
        quartered: For kernels that shuffle bytes, where the non-zeros allow it.

    Returns:
        Shape and type as the module says. float32 weights take channel groups of 16 or 32,
        whichever needs fewer slots in all, and 16 where they need the same or are quartered.

    Raises:
        ModelError: If the weight is of another type.
    """
    if not packable(weight.dtype) or (planar and weight.dtype != torch.float32):
        types = "float32" if planar else "float32 or bfloat16"
        raise ModelError(f"expected a weight of {types}, found {weight.dtype}.")
    weight = weight.detach()
    slots, channel_group, parts, _ = _choose(weight, planar, quartered)
    rows = _rows(weight, groups, channel_group)
    kept = rows != 0
    part, pairs = channel_group // parts, _pairs(weight.dtype)
    counts = kept.view(-1, part).sum(1)
    place = kept.view(-1).nonzero().squeeze(1)
    entries = slots // parts * pairs
    first = torch.arange(len(counts), device=place.device) * entries - counts.cumsum(0) + counts
    entry = first[place // part].add_(torch.arange(len(place), device=place.device))
    packed = rows.new_zeros(2, len(counts) * entries, dtype=_BITS[weight.dtype])
    packed[0].scatter_(0, entry, rows.view(-1)[place].view(packed.dtype))
    packed[1].scatter_(0, entry, (place % channel_group).to(packed.dtype))
    if parts == _QUARTERS:
        packed[1].mul_(_FOUR_BYTES).add_(_BYTES)
    if planar:  # (2, G, O/16, C/cg, taps, lane, slot) to (G, O, C/cg, taps, slot, 2)
        by_output = packed.view(2, *rows.shape[:-1], slots).permute(1, 2, 5, 3, 4, 6, 0)
        return by_output.flatten(1, 2)[:, : len(weight) // groups].contiguous()
    # (2, G, O/16, C/cg, taps, lane, part, slot, pair)
    # to (G, O/16, C/cg, taps, part, slot, 2, lane, pair)
    apart = packed.view(2, *rows.shape[:-1], parts, slots // parts, pairs)
    ordered: Tensor = apart.permute(1, 2, 3, 4, 6, 7, 0, 5, 8).flatten(-2)
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
    _, channel_group, parts, planar = layout(tuple(packed.shape), shape, groups, dtype)
    blocks, cuts, taps = _counts(shape, groups, channel_group)
    if planar:  # (G, O, C/cg, taps, slot, 2) to (2, G, O/16, C/cg, taps, lane, slot)
        apart = _pad_to(packed, 1, BLOCK).unflatten(1, (-1, BLOCK))
        values, channels = apart.permute(6, 0, 1, 3, 4, 2, 5).flatten(1, 5)
    else:
        apart = packed.view(*packed.shape[:-1], BLOCK, _pairs(dtype))
        # (G, O/16, C/cg, taps, part, slot, 2, lane, pair)
        # to (2, G, O/16, C/cg, taps, lane, part, slot, pair)
        values, channels = apart.permute(6, 0, 1, 2, 3, 7, 4, 5, 8).flatten(1, 5).flatten(2)
    if parts == _QUARTERS:
        channels = (channels - _BYTES) // _FOUR_BYTES
    # Added, since a free slot holds zero bits and channel 0, where a value may stand already.
    rows = values.new_zeros(len(values), channel_group).scatter_add_(1, channels.long(), values)
    ordered = rows.view(groups, blocks, cuts, taps, BLOCK, channel_group)
    outputs = ordered.permute(0, 1, 4, 2, 5, 3).reshape(groups, blocks * BLOCK, -1, taps)
    weight: Tensor = outputs[:, : shape[0] // groups, : shape[1]].reshape(shape)
    return weight.contiguous().view(dtype)


def unpack_blocks(packed: Tensor, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The weight that was packed in one group, 16 outputs at a time.

    What `unpack` needs on the way is several times as large as what it returns.

    Args:
        packed: What `pack` made.
        shape: `(C_out, C_in, kH, kW)`.
    """
    size = BLOCK if packed.ndim == _PLANAR_AXES else 1
    for first, block in zip(range(0, shape[0], BLOCK), packed.split(size, 1), strict=True):
        yield unpack(block, (min(BLOCK, shape[0] - first), *shape[1:]))


def channels_below(packed: Tensor, channel_group: int) -> bool:
    """Whether all channels that a packed weight names are those of a channel group."""
    channels = packed.select(-1 if packed.ndim == _PLANAR_AXES else -2, 1)
    in_quarters = packed.ndim == _AXES and packed.shape[4] == _QUARTERS
    if in_quarters and packed.dtype == torch.int32:
        places, channels = channels, (channels - _BYTES) // _FOUR_BYTES
        if not torch.equal(places, channels * _FOUR_BYTES + _BYTES):
            return False
    return not bool(((channels < 0) | (channels >= channel_group)).any())


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
    """Lay out the weight of a dense convolution without groups.

    Args:
        weight: `(C_out, C_in, kH, kW)`.

    Returns:
        `(ceil(C_out / 16), kH, ceil(kW * C_in / pairs), 16, pairs)`, in the type of the weight;
        pairs is 1 for float32, and 2 for bfloat16, whose numbers are multiplied two at a time.
    """
    pairs = 2 if weight.dtype == torch.bfloat16 else 1
    blocks = _pad_to(weight.detach(), 0, BLOCK).unflatten(0, (-1, BLOCK))
    rows = _pad_to(blocks.permute(0, 3, 1, 4, 2).flatten(3), 3, pairs)
    packed: Tensor = rows.unflatten(3, (-1, pairs)).transpose(2, 3)
    return packed.contiguous()


def pack_depthwise(weight: Tensor) -> Tensor:
    """Lay out the weight of a depthwise convolution.

    Args:
        weight: `(C, 1, kH, kW)`.

    Returns:
        `(kH * kW, ceil(C / 16) * 16)`, in the type of the weight.
    """
    return _pad_to(weight.detach().flatten(1), 0, BLOCK).t().contiguous()


def pack_winograd(weight: Tensor, side: int) -> Tensor:
    """Transform the filters of a dense 3x3 convolution for Winograd's minimal filtering.

    `G w G^T` (Lavin and Gray, 1509.09308), computed in float64 and rounded once.

    Args:
        weight: `(C_out, C_in, 3, 3)`, float32.
        side: Outputs on a side of a tile, 2 or 4.

    Returns:
        `(ceil(C_out / 16), side + 2, side + 2, C_in, 16)`, float32.
    """
    transform = torch.tensor(_filter_transform(side), dtype=torch.float64, device=weight.device)
    filters = _pad_to(weight.detach().double(), 0, BLOCK).unflatten(0, (-1, BLOCK))
    return torch.einsum("ik,bockl,jl->bijco", transform, filters, transform).float().contiguous()


def _filter_transform(side: int) -> list[list[float]]:
    """G, of the points that winograd_conv.h interpolates at, for a side of 2 or 4.

    A point p has the row (1, p, p^2) over the product of its distances to the others, and
    infinity has (0, 0, 1).
    """
    others = (1.0,) if side == 2 else (0.5**0.5, 2**0.5)
    points = [0.0, *(sign * point for point in others for sign in (1, -1))]
    rows = []
    for p in points:
        distances = prod(p - other for other in points if other != p)
        rows.append([1 / distances, p / distances, p * p / distances])
    if side == 2:  # winograd_conv.h has the signs that spare it a negation
        rows[0] = [-each for each in rows[0]]
    return [*rows, [0.0, 0.0, 1.0]]


def _choose(weight: Tensor, planar: bool, quartered: bool) -> Layout:
    """The layout: the one that is asked for, if it can be had, or that with the fewest slots."""
    kept = _pad_to((weight != 0).flatten(2), 1, 32)
    most_4, most_8, most_16, most_32 = (
        int(F.pad(kept.unflatten(1, (-1, size)).sum(2).flatten(), (0, 1), value=1).max())
        for size in (4, 8, 16, 32)
    )
    channels, pairs = weight.shape[1], _pairs(weight.dtype)
    if quartered and not planar and pairs == 1 and most_16 == _QUARTERS * most_4:
        return Layout(most_16, 16, _QUARTERS)  # perhaps more slots than of 32, but faster ones
    if pairs == 1 and -(-channels // 16) * most_16 <= -(-channels // 32) * most_32:
        return Layout(most_16, 16, 2 if most_16 == 2 * most_8 and not planar else 1, planar)
    return Layout(-(-most_32 // pairs), 32, 1, planar)


def _pairs(dtype: torch.dtype) -> int:
    """Non-zeros in a slot."""
    return 1 if dtype == torch.float32 else 2


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
