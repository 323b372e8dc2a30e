"""Masks as modules: what makes a mask while its layer runs, and keeps it where it must be kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from spre_fx import masks
from spre_fx.operators import operator
from spre_fx.patterns import Pattern


class ScheduledMask(nn.Module):
    """A tensor made from a weight: anew at each call, or kept in a buffer between updates.

    The N:M mask B and the live taps of Eq. 8 are such tensors.

    In evaluation a kept N:M mask is held to its pattern: of the weights it keeps, the N largest of
    each M. That changes no mask that was made here, but an average of masks over time (an
    `AveragedModel` with `use_buffers=True`) keeps what any of them did.

    Args:
        compute: Makes the mask of a weight `(C_out, C_in/groups, *kernel)` and a pattern.
        pattern: The N:M pattern.

    Attributes:
        mask: The mask in force, in the `state_dict`; None where it is made anew at each call.
    """

    per_rank: ClassVar[tuple[str, ...]] = ("mask",)
    mask: Tensor | None

    def __init__(self, compute: Callable[[Tensor, Pattern], Tensor], pattern: Pattern) -> None:
        super().__init__()
        self.compute = compute
        self.pattern = pattern
        self.register_buffer("mask", None)

    def keep(self, weight: Tensor) -> None:
        """Make the mask of `weight` now, and keep it until the next update."""
        self.mask = self.compute(weight.detach(), self.pattern)

    def forward(self, weight: Tensor, update: Tensor | None) -> Tensor:
        """The mask in force; in training, recomputed first where `update` says so."""
        weight = weight.detach()
        if self.mask is None:
            return self.compute(weight, self.pattern)
        if not self.training and self.mask.shape == weight.shape:
            return self._within_pattern(weight, self.mask)
        if update is None:
            return self.mask
        if self.training and may_be_true(update):
            updated: Tensor = _update(self.mask, self.compute(weight, self.pattern), update)
            return updated
        # The next update writes into the buffer while autograd may still hold what is returned.
        return self.mask.clone()

    def _within_pattern(self, weight: Tensor, mask: Tensor) -> Tensor:
        """The N largest of the weights kept; one that is 0 comes before those that are not kept."""
        nearly_zero = torch.finfo(weight.dtype).tiny
        kept = torch.where(mask, weight.masked_fill(weight == 0, nearly_zero), 0.0)
        return masks.nm_mask(kept, self.pattern) & mask


def _like_mask(mask: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(mask)


@operator("update_mask", fake=_like_mask, changes=("mask",))
def _update(mask: Tensor, new: Tensor, update: Tensor) -> Tensor:
    """Make a mask a new one if `update`, of shape (), is True; what it then is, as a new tensor.

    An operator, because compilers for CPUs copy bools one by one.
    """
    return mask.copy_(torch.where(update, new, mask)).clone()


def may_be_true(update: Tensor) -> bool:
    """False where the value is known at no cost to be False: in eager mode on the CPU."""
    return torch.compiler.is_compiling() or update.device.type != "cpu" or bool(update)


class KeptMask(nn.Module):
    """A mask that is updated from outside, by a node that looks at all layers at once.

    Args:
        weight: `(C_out, C_in/groups, *kernel)`.

    Attributes:
        mask: The mask in force, bool, all ones at first.
    """

    per_rank: ClassVar[tuple[str, ...]] = ("mask",)
    mask: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))

    def forward(self, weight: Tensor, mask: Tensor | None) -> Tensor:  # noqa: ARG002
        """The mask that comes along the edge of the graph; without one, that in force."""
        return self.mask if mask is None else mask
