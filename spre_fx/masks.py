"""The masks of the paper as pure functions of a weight: B (Eq. 3), B^U and the live taps (Eq. 8).

A weight has shape `(C_out, C_in/groups, *kernel)`, where `kernel` holds no axis (linear) or any
number of them. Magnitudes are compared by their bits, which order as the numbers do, so every
comparison is exact in every dtype; a NaN counts as larger than anything. Equal magnitudes go to
the lower index, so the same weights give the same mask on every rank and device.

Nothing here is recorded by autograd. The three selections are custom operators, hence opaque to
`torch.compile`: code that Inductor generates for them takes longer to build, and on CPU to run,
than these do. On CUDA none of the masks waits for the device; `obeys` does.
"""

from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spre_fx.errors import PatternError
from spre_fx.patterns import Pattern

_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def nm_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """N:M mask `B`: the N largest magnitudes of every M consecutive input channels.

    Eq. 3 of Zhang et al., 2306.05612v3. A group lies within one filter and one tap, or where the
    pattern is flat wherever `group_rows` puts it. A last partial group of r < M weights counts as
    padded with zeros: it keeps the min(N, r) largest.

    Args:
        weight: `(C_out, C_in/groups, *kernel)`, floating point.
        pattern: N:M.

    Returns:
        Bool mask, shape and memory format of `weight`.

    Raises:
        PatternError: If `weight` is not a floating-point tensor with two or more axes.
    """
    _check(weight)
    rows: Tensor = _nm_mask(group_rows(weight.detach(), pattern), pattern.n, pattern.m)
    mask = ungroup_rows(rows, weight.shape, pattern)
    return torch.empty_like(weight, dtype=torch.bool).copy_(mask) if pattern.flat else mask


def unstructured_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """Unstructured mask `B^U`: the `ceil(numel * N / M)` largest magnitudes of the whole layer.

    Magnitude pruning at rate 1 - N/M, sec. 3.3 of Zhang et al., 2306.05612v3. Ties go to the lower
    row-major index.

    Args:
        weight: `(C_out, C_in/groups, *kernel)`, floating point.
        pattern: N:M.

    Returns:
        Bool mask, shape and memory format of `weight`.

    Raises:
        PatternError: If `weight` is not a floating-point tensor with two or more axes.
    """
    _check(weight)
    mask: Tensor = _unstructured_mask(weight.detach(), pattern.n, pattern.m)
    return mask


def live_taps(weight: Tensor, pattern: Pattern) -> Tensor:
    """Spatial mask: the taps (u, v) where `SS(B^U, u, v) < 1 - N/M`.

    The condition of Eq. 8 of Zhang et al., 2306.05612v3, decided in integers: a tap is live if
    `B^U` keeps more than N/M of the C_out * C_in/groups weights there.

    Args:
        weight: `(C_out, C_in/groups, *kernel)`, floating point.
        pattern: N:M.

    Returns:
        Bool tensor of shape `kernel`.

    Raises:
        PatternError: If `weight` is not a floating-point tensor with two or more axes.
    """
    _check(weight)
    live: Tensor = _live_taps(weight.detach(), pattern.n, pattern.m)
    return live


def spre_mask(nm: Tensor, live: Tensor) -> Tensor:
    """SpRe mask `B^S`: the N:M mask at the live taps, zero at all others.

    Eq. 8 of Zhang et al., 2306.05612v3.

    Args:
        nm: N:M mask `B`, `(C_out, C_in/groups, *kernel)`.
        live: Live taps, `kernel`.

    Returns:
        Mask of the shape of `nm`.
    """
    return nm * live


def spatial_sparsity(mask: Tensor) -> Tensor:
    """Spatial sparsity `SS(u, v)`: the fraction of zeros of a mask, or of a weight, at each tap.

    Eq. 4 of Zhang et al., 2306.05612v3.

    Args:
        mask: `(C_out, C_in/groups, *kernel)`.

    Returns:
        float64 tensor of shape `kernel`.
    """
    return count_per_tap(mask == 0).double() / mask.shape[:2].numel()


