"""The three passes of a conv with masked weights, by the kernels of the CPU engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spre_fx.engine import MaskedConv, load


class Geometry(NamedTuple):
    """How a conv2d goes over its input; each list is (vertical, horizontal)."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


@dataclass(frozen=True)
class Kept:
    """The weights that a mask keeps.

    Attributes:
        mask: Bool, `(C_out, C_in/groups, kH, kW)`, in a layout that kernels read.
        count: How many there are.
    """

    mask: Tensor
    count: int


FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = 0, 1, 2  # as training.h numbers them

_DTYPES = (torch.float32, torch.float64)
_LARGEST = 2**31  # numbers of what kernels index with 32 bits
_MOST_TOGETHER = 64
_ALIGNMENT = 64


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether there are kernels for these operands here."""
    if x.dim() != 4 or not x.numel() or not x.is_cpu or torch.is_autocast_enabled("cpu"):
        return False
    same = x.dtype == weight.dtype and x.dtype in _DTYPES
    read = max(x.shape[1], len(weight)) * x[0, 0].numel()  # of an image, or of its output
    small = weight.numel() < _LARGEST and read * _MOST_TOGETHER < _LARGEST
    return same and small and images_together(x.itemsize) > 0


def images_together(itemsize: int) -> int:
    """How many images a kernel takes at a time; 0 where there is none.

    Fewer, such as the last ones of a batch, take as long.
    """
    engine = load()
    return 0 if engine is None else engine.images_together(itemsize)


# What torch.compiler.assume_constant_result does, which imports the compiler at once.
images_together._dynamo_marked_constant = True  # type: ignore[attr-defined]


def memory_format(x: Tensor) -> torch.memory_format:
    """The one of two, channels-last or contiguous, that kernels read this in."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def output_shape(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[int, ...]:
    """Shape of the output, `(batch, C_out, H_out, W_out)`."""
    sides = zip(x.shape[2:], weight.shape[2:], *geometry[:3], strict=True)
    return len(x), len(weight), *((i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in sides)


def forward(
    x: Tensor, weight: Tensor, kept: Kept, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """conv2d(x; mask * weight) + bias, in the memory format of x."""
    layout = memory_format(x)
    y = torch.empty(output_shape(x, weight, geometry), dtype=x.dtype, memory_format=layout)
    _run(
        FORWARD,
        x,
        kept,
        geometry,
        y,
        x=x.contiguous(memory_format=layout),
        weight=weight,
        bias=None if bias is None else bias.contiguous(),
    )
    return y


def input_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor, kept: Kept, geometry: Geometry
) -> Tensor:
    """The gradient of x where that of `conv2d(x; mask * weight)` is `gradient`."""
    layout = memory_format(x)
    result = torch.empty_like(x, memory_format=layout)
    gradient = gradient.contiguous(memory_format=layout)
    _run(INPUT_GRADIENT, x, kept, geometry, result, y_gradient=gradient, weight=weight)
    return result


def weight_gradient(gradient: Tensor, x: Tensor, kept: Kept, geometry: Geometry) -> Tensor:
    """The gradient of the weight where the mask is set, and 0 elsewhere."""
    layout = memory_format(x)
    result = torch.empty_like(kept.mask, dtype=x.dtype)
    gradient, x = (one.contiguous(memory_format=layout) for one in (gradient, x))
    _run(WEIGHT_GRADIENT, x, kept, geometry, result, x=x, y_gradient=gradient)
    return result


def kept_by(mask: Tensor) -> Kept:
    """What a mask of bools or numbers keeps, of any strides."""
    engine = load()
    assert engine is not None
    if mask.dtype != torch.bool:
        mask = mask != 0
    mask = mask.contiguous(memory_format=memory_format(mask))
    return Kept(mask, engine.count_kept(mask.data_ptr(), mask.numel()))


def _run(
    which: int,
    input: Tensor,
    kept: Kept,
    geometry: Geometry,
    result: Tensor,
    **operands: Tensor | None,
) -> None:
    engine, weight = load(), operands.get("weight")
    assert engine is not None
    if weight is not None:
        operands["weight"] = weight.contiguous(memory_format=memory_format(kept.mask))
    conv = describe(input, kept.mask, geometry)
    threads = torch.get_num_threads()
    scratch = torch.empty(
        engine.masked_conv_scratch(conv, which, kept.count, threads) + _ALIGNMENT,
        dtype=torch.uint8,
    )
    aligned = -(-scratch.data_ptr() // _ALIGNMENT) * _ALIGNMENT
    addresses = {name: each.data_ptr() for name, each in operands.items() if each is not None}
    engine.masked_conv(
        conv,
        which,
        kept.count,
        mask=kept.mask.data_ptr(),
        result=result.data_ptr(),
        scratch=aligned,
        threads=threads,
        **addresses,
    )


def describe(x: Tensor, mask: Tensor, geometry: Geometry) -> MaskedConv:
    """Shapes and layouts, as the kernels want them."""
    images, channels, *size = x.shape
    *_, height, width = output_shape(x, mask, geometry)
    stride, padding, dilation, groups = geometry
    return MaskedConv(
        x.itemsize,
        *(images, channels, *size),
        *(len(mask), height, width),
        *mask.shape[2:],
        *(*stride, *padding, *dilation, groups),
        memory_format(x) == torch.channels_last,
        memory_format(mask) == torch.channels_last,
    )
