"""conv2d with masked weights, of which training computes on a CPU only what the mask leaves.

All three passes can leave out what the mask does: forward and input gradient multiply with the
weights that are kept, and the weight gradient is computed for those alone where the method gives
none to the others. Each pass goes the way that is expected to be the faster one, through the
engine's kernels or as the dense convolution of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spre_fx import native_conv
from spre_fx.masked_weight import Product, masked_weight
from spre_fx.native_conv import Geometry, Kept
from spre_fx.operators import operator, register_gradient


class Pass(IntFlag):
    """The convolutions of a training step."""

    FORWARD = 1
    INPUT_GRADIENT = 2
    WEIGHT_GRADIENT = 4


@dataclass(frozen=True)
class _Cost:
    """What a pass of the engine's kernels takes, in tenths of a product of torch's dense pass.

    Whole numbers, which compilers can count with where sizes are symbols.

    Attributes:
        product: Of a product with a weight that the mask keeps.
        number: Of a number of the activations, which are brought into another layout and back.
        weight: Of a weight, kept or not: those that are kept are sorted in each call.
        call: Of a call.
    """

    product: int
    number: int
    weight: int = 400
    call: int = 5_000_000


# In the order of `Pass`. Fitted to the layers of ResNet-18 and ResNet-50 at 2:4, 1:4 and 1:16, on a
# CPU with AVX2.
_COSTS = (_Cost(14, 60), _Cost(14, 50), _Cost(16, 100))
_NEVER = -1


@dataclass(frozen=True)
class SparseCompute:
    """Lets a layer compute with the weights that its mask keeps.

    Attributes:
        geometry: Stride, padding, dilation and groups of the layer.
        density: The share of the weights that its masks keep, if not at all times.
        kept_gradient: Whether removed weights are given no gradient.
    """

    geometry: Geometry
    density: float
    kept_gradient: bool

    def most_kept(self, x: Tensor, weight: Tensor) -> list[int] | None:
        """Up to how many weights a mask may keep for a pass to be faster than the dense one.

        It depends on shapes alone, so that a training that is resumed computes what it did.

        Args:
            x: `(batch, C_in, H, W)`.
            weight: `(C_out, C_in/groups, kH, kW)`.

        Returns:
            A number for each `Pass`, negative for one that is always dense, as all of them are if
            that is the faster way with masks of this density. None where there are no kernels.
        """
        if not native_conv.takes(x, weight):
            return None
        _, filters, *size = native_conv.output_shape(x, weight, self.geometry)
        if x.shape[1] != weight.shape[1] * self.geometry.groups or min(size) <= 0:
            return None  # which torch refuses, in its own words
        if not weight.numel():
            return None
        images, together = len(x), native_conv.images_together(x.itemsize)
        taken = -(-images // together) * together  # the last of them empty
        pixels, numbers = prod(size), x[0].numel() + filters * prod(size)

        def most(cost: _Cost) -> int:
            once = cost.weight * weight.numel() + cost.call
            spared = 10 * images * pixels * weight.numel() - cost.number * taken * numbers - once
            return spared // (cost.product * taken * pixels) if spared > 0 else _NEVER

        found = [most(cost) for cost in _COSTS]
        if not self.kept_gradient:
            found[-1] = _NEVER
        return found if max(found) >= self.density * weight.numel() else [_NEVER] * len(found)


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    *,
    geometry: Geometry,
    most_kept: list[int],
    product: Product | None = None,
) -> Tensor:
    """conv2d(x; B * W).

    Args:
        x: `(batch, C_in, H, W)`.
        weight: W if there is a `product`, else B * W; `(C_out, C_in/groups, kH, kW)`.
        mask: B, of the same shape. Without a `product` numbers will do, and keep what is not 0.
        bias: `(C_out,)` or None.
        geometry: Stride, padding, dilation and groups.
        most_kept: For each `Pass`, up to how many weights the mask may keep for the pass to leave
            out the others. The weight gradient is then 0 where the mask is.
        product: The gradient that W is given; B * W is then made where a pass needs it and never
            stored. One with a decay wants the whole weight gradient: a limit below 0 for that pass.
    """
    how = (True, None) if product is None else (False, product.decay)
    y: Tensor = _masked_conv(x, weight, mask, bias, *geometry, most_kept, *how)
    return y


def sparse_passes(kept: Kept, most_kept: list[int]) -> Pass:
    """Which passes leave out what the mask does."""
    found = Pass(0)
    for each, most in zip(Pass, most_kept, strict=True):
        if kept.count <= most:
            found |= each
    return found


def _masked_conv_fake(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    _, _, *geometry, _, _, _ = others
    shape = native_conv.output_shape(x, weight, Geometry(*geometry))
    return x.new_empty(shape).to(memory_format=native_conv.memory_format(x))


@operator("masked_conv", fake=_masked_conv_fake)
def _masked_conv(  # noqa: PLR0917
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    most_kept: list[int],
    is_masked: bool,
    decay: float | None,  # noqa: ARG001  # of the gradient
) -> Tensor:
    geometry = Geometry(stride, padding, dilation, groups)
    kept = _kept_by(mask, most_kept)
    if Pass.FORWARD in sparse_passes(kept, most_kept) and (bias is None or bias.dtype == x.dtype):
        return native_conv.forward(x, weight, kept, bias, geometry)
    weight = weight if is_masked else masked_weight(weight, mask)
    return _like(F.conv2d(x, weight, bias, *geometry), x)


def _masked_conv_backward_fake(
    _gradient: Tensor, x: Tensor, weight: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    x_gradient, weight_gradient = (
        torch.empty_like(one, memory_format=native_conv.memory_format(one))
        if wanted
        else x.new_empty(0)
        for one, wanted in zip((x, weight), others[-1], strict=True)
    )
    return x_gradient, weight_gradient


@operator("masked_conv_backward", fake=_masked_conv_backward_fake)
def _masked_conv_backward(  # noqa: PLR0917
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    most_kept: list[int],
    is_masked: bool,
    decay: float | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    geometry = Geometry(stride, padding, dilation, groups)
    kept = _kept_by(mask, most_kept)
    sparse = sparse_passes(kept, most_kept)
    of_x, of_weight = wanted
    x_gradient, weight_gradient = x.new_empty(0), x.new_empty(0)
    if of_x and Pass.INPUT_GRADIENT in sparse:
        x_gradient, of_x = native_conv.input_gradient(gradient, x, weight, kept, geometry), False
    if of_weight and Pass.WEIGHT_GRADIENT in sparse:
        weight_gradient = native_conv.weight_gradient(gradient, x, kept, geometry)
        of_weight = False
    if of_x or of_weight:
        masked = weight if is_masked or not of_x else masked_weight(weight, mask)
        dense = _dense_backward(gradient, x, masked, geometry, [of_x, of_weight])
        x_gradient = x_gradient if dense[0] is None else _like(dense[0], x)
        if dense[1] is not None:
            weight_gradient = _like(dense[1], weight)
            if not is_masked:
                weight_gradient = Product(decay).gradient(weight_gradient, weight, mask)
    return x_gradient, _like(weight_gradient, weight) if wanted[1] else weight_gradient


def _kept_by(mask: Tensor, most_kept: list[int]) -> Kept:
    """What a mask keeps, counted if that can make any pass a sparse one."""
    return native_conv.kept_by(mask) if max(most_kept) >= 0 else Kept(mask, mask.numel())


def _like(result: Tensor, operand: Tensor) -> Tensor:
    """In the memory format in which kernels read an operand, as compilers are told."""
    return result.contiguous(memory_format=native_conv.memory_format(operand))


def _dense_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    stride, padding, dilation, groups = geometry
    transposed, output_padding = False, [0, 0]
    found = torch.ops.aten.convolution_backward(
        gradient,
        x,
        weight,
        None,
        stride,
        padding,
        dilation,
        transposed,
        output_padding,
        groups,
        [*wanted, False],
    )
    return found[0], found[1]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, weight, mask, _, *ctx.others = inputs
    ctx.save_for_backward(x, weight, mask)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mask = ctx.saved_tensors
    of_x, of_weight, _, of_bias = ctx.needs_input_grad[:4]
    wanted = [of_x, of_weight]
    if torch.is_grad_enabled():  # with create_graph=True autograd has to see what is computed
        *geometry, most_kept, is_masked, decay = ctx.others
        product = Product(decay)
        masked = weight if is_masked else product.of(weight, mask)
        found = of_x, of_masked = _dense_backward(gradient, x, masked, Geometry(*geometry), wanted)
        if of_masked is not None and not is_masked:
            found = of_x, product.gradient(of_masked, weight, mask)
        elif of_masked is not None and most_kept[-1] >= 0:
            found = of_x, of_masked * (mask != 0)
    else:
        found = _masked_conv_backward(gradient, x, weight, mask, *ctx.others, wanted)
    bias = gradient.sum((0, 2, 3)) if of_bias else None
    x_gradient, weight_gradient = (
        one if want else None for one, want in zip(found, wanted, strict=True)
    )
    return x_gradient, weight_gradient, None, bias, *(None,) * 7


register_gradient("masked_conv", _backward, _keep)
