"""2:4 weights as sparse tensor cores take them: values, metadata, and the sizes the libraries ask.

Of every four consecutive columns of a row at most two are not zero. The matrix is stored as those
two values, in `(rows, columns / 2)`, and their positions, two bits each. N:M weights with M a
multiple of 4 and N <= 2, and so all patterns of the paper, are 2:4: a group of M then never has
more than two in any four. Others may happen to be; only the zeros count.

Metadata is in the order of CUTLASS's sparse GEMM for two-byte types, `ColumnMajorInterleaved<2>`
of rows that are reordered by 32: what `torch.sparse` calls `meta`. Four groups fill one int16
word, the first in its lowest bits, each as first position + 4 * second position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor
from torch.nn import functional as F

from spre_fx.errors import PatternError

TILE = (32, 32)
"""Rows and columns of the smallest matrix whose metadata has an order: 32 x 2 words."""

_WORD = 16  # columns of one word of metadata

# First + 4 * second position by which of the four are not zero, 1 + 2 + 4 + 8; -1 with three of
# them. With one or none, zeros are kept beside it: the same ones as torch.sparse keeps.
_CODES = (14, 8, 9, 4, 14, 8, 9, -1, 14, 12, 13, -1, 14, -1, -1, -1)


@dataclass(frozen=True)
class ShapeRule:
    """What the sizes of a sparse GEMM's operands must be multiples of.

    Attributes:
        rows: Of the sparse matrix, the output channels.
        columns: Of the sparse matrix, the length of the dot products.
        dense: Both sizes of the dense matrix.
    """

    rows: int
    columns: int
    dense: int


SHAPE_RULES: Mapping[str, Mapping[torch.dtype, ShapeRule]] = {
    "cusparselt": {
        torch.float16: ShapeRule(rows=16, columns=16, dense=8),
        torch.bfloat16: ShapeRule(rows=16, columns=16, dense=8),
    },
    "cutlass": {
        torch.float16: ShapeRule(rows=32, columns=64, dense=8),
        torch.bfloat16: ShapeRule(rows=32, columns=64, dense=8),
    },
}
"""Library -> type -> rule, as `torch.sparse` checks them."""


@dataclass(frozen=True, eq=False)
class TwoFour:
    """A 2:4 matrix of shape `(rows, columns)`.

    Attributes:
        values: `(rows, columns / 2)`, in the type of the matrix.
        metadata: `(rows, columns / 16)`, int16, in CUTLASS's order.
    """

    values: Tensor
    metadata: Tensor


def padded_shape(library: str, dtype: torch.dtype, shape: tuple[int, int]) -> tuple[int, int] | str:
    """The size to pad a sparse matrix to with zeros, or a sentence that refuses it.

    Args:
        library: "cusparselt" or "cutlass".
        dtype: Of the matrix.
        shape: `(rows, columns)`.

    Returns:
        The least `(rows, columns)` that meet the library's rule and have metadata.
    """
    rule = SHAPE_RULES[library].get(dtype)
    if rule is None:
        known = " and ".join(str(known) for known in SHAPE_RULES[library])
        return f"{library} is used for {known}, found {dtype}: convert the model before finalize"
    if 0 in shape:
        return f"expected a weight with rows and columns, found shape {shape}"
    rows, columns = lcm(rule.rows, TILE[0]), lcm(rule.columns, TILE[1])
    return _round_up(shape[0], rows), _round_up(shape[1], columns)


def is_two_four(matrix: Tensor) -> bool:
    """Whether no four consecutive columns of `(rows, columns)` hold more than two non-zeros."""
    groups = F.pad(matrix, (0, -matrix.shape[1] % 4)).unflatten(1, (-1, 4))
    return bool((groups.count_nonzero(2) <= 2).all())


def compress(matrix: Tensor) -> TwoFour:
    """Store a 2:4 matrix as values and metadata, as `torch.sparse` does for CUTLASS.

    Args:
        matrix: `(rows, columns)`, multiples of `TILE`; only of a two-byte type does a tensor core
            take the result. A -0.0 counts as a zero, and may come back as 0.0.

    Raises:
        PatternError: If it is not 2:4, or of another size.
    """
    if matrix.ndim != 2 or matrix.shape[0] % TILE[0] or matrix.shape[1] % TILE[1]:
        raise PatternError(
            f"expected a matrix of multiples of {TILE[0]} rows and {TILE[1]} columns, found shape "
            f"{tuple(matrix.shape)}: pad it to padded_shape()."
        )
    groups = matrix.detach().contiguous().unflatten(1, (-1, 4))
    which = ((groups != 0) * _row(groups, (1, 2, 4, 8))).sum(2)
    codes = _row(groups, _CODES)[which]
    if bool((codes < 0).any()):
        row, group = (codes < 0).nonzero()[0].tolist()
        raise PatternError(
            f"expected at most 2 non-zeros in every 4 columns, found "
            f"{int(groups[row, group].count_nonzero())} in columns {4 * group} to {4 * group + 3} "
            f"of row {row}."
        )
    positions = torch.stack((codes & 3, codes >> 2), 2)
    words = (codes.unflatten(1, (-1, 4)) << _row(groups, (0, 4, 8, 12))).sum(2)
    return TwoFour(groups.gather(2, positions).flatten(1), _reorder(words.to(torch.int16)))


def decompress(two_four: TwoFour) -> Tensor:
    """The matrix that was compressed, `(rows, columns)`.

    Raises:
        PatternError: If the metadata does not belong to such a matrix.
    """
    values, metadata = two_four.values, two_four.metadata
    expected = (values.shape[0], 2 * values.shape[1] // _WORD)
    if metadata.shape != expected or metadata.dtype != torch.int16:
        raise PatternError(
            f"expected int16 metadata of shape {expected} for values of shape "
            f"{tuple(values.shape)}, found {metadata.dtype} of shape {tuple(metadata.shape)}."
        )
    words = _restore(metadata).long().unsqueeze(2)
    codes = (words >> _row(words, (0, 4, 8, 12))).flatten(1) & 15
    positions = torch.stack((codes & 3, codes >> 2), 2)
    if bool((positions[:, :, 0] >= positions[:, :, 1]).any()):
        raise PatternError("expected two ascending positions in every group, found others.")
    groups = values.new_zeros(*codes.shape, 4)
    return groups.scatter_(2, positions, values.unflatten(1, (-1, 2))).flatten(1)


def filter_matrix(weight: Tensor) -> Tensor:
    """The filters of a conv as rows to multiply with patches in channels_last order.

    Args:
        weight: `(C_out, C_in, *kernel)`; a linear has no kernel.

    Returns:
        `(C_out, taps * padded C_in)`: tap by tap, and in each the input channels, along which
        patterns run, padded with zeros so that no four columns belong to two taps.
    """
    taps = weight.reshape(*weight.shape[:2], -1).transpose(1, 2)
    return F.pad(taps, (0, -weight.shape[1] % 4)).flatten(1)


def filters(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The weight of shape `(C_out, C_in, *kernel)` whose `filter_matrix` begins `matrix`."""
    taps, channels = torch.Size(shape[2:]).numel(), _round_up(shape[1], 4)
    rows = matrix[: shape[0], : taps * channels].unflatten(1, (taps, channels))
    weight: Tensor = rows[:, :, : shape[1]].transpose(1, 2).reshape(shape).contiguous()
    return weight


def _reorder(words: Tensor) -> Tensor:
    """Row-major words to CUTLASS's order: a permutation of the axes they are split into.

    Of 32 rows, row 8a + b goes to 4b + a; then the 2 x 2 words of two rows and two columns are
    transposed, and stand together, pairs of columns outermost.
    """
    rows, columns = words.shape
    split = words.view(rows // 32, 2, 2, 8, columns // 2, 2)
    return split.permute(4, 0, 3, 1, 5, 2).reshape(rows, columns)


def _restore(metadata: Tensor) -> Tensor:
    """The inverse of `_reorder`."""
    rows, columns = metadata.shape
    split = metadata.reshape(columns // 2, rows // 32, 8, 2, 2, 2)
    return split.permute(1, 3, 5, 2, 0, 4).reshape(rows, columns)


def _row(like: Tensor, numbers: tuple[int, ...]) -> Tensor:
    return torch.tensor(numbers, device=like.device)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
