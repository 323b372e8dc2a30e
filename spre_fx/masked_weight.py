"""B * W and its gradients, on a CPU in one pass over the weight each way.

`torch.compile` does not see into these operators: the code that it makes of bool masks for a CPU
takes several times as long as a pass over them of their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spre_fx import native_masks
from spre_fx.operators import operator, register_gradient, register_product


class Product(NamedTuple):
    """B * W with a gradient of W that a conv can make itself, and so without storing B * W.

    Attributes:
        decay: lambda of the gradient g + lambda * (1 - B) * W, where g = dL/d(B * W) is passed
            straight through. None: the ordinary gradient, B * g.
    """

    decay: float | None = None

    def of(self, weight: Tensor, mask: Tensor) -> Tensor:
        """B * W.

        Args:
            weight: W, `(C_out, C_in/groups, *kernel)`.
            mask: B, of the same shape. If it is of numbers they get a gradient where the product's
                is the ordinary one.
        """
        if self.decay is None:
            return masked_weight(weight, mask)
        masked: Tensor = StraightThroughDecay.apply(weight, mask, self.decay)
        return masked

    def gradient(self, gradient: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        """The gradient of W, made in the place of g unless autograd has to see how."""
        if self.decay == 0:
            return gradient
        in_place = not torch.is_grad_enabled()
        if self.decay is None:
            found = native_masks.mask_weight(gradient, mask, in_place=True) if in_place else None
            return gradient * mask if found is None else found
        operands = (gradient, weight, mask, self.decay)
        found = native_masks.decay_gradient(*operands, in_place=True) if in_place else None
        return _decayed(*operands) if found is None else found


def masked_weight(weight: Tensor, mask: Tensor) -> Tensor:
    """B * W, with the ordinary gradient B * g.

    Args:
        weight: W, `(C_out, C_in/groups, *kernel)`.
        mask: B, of the same shape. If it is of numbers, as that of LBC, it has a gradient too:
            W * g where it is not 0, and none elsewhere.
    """
    masked: Tensor
    if mask.dtype != torch.bool:
        masked = _ProductOfNumbers.apply(weight, mask)
    elif weight.is_cpu:
        masked = _mask_weight(weight, mask)
    else:
        masked = weight * mask
    return masked


class _ProductOfNumbers(torch.autograd.Function):
    """B * W of a mask of numbers."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        weight, mask = ctx.saved_tensors
        # With create_graph=True autograd has to see what is computed.
        by_operator = weight.is_cpu and not torch.is_grad_enabled()
        gradients_of = _product_gradients if by_operator else _products
        of_weight, of_mask = gradients_of(gradients[0], weight, mask)
        return of_weight, of_mask


class StraightThroughDecay(torch.autograd.Function):
    """Forward B * W; backward passes the gradient g on as g + decay * (1 - B) * W."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float | Tensor) -> Tensor:
        """B * W; decay is a number, or a tensor of shape ()."""
        is_tensor = isinstance(decay, Tensor)
        ctx.save_for_backward(weight, mask, *([decay] if is_tensor else []))
        ctx.decay = None if is_tensor else decay
        return masked_weight(weight, mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of W."""
        weight, mask, *scaled = ctx.saved_tensors
        (gradient,) = gradients
        if ctx.decay == 0:
            return gradient, None, None
        if weight.is_cpu and not scaled:
            return _decay_gradient(gradient, weight, mask, ctx.decay), None, None
        return _decayed(gradient, weight, mask, scaled[0] if scaled else ctx.decay), None, None


def _decayed(gradient: Tensor, weight: Tensor, mask: Tensor, decay: float | Tensor) -> Tensor:
    return torch.where(mask, gradient, gradient + decay * weight)


@operator("mask_weight", fake=torch.mul)
def _mask_weight(weight: Tensor, mask: Tensor) -> Tensor:
    masked = native_masks.mask_weight(weight, mask)
    return weight * mask if masked is None else masked


@operator("decay_gradient", fake=_decayed)
def _decay_gradient(gradient: Tensor, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
    decayed = native_masks.decay_gradient(gradient, weight, mask, decay)
    return _decayed(gradient, weight, mask, decay) if decayed is None else decayed


def _products(gradient: Tensor, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return gradient * mask, torch.where(mask != 0, gradient * weight, 0.0)


@operator("product_gradients", fake=_products)
def _product_gradients(gradient: Tensor, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    found = native_masks.product_gradients(gradient, weight, mask)
    return _products(gradient, weight, mask) if found is None else found


def _save_mask_and_decay(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, _, mask, ctx.decay = inputs
    ctx.save_for_backward(mask)


def _decay_gradient_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
    (mask,) = ctx.saved_tensors
    return gradient, torch.where(mask, 0.0, ctx.decay * gradient), None, None


register_product("mask_weight")
register_gradient("decay_gradient", _decay_gradient_gradient, _save_mask_and_decay)
