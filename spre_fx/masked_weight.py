"""B * W and its gradients, on a CPU in one pass over the weight each way.

`torch.compile` does not see into these operators: the code that it makes of bool masks for a CPU
takes several times as long as a pass over them of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spre_fx import native_masks
from spre_fx.operators import operator, register_gradient, register_product


def masked_weight(weight: Tensor, mask: Tensor) -> Tensor:
    """B * W, with the ordinary gradient B * g.

    Args:
        weight: W, `(C_out, C_in/groups, *kernel)`.
        mask: B, of the same shape. If it is not bool, as that of LBC, it has a gradient too.
    """
    if weight.is_cpu and mask.dtype == torch.bool:
        masked: Tensor = _mask_weight(weight, mask)
        return masked
    return weight * mask


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


def _save_mask_and_decay(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, _, mask, ctx.decay = inputs
    ctx.save_for_backward(mask)


def _decay_gradient_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
    (mask,) = ctx.saved_tensors
    return gradient, torch.where(mask, 0.0, ctx.decay * gradient), None, None


register_product("mask_weight")
register_gradient("decay_gradient", _decay_gradient_gradient, _save_mask_and_decay)
