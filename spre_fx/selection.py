"""Selections on rows of numbers: the largest of them, fewer of a mask, more of a mask.

Rows are all of a layer, its kernel taps, or runs of its flattened weight. Equal numbers go to the
lower index, so that every rank selects the same.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


def top(values: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` largest values of each row, lower index first among equals.

    Args:
        values: `(rows, size)`.
        count: At most `size`.
    """
    order = values.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, order[:, :count], True)


def shrink(mask: Tensor, values: Tensor, count: int) -> Tensor:
    """The `count` entries of each row of a mask with the largest values (none negative)."""
    return top(values.masked_fill(~mask, -1), count) & mask


def grow(mask: Tensor, values: Tensor, count: int) -> Tensor:
    """A mask with the `count` more entries of each row that have the largest values (>= 0)."""
    return mask | top(values.masked_fill(mask, -1), count)


def rows_of(tensor: Tensor, rule: str | None) -> Tensor:
    """A weight `(C_out, C_in/groups, *kernel)` as rows.

    Args:
        tensor: The weight, or something of its shape.
        rule: None: one row. "spatial": a row per tap. "equal": as many rows, each a run of
            C_out * C_in/groups entries of the flattened tensor.
    """
    taps = prod(tensor.shape[2:])
    if rule == "spatial":
        return tensor.reshape(-1, taps).T
    return tensor.reshape(taps if rule == "equal" else 1, -1)


def unrows(rows: Tensor, shape: torch.Size, rule: str | None) -> Tensor:
    """The tensor of this shape that `rows_of` makes those rows of."""
    return (rows.T if rule == "spatial" else rows).reshape(shape)
