"""Mask methods: how the N:M mask B is chosen, and what gradient the weights receive.

A method is a small frozen dataclass. It answers which weights to keep (`nm_mask`) and how a weight
is masked in the forward pass (`masked`), and names its default schedule and the starting value of
gamma of the SpRe branch's batch norm. A method whose mask is more than a function of the weight
(LBC's has parameters) says so in `mask_module`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spre_fx import masks
from spre_fx.errors import OptionError
from spre_fx.patterns import Pattern
from spre_fx.permutation import ChannelPermutation
from spre_fx.scheduled_mask import ScheduledMask
from spre_fx.schedules import EveryStep, Freeze, Schedule


class MaskMethod(ABC):
    """One way of training N:M weights. Subclass it, as a frozen dataclass, to add another.

    Attributes:
        schedule: The schedule followed when `prepare` is given none.
        spre_gamma: Starting value of gamma of `bn_spre` when `prepare` is given none. 1 trains the
            SpRe branch from the first step, as the paper does from scratch. 0 starts with the
            function of the main branch alone, which keeps what pre-trained weights compute; that
            is our deviation from the paper, which starts at random there too.
    """

    schedule: ClassVar[Schedule] = EveryStep()
    spre_gamma: ClassVar[float] = 1.0

    @property
    def permutation(self) -> ChannelPermutation | None:
        """How `prepare` looks for a better order of channels first. None: it does not."""
        return None

    def nm_mask(self, weight: Tensor, pattern: Pattern) -> Tensor:
        """The N:M mask B (Algorithm 1, line 3). By default the N largest magnitudes of each M.

        Args:
            weight: `(C_out, C_in/groups, *kernel)`, detached.
            pattern: The N:M pattern.

        Returns:
            A bool tensor of the shape of `weight`.
        """
        return masks.nm_mask(weight, pattern)

    def check(self, patterns: Collection[Pattern], schedule: Schedule) -> None:  # noqa: B027
        """Raise OptionError for a pattern or a schedule this method cannot work with."""

    def mask_module(self, weight: Tensor, pattern: Pattern, *, keep: bool) -> nn.Module:
        """The module `<site>.nm_mask`, called with the weight and the value of `signal`.

        Args:
            weight: `(C_out, C_in/groups, *kernel)`, detached.
            pattern: The N:M pattern.
            keep: Whether the mask outlives a step; if so it is taken from the weight now.
        """
        module = ScheduledMask(self.nm_mask, pattern)
        if keep:
            module.keep(weight)
        return module

    def signal(self, schedule: Schedule, step: Tensor) -> Tensor:
        """What the mask modules are told at `step`, a tensor of shape (). By default: is_update."""
        return schedule.is_update(step)

    @abstractmethod
    def masked(self, weight: Tensor, mask: Tensor) -> Tensor:
        """B * W, with the gradient this method gives to W.

        Args:
            weight: `(C_out, C_in/groups, *kernel)`, requiring a gradient or not.
            mask: B, of the same shape.
        """


class _StraightThroughDecay(torch.autograd.Function):
    """Forward B * W; backward passes the gradient g on as g + decay * (1 - B) * W."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        (gradient,) = gradients
        return torch.where(mask, gradient, gradient + ctx.decay * weight), None, None


@dataclass(frozen=True)
class SRSTE(MaskMethod):
    """SR-STE (Zhou et al., ICLR 2021): magnitude masks, straight-through gradient, sparse decay.

    All weights are updated: `dL/dW = dL/d(B * W) + decay * (1 - B) * W`.

    Attributes:
        decay: lambda, the pull of removed weights towards zero.

    Raises:
        OptionError: If decay is negative.
    """

    decay: float = 2e-4

    def __post_init__(self) -> None:
        if not 0 <= self.decay < math.inf:
            raise OptionError(f"SRSTE(decay={self.decay}): expected decay >= 0.")

    def masked(self, weight: Tensor, mask: Tensor) -> Tensor:
        """B * W; the gradient passes straight through, plus decay on removed weights."""
        masked: Tensor = _StraightThroughDecay.apply(weight, mask, self.decay)
        return masked


@dataclass(frozen=True)
class ASP(MaskMethod):
    """ASP (NVIDIA, 2020): magnitude masks taken once from pre-trained weights, then fine-tuning.

    Removed weights receive no gradient. The masks are those of the weights `prepare` is given, so
    load the pre-trained weights first.

    Attributes:
        permute: Search for the order of input channels that keeps the most magnitude under the
            masks (Pool & Yu, NeurIPS 2021) before taking them. The network computes what it did,
            and parameters keep their names and shapes, but not the order of their channels: a
            checkpoint of the dense model no longer belongs in the result.
    """

    permute: ChannelPermutation | None = None
    schedule: ClassVar[Schedule] = Freeze(at=0)
    spre_gamma: ClassVar[float] = 0.0

    @property
    def permutation(self) -> ChannelPermutation | None:
        """The search, if one is wanted."""
        return self.permute

    def masked(self, weight: Tensor, mask: Tensor) -> Tensor:
        """B * W, with the ordinary gradient B * g."""
        return weight * mask