def count_per_tap(mask: Tensor) -> Tensor:
    """Number of set entries of a mask at each tap.

    Summed over filters first: rows of C_in/groups * taps are long, rows of taps are not.

    Args:
        mask: `(C_out, C_in/groups, *kernel)`, bool.

    Returns:
        int64 tensor of shape `kernel`.
    """
    per_position = mask.reshape(len(mask), -1).sum(0, dtype=torch.int32)
    return per_position.view(mask.shape[1], -1).sum(0).view(mask.shape[2:])


def obeys(weight: Tensor, pattern: Pattern) -> bool:
    """Whether every group of M consecutive input channels has at most N non-zeros.

    Eq. 3 of Zhang et al., 2306.05612v3; a last partial group may hold N as well.

    Args:
        weight: `(C_out, C_in/groups, *kernel)`.
        pattern: N:M.
    """
    return bool((_non_zeros_per_group(weight, pattern) <= pattern.n).all())


def most_in_a_group(weight: Tensor, pattern: Pattern) -> int:
    """The most non-zeros among any M weights that the pattern puts into a group.

    Args:
        weight: `(C_out, C_in/groups, *kernel)`.
        pattern: N:M.
    """
    return int(_non_zeros_per_group(weight, pattern).max())


def group_rows(values: Tensor, pattern: Pattern) -> Tensor:
    """A weight with the members of each group next to one another along axis 1.

    Args:
        values: `(C_out, C_in/groups, *kernel)`.
        pattern: N:M.

    Returns:
        `values`; of a flat pattern `(1, numel)`, in the order (C_out, *kernel, C_in/groups): that
        of the published code of SR-STE, which for a depthwise conv, where C_in/groups is 1,
        straddles taps and filters.
    """
    return values.movedim(1, -1).reshape(1, -1) if pattern.flat else values


def ungroup_rows(rows: Tensor, shape: torch.Size, pattern: Pattern) -> Tensor:
    """The tensor of this shape that `group_rows` makes those rows of."""
    if not pattern.flat:
        return rows
    return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


@torch.library.custom_op("spre_fx::nm_mask", mutates_args=())
def _nm_mask(weight: Tensor, n: int, m: int) -> Tensor:
    magnitude = _group_major(weight, m).abs_().view(_BITS[weight.dtype])
    kept = _first_largest(magnitude) if n == 1 else _rank(magnitude) < n
    groups = torch.stack(kept.unbind(), 2)  # (C_out, groups, M, taps)
    mask = groups.flatten(1, 2)[:, : weight.shape[1]].reshape(weight.shape)
    return torch.empty_like(weight, dtype=torch.bool).copy_(mask)


@torch.library.custom_op("spre_fx::unstructured_mask", mutates_args=())
def _unstructured_mask(weight: Tensor, n: int, m: int) -> Tensor:
    mask = _largest(weight, Pattern(n, m)).view(weight.shape)
    return torch.empty_like(weight, dtype=torch.bool).copy_(mask)


@torch.library.custom_op("spre_fx::live_taps", mutates_args=())
def _live_taps(weight: Tensor, n: int, m: int) -> Tensor:
    kept = count_per_tap(_largest(weight, Pattern(n, m)).view(weight.shape))
    return kept * m > n * weight.shape[:2].numel()


@_nm_mask.register_fake
@_unstructured_mask.register_fake
def _(weight: Tensor, *_: int) -> Tensor:
    return torch.empty_like(weight, dtype=torch.bool)


@_live_taps.register_fake
def _(weight: Tensor, *_: int) -> Tensor:
    return weight.new_empty(weight.shape[2:], dtype=torch.bool)


def _check(weight: Tensor) -> None:
    if weight.ndim < 2 or weight.dtype not in _BITS:
        raise PatternError(
            "expected a floating-point weight of shape (C_out, C_in/groups, *kernel), found "
            f"{weight.dtype} of shape {tuple(weight.shape)}."
        )


def _group_major(values: Tensor, m: int) -> Tensor:
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


def _largest(weight: Tensor, pattern: Pattern) -> Tensor:
    """Flat mask of the `pattern.kept(numel)` largest magnitudes, lower index first among equals."""
    magnitude = weight.abs().flatten().view(_BITS[weight.dtype])
    select = _largest_on_cpu if weight.device.type == "cpu" else _largest_without_sync
    return select(magnitude, pattern.kept(weight.numel()))


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


def _non_zeros_per_group(weight: Tensor, pattern: Pattern) -> Tensor:
    return _group_major(group_rows(weight != 0, pattern), pattern.m).sum(0)
