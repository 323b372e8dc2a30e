"""The selections behind masks.py: operators, and what they compute in torch.

They are custom operators, hence opaque to `torch.compile`: code that Inductor generates for them
takes longer to build, and on CPU to run, than these do. On a CPU the engine computes them; the
torch versions are for other devices, for where there is no engine, and the reference. On CUDA none
waits for the device.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spre_fx import huge_pages, native_masks
from spre_fx.operators import operator
from spre_fx.patterns import Pattern

BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def _mask_of(weight: Tensor, *_: int) -> Tensor:
    return torch.empty_like(weight, dtype=torch.bool)


def _like_mask(mask: Tensor, _: Tensor) -> Tensor:
    return torch.empty_like(mask)


def _mask_of_taps(weight: Tensor, *_: int) -> Tensor:
    return weight.new_empty(weight.shape[2:], dtype=torch.bool)


@operator("nm_mask", fake=_mask_of)
def nm_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """N:M mask of a weight `(C_out, C_in/groups, *kernel)`, in its memory format."""
    mask = native_masks.nm_mask(weight, n, m)
    return nm_mask_by_torch(weight, n, m) if mask is None else mask


@operator("unstructured_mask", fake=_mask_of)
def unstructured_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Unstructured mask B^U of a weight, in its memory format."""
    mask = largest(weight, Pattern(n, m).kept(weight.numel()))
    return torch.empty_like(weight, dtype=torch.bool).copy_(mask)


@operator("live_taps", fake=_mask_of_taps)
def live_taps(weight: Tensor, n: int, m: int) -> Tensor:
    """The taps of a weight that keep more than N/M of their weights in B^U."""
    count = Pattern(n, m).kept(weight.numel())
    kept = native_masks.count_largest(weight, count)
    if kept is None:
        kept = count_per_tap(largest(weight, count))
    return kept * m > n * weight.shape[:2].numel()


def spre_mask(nm: Tensor, live: Tensor) -> Tensor:
    """N:M mask `(C_out, C_in/groups, *kernel)`, of numbers or bool, times live taps `kernel`."""
    mask: Tensor = _SpReMask.apply(nm, live) if nm.requires_grad else _spre_mask(nm, live)
    return mask


class _SpReMask(torch.autograd.Function):
    """B^S of numbers; the gradient passes on to B: `masked_weight` gives none where B^S is 0.

    A gradient of the operator's own takes five times as much of Python's time.
    """

    @staticmethod
    def forward(ctx: Any, nm: Tensor, live: Tensor) -> Tensor:  # noqa: ARG004
        mask: Tensor = _spre_mask(nm, live)
        return mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None


@operator("spre_mask", fake=_like_mask)
def _spre_mask(nm: Tensor, live: Tensor) -> Tensor:
    """The product.

    Live taps in the shape of a filter: the product then runs along whole filters, not along one
    kernel after the other, which takes 15 times as long.
    """
    live_of_filter = torch.empty_like(nm[:1]).copy_(live)
    return torch.mul(nm, live_of_filter, out=huge_pages.empty_like(nm))


def nm_mask_by_torch(weight: Tensor, n: int, m: int) -> Tensor:
    """What `nm_mask` computes, without the engine."""
    magnitude = group_major(weight, m).abs_().view(BITS[weight.dtype])
    kept = _first_largest(magnitude) if n == 1 else _rank(magnitude) < n
    groups = torch.stack(kept.unbind(), 2)  # (C_out, groups, M, taps)
    mask = groups.flatten(1, 2)[:, : weight.shape[1]].reshape(weight.shape)
    return torch.empty_like(weight, dtype=torch.bool).copy_(mask)


def largest(weight: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest magnitudes of a weight, lower index first among equals."""
    magnitude = weight.abs().flatten().view(BITS[weight.dtype])
    select = _largest_on_cpu if weight.device.type == "cpu" else _largest_without_sync
    return select(magnitude, count).view(weight.shape)


def count_per_tap(mask: Tensor) -> Tensor:
    """Number of set entries at each tap, int64 of shape `kernel`.

    Summed over filters first: rows of C_in/groups * taps are long, rows of taps are not.
    """
    per_position = mask.reshape(len(mask), -1).sum(0, dtype=torch.int32)
    return per_position.view(mask.shape[1], -1).sum(0).view(mask.shape[2:])


def group_major(values: Tensor, m: int) -> Tensor:
    """New tensor `(M, C_out, groups, taps)` of zero-padded groups.

    With M in front, arithmetic between the members of a group runs over long contiguous rows
    instead of short ones, which pays for the copy many times over.
    """
    flat = values.reshape(*values.shape[:2], prod(values.shape[2:]))
    padding = -flat.shape[1] % m
    if padding:
        flat = F.pad(flat, (0, 0, 0, padding))
    return torch.stack(flat.unflatten(1, (-1, m)).unbind(2))


def _rank(magnitude: Tensor) -> Tensor:
    """Rank of each member in its group, 0 for the largest, lower index first among equals.

    Counts, for every distance between two members, who beats whom: M - 1 comparisons of blocks
    instead of a sort.
    """
    rank = _members_after(magnitude).repeat(1, *magnitude.shape[1:])  # as if those won them all
    for distance in range(1, len(magnitude)):
        earlier_wins = (magnitude[:-distance] >= magnitude[distance:]).view(torch.int8)
        rank[distance:] += earlier_wins
        rank[:-distance] -= earlier_wins
    return rank


def _first_largest(magnitude: Tensor) -> Tensor:
    """Mask of the largest member of each group, the one of lowest index among equals."""
    largest = (magnitude == magnitude.amax(0)) * (_members_after(magnitude) + 1)
    return largest == largest.amax(0)


def _members_after(magnitude: Tensor) -> Tensor:
    """How many members of its group follow each one, `(M, 1, 1, 1)`."""
    m = len(magnitude)
    dtype = torch.int8 if m < 128 else torch.int32
    return torch.arange(m - 1, -1, -1, dtype=dtype, device=magnitude.device).view(m, 1, 1, 1)


def _largest_on_cpu(magnitude: Tensor, count: int) -> Tensor:
    """Select with NumPy's partition, several times faster than torch.kthvalue or topk."""
    if magnitude.dtype == torch.int16:
        magnitude = magnitude.int()  # NumPy partitions 32 bits with vector instructions, 16 rarely
    threshold = int(np.partition(magnitude.numpy(), -count)[-count])
    kept = magnitude >= threshold
    surplus = int(kept.count_nonzero()) - count
    if surplus:
        ties = (magnitude == threshold).nonzero()[:, 0]
        kept[ties[-surplus:]] = False
    return kept


def _largest_without_sync(magnitude: Tensor, count: int) -> Tensor:
    threshold = magnitude.topk(count, sorted=False).values.amin()
    kept = magnitude > threshold
    ties = magnitude == threshold
    return kept | (ties & (ties.cumsum(0) <= count - kept.sum()))
