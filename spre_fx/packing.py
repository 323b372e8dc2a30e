"""N:M weights as their non-zero values and where in each group they stand, bit for bit.

A group is what `masks` says it is: M consecutive input channels of one filter at one tap, the last
one padded with zeros. Each keeps N values and N positions of ceil(log2 M) bits, so that a weight of
b bits an element takes (N/M)(1 + ceil(log2 M)/b) of its dense size. A group with fewer values than
N has zeros at position 0 in its free slots. "Zero" means all bits zero: -0.0 is a value like any
other, and so is each kind of NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spre_fx.errors import PatternError
from spre_fx.patterns import Pattern

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LARGEST_M = 256  # bounds what unpacking a small file may allocate


@dataclass(frozen=True, eq=False)
class Packed:
    """The values and positions of an N:M weight.

    Attributes:
        values: `(C_out, *kernel, groups, N)` flattened, in the type of the weight.
        indices: The positions in the same order as a string of bits, highest bit first, uint8.
    """

    values: Tensor
    indices: Tensor


def index_bits(pattern: Pattern) -> int:
    """Bits of one position in a group: ceil(log2 M)."""
    return (pattern.m - 1).bit_length()


def packed_sizes(shape: torch.Size | tuple[int, ...], pattern: Pattern) -> tuple[int, int]:
    """How many values, and how many bytes of indices, a weight of this shape packs into."""
    groups = shape[0] * prod(shape[2:]) * -(-shape[1] // pattern.m)
    values = groups * pattern.n
    return values, -(-values * index_bits(pattern) // 8)


def pack(weight: Tensor, pattern: Pattern) -> Packed | None:
    """Pack a weight, or say with None that it does not fit the pattern or would not get smaller.

    Args:
        weight: `(C_out, C_in/groups, *kernel)` of any type with 1, 2, 4 or 8 bytes an element.
        pattern: N:M. A group with more than N elements that are not +0.0 does not fit.
    """
    if weight.ndim < 2 or weight.itemsize not in _BITS or pattern.m > _LARGEST_M:
        return None
    values, index_bytes = packed_sizes(weight.shape, pattern)
    if values * weight.itemsize + index_bytes >= weight.numel() * weight.itemsize:
        return None
    groups = _groups(weight.detach().view(_BITS[weight.itemsize]), pattern.m)
    kept = groups != 0
    counts = kept.sum(1)
    if int(counts.max()) > pattern.n:
        return None
    group, position = kept.nonzero(as_tuple=True)
    first = counts.cumsum(0) - counts
    slot = torch.arange(len(group), device=group.device) - first[group]
    packed = groups.new_zeros(len(groups), pattern.n)
    packed[group, slot] = groups[kept]
    positions = torch.zeros_like(packed, dtype=torch.int32)
    positions[group, slot] = position.int()
    bits = _to_bits(positions.flatten().cpu().numpy(), index_bits(pattern))
    return Packed(packed.flatten().view(weight.dtype), torch.from_numpy(bits))


def unpack(packed: Packed, shape: tuple[int, ...], pattern: Pattern) -> Tensor:
    """The weight that was packed, with the strides of a new tensor.

    Args:
        packed: What `pack` made.
        shape: `(C_out, C_in/groups, *kernel)`.
        pattern: The pattern it was packed with.

    Raises:
        PatternError: If sizes or positions do not belong to such a weight. Sizes are checked before
            anything is allocated.
    """
    values, indices = packed.values, packed.indices
    if len(shape) < 2 or pattern.m > _LARGEST_M or values.itemsize not in _BITS:
        raise PatternError(
            f"expected a weight of two or more axes and M <= {_LARGEST_M}, found {values.dtype} of "
            f"shape {shape} with pattern {pattern}."
        )
    expected, found = packed_sizes(shape, pattern), (values.numel(), indices.numel())
    if expected != found or indices.dtype != torch.uint8:
        raise PatternError(
            f"expected {expected[0]} values and {expected[1]} bytes of indices for a {pattern} "
            f"weight of shape {shape}, found {found[0]} values and {found[1]} of {indices.dtype}."
        )
    positions = _from_bits(indices.cpu().numpy(), index_bits(pattern), values.numel())
    if positions.size and int(positions.max()) >= pattern.m:
        raise PatternError(
            f"expected positions below M={pattern.m}, found position {int(positions.max())}."
        )
    bits = values.view(_BITS[values.itemsize]).view(-1, pattern.n)
    where = torch.from_numpy(positions).view(-1, pattern.n)
    # Added, since a free slot holds zero bits and position 0, where a value may stand already.
    groups = bits.new_zeros(len(bits), pattern.m).scatter_add_(1, where, bits)
    taps = prod(shape[2:])
    channels = groups.view(shape[0], taps, -1)
    if channels[:, :, shape[1] :].count_nonzero():
        raise PatternError(
            f"expected no values beyond channel {shape[1]}, found some in the padding of the last "
            "group."
        )
    weight = channels[:, :, : shape[1]].transpose(1, 2).reshape(shape)
    # Not contiguous(): that leaves axes of length 1 any stride, by which kernels are chosen.
    return (
        torch.empty_like(weight, memory_format=torch.contiguous_format)
        .copy_(weight)
        .view(values.dtype)
    )


def _groups(bits: Tensor, m: int) -> Tensor:
    """`(C_out * taps * groups, M)`, padded with zeros."""
    channels = bits.reshape(*bits.shape[:2], prod(bits.shape[2:])).transpose(1, 2)
    return F.pad(channels, (0, -bits.shape[1] % m)).reshape(-1, m)


def _to_bits(numbers: np.ndarray, width: int) -> np.ndarray:
    shifts = np.arange(width - 1, -1, -1, dtype=numbers.dtype)
    return np.packbits(((numbers[:, None] >> shifts) & 1).astype(np.uint8))


def _from_bits(data: np.ndarray, width: int, count: int) -> np.ndarray:
    bits = np.unpackbits(data, count=count * width).reshape(count, width)
    numbers = np.zeros(count, dtype=np.int64)
    for column in range(width):
        numbers = (numbers << 1) | bits[:, column]
    return numbers
