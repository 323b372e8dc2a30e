"""Random convs with masked weights, and what torch computes of them in float64."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from torch.nn import functional as F

from spre_fx.native_conv import Geometry

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


@dataclass
class MaskedConv:
    """The operands of the three passes. Weights that the mask removes are not 0 here."""

    x: Tensor
    weight: Tensor
    mask: Tensor
    bias: Tensor | None
    y_gradient: Tensor
    geometry: Geometry

    def output(self) -> Tensor:
        bias = None if self.bias is None else self.bias.double()
        return F.conv2d(self.x.double(), self._kept_weight(), bias, *self.geometry)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of x, and of the weight where the mask is set."""
        stride, padding, dilation, groups = self.geometry
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            *(self.y_gradient.double(), self.x.double(), self._kept_weight(), None),
            *(stride, padding, dilation, False, [0, 0], groups, [True, True, False]),
        )
        return of_x, of_weight * self.mask

    def _kept_weight(self) -> Tensor:
        kept = self.weight.double() * self.mask
        return kept.contiguous()  # torch has no gradients for some other strides


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Compare with a result in float64, up to the rounding of sums of numbers around 1."""
    assert found.shape == expected.shape
    size = float(expected.abs().max()) if expected.numel() else 0.0
    atol = TOLERANCE[found.dtype] * max(size, 1.0)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


def draw_conv(random: Random, dtype: torch.dtype) -> MaskedConv:
    """A conv2d of few numbers, whose operands lie in memory in any way."""
    kernel = [random.choice((1, 1, 3, 3, 2, 4, 5)) for _ in "hw"]
    if random.random() < 0.5:
        kernel[1] = kernel[0]
    stride = [random.choice((1, 1, 1, 2, 2, 3, 4)) for _ in "hw"]
    dilation = [random.choice((1, 1, 1, 2, 3)) for _ in "hw"]
    padding = [random.choice((0, 0, 1, 1, 2, 3, 7)) for _ in "hw"]
    sides = []
    for k, p, d in zip(kernel, padding, dilation, strict=True):
        least = max(1, d * (k - 1) + 1 - 2 * p)
        sides.append(least + random.choice((0, 0, 1, 2, 3, 5, 8, 13)))
    images = random.choice((1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 19))
    groups = random.choice((1, 1, 1, 2, 3))
    # Many channels of small images, for the blocks into which kernels cut the channels.
    many = random.random() < 0.3 and sides[0] * sides[1] < 60
    channels = random.choice((40, 65, 100) if many else (1, 2, 3, 4, 7, 8, 12))
    filters = random.choice((1, 2, 3, 5, 8, 11, 40))
    generator = torch.Generator().manual_seed(random.randrange(2**31))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    geometry = Geometry(stride, padding, dilation, groups)
    x = draw(images, groups * channels, *sides)
    weight = draw(groups * filters, channels, *kernel)
    density = random.choice((0.0, 0.03, 0.1, 0.25, 0.5, 1.0))
    mask = torch.rand(weight.shape, generator=generator) < density
    mask[random.randrange(len(mask))] = False  # a filter that keeps nothing
    if density == 1 and random.random() < 0.5:
        mask = torch.ones_like(mask)
    out = F.conv2d(x.to("meta"), weight.to("meta"), None, *geometry)
    operands = (laid_out(each, random.choice(LAYOUTS)) for each in (x, weight, mask))
    bias = draw(len(weight), random.choice((1, 2)))[:, 0]
    y_gradient = laid_out(draw(*out.shape), random.choice(LAYOUTS))
    return MaskedConv(*operands, random.choice((None, bias)), y_gradient, geometry)


LAYOUTS = ("contiguous", "channels last", "cut out", "channels last, cut out", "transposed")


def laid_out(tensor: Tensor, kind: str) -> Tensor:
    """The same tensor, in memory as `kind` says."""
    if kind.startswith("channels last"):
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    if kind.endswith("cut out"):
        tensor = torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]]
    if kind == "transposed":
        tensor = tensor.transpose(0, 3).contiguous().transpose(0, 3)
    return tensor
