"""What mask_ops.py and masked_weight.py compute, by the kernels of the CPU engine.

Every function returns None where there is no engine or no kernel for its operands: torch then
computes the same, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spre_fx.engine import Weight, load

_PRODUCTS = (torch.float32, torch.float64)  # types that kernels multiply
_NUMBERS_OF_A_THREAD = 32_768  # at least: fewer are done before another thread has woken up


def nm_mask(weight: Tensor, n: int, m: int) -> Tensor | None:
    """The N:M mask of a weight `(C_out, C_in/groups, *kernel)`, in its memory format."""
    engine, view = load(), _view(weight)
    if engine is None or view is None or m > engine.largest_m():
        return None
    mask = torch.empty_like(weight, dtype=torch.bool)
    engine.nm_mask(view, n, m, mask.data_ptr(), _threads(weight))
    return mask


def count_largest(weight: Tensor, kept: int) -> Tensor | None:
    """How many of the `kept` largest magnitudes each tap has, int64 of shape `kernel`."""
    engine, view = load(), _view(weight)
    if engine is None or view is None:
        return None
    threads = _threads(weight)
    scratch = torch.empty(engine.count_scratch(view, threads), dtype=torch.uint8)
    per_tap = torch.empty(weight.shape[2:], dtype=torch.int64)
    engine.count_largest(view, kept, per_tap.data_ptr(), scratch.data_ptr(), threads)
    return per_tap


def mask_weight(weight: Tensor, mask: Tensor, *, in_place: bool = False) -> Tensor | None:
    """`weight * mask`, in the place of the weight if so asked."""
    engine = load()
    if engine is None or not _has_kernel(weight, mask):
        return None
    y = weight if in_place else torch.empty_like(weight)
    engine.mask_weight(
        weight=weight.data_ptr(),
        mask=mask.data_ptr(),
        y=y.data_ptr(),
        itemsize=weight.itemsize,
        count=weight.numel(),
        threads=_threads(weight),
    )
    return y


def decay_gradient(
    gradient: Tensor, weight: Tensor, mask: Tensor, decay: float, *, in_place: bool = False
) -> Tensor | None:
    """`gradient + decay * (1 - mask) * weight`, the very gradient where the mask is set.

    In the place of the gradient if so asked.
    """
    engine = load()
    if engine is None or not _has_kernel(weight, mask) or not _has_kernel(gradient, mask):
        return None
    if gradient.dtype != weight.dtype:
        return None
    y = gradient if in_place else torch.empty_like(weight)
    engine.decay_gradient(
        gradient=gradient.data_ptr(),
        weight=weight.data_ptr(),
        mask=mask.data_ptr(),
        y=y.data_ptr(),
        itemsize=weight.itemsize,
        count=weight.numel(),
        decay=decay,
        threads=_threads(weight),
    )
    return y


def product_gradients(
    gradient: Tensor, weight: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The gradients of `weight * mask`, both of numbers; the mask has none where it is 0."""
    engine = load()
    if engine is None or weight.dtype not in _PRODUCTS or not _is_readable(weight):
        return None
    if not all(_lie_alike(weight, other) for other in (gradient, mask)):
        return None
    of_weight, of_mask = torch.empty_like(weight), torch.empty_like(weight)
    engine.product_gradients(
        gradient=gradient.data_ptr(),
        weight=weight.data_ptr(),
        mask=mask.data_ptr(),
        of_weight=of_weight.data_ptr(),
        of_mask=of_mask.data_ptr(),
        itemsize=weight.itemsize,
        count=weight.numel(),
        threads=_threads(weight),
    )
    return of_weight, of_mask


def _view(weight: Tensor) -> Weight | None:
    """What the engine sees of a weight, if it can read it."""
    if not _is_readable(weight) or not 0 < weight.numel() < 2**31:
        return None
    filters, channels = weight.shape[:2]
    taps = weight.shape[2:].numel()
    channels_last = not weight.is_contiguous()
    return Weight(weight.data_ptr(), weight.itemsize, filters, channels, taps, channels_last)


def _is_readable(weight: Tensor) -> bool:
    """Whether it lies in memory as the engine reads it."""
    return weight.is_cpu and (weight.is_contiguous() or weight.movedim(1, -1).is_contiguous())


def _has_kernel(numbers: Tensor, mask: Tensor) -> bool:
    """Whether numbers and a mask lie in memory alike, and are of types that kernels take."""
    taken = numbers.dtype in _PRODUCTS and mask.dtype == torch.bool
    alike = numbers.shape == mask.shape and numbers.stride() == mask.stride()
    return taken and alike and _is_readable(numbers)


def _lie_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of one type, shape and memory format."""
    return (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())


def _threads(weight: Tensor) -> int:
    return min(torch.get_num_threads(), 1 + weight.numel() // _NUMBERS_OF_A_THREAD)
