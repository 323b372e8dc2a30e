"""The masks of the paper as pure functions of a weight: B (Eq. 3), B^U and the live taps (Eq. 8).

A weight has shape `(C_out, C_in/groups, *kernel)`, where `kernel` holds no axis (linear) or any
number of them. Magnitudes are compared by their bits, which order as the numbers do, so every
comparison is exact in every dtype; a NaN counts as larger than anything. Equal magnitudes go to
the lower index, so the same weights give the same mask on every rank and device.

Nothing here is recorded by autograd. On CUDA none of the masks waits for the device; `obeys` does.
"""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from spre_fx import mask_ops
from spre_fx.errors import PatternError
from spre_fx.patterns import Pattern


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
    rows: Tensor = mask_ops.nm_mask(group_rows(weight.detach(), pattern), pattern.n, pattern.m)
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
    mask: Tensor = mask_ops.unstructured_mask(weight.detach(), pattern.n, pattern.m)
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
    live: Tensor = mask_ops.live_taps(weight.detach(), pattern.n, pattern.m)
    return live


def spre_mask(nm: Tensor, live: Tensor) -> Tensor:
    """SpRe mask `B^S`: the N:M mask at the live taps, zero at all others.

    Eq. 8 of Zhang et al., 2306.05612v3. The gradient of a mask of numbers, such as that of LBC,
    passes straight through: the weights of a SpRe branch give B^S none where it is 0.

    Args:
        nm: N:M mask `B`, `(C_out, C_in/groups, *kernel)`.
        live: Live taps, `kernel`.

    Returns:
        Mask of the shape and memory format of `nm`.
    """
    if has_torch_function((nm, live)):  # torch.fx traces it as one node
        mask: Tensor = handle_torch_function(spre_mask, (nm, live), nm, live)
        return mask
    spre: Tensor = mask_ops.spre_mask(nm, live)
    return spre


def spatial_sparsity(mask: Tensor) -> Tensor:
    """Spatial sparsity `SS(u, v)`: the fraction of zeros of a mask, or of a weight, at each tap.

    Eq. 4 of Zhang et al., 2306.05612v3.

    Args:
        mask: `(C_out, C_in/groups, *kernel)`.

    Returns:
        float64 tensor of shape `kernel`.
    """
    return mask_ops.count_per_tap(mask == 0).double() / mask.shape[:2].numel()


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


def _check(weight: Tensor) -> None:
    if weight.ndim < 2 or weight.dtype not in mask_ops.BITS:
        raise PatternError(
            "expected a floating-point weight of shape (C_out, C_in/groups, *kernel), found "
            f"{weight.dtype} of shape {tuple(weight.shape)}."
        )


def _non_zeros_per_group(weight: Tensor, pattern: Pattern) -> Tensor:
    return mask_ops.group_major(group_rows(weight != 0, pattern), pattern.m).sum(0)
