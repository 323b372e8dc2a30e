"""Options of the spatial mask of Eq. 8, and the module that follows those which need a memory.

The paper takes the taps where the unstructured mask B^U of this moment keeps more than N/M of the
weights. That choice starts from the noise of new weights and flickers; what is here steadies it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from spre_fx import masks
from spre_fx.errors import OptionError
from spre_fx.mask_ops import count_per_tap
from spre_fx.modules import inside_backward
from spre_fx.patterns import Pattern
from spre_fx.scheduled_mask import may_be_true
from spre_fx.schedules import CubicRamp
from spre_fx.weight_criteria import WeightCriterion

Taps = Literal["spre", "same", "inverse", "random"]


@dataclass(frozen=True)
class SpRe:
    """The SpRe branch and how it is masked: `prepare(branch=SpRe(...))`. By default the paper's.

    Attributes:
        taps: Where B^S is B; it is 0 elsewhere. "spre": at the live taps (Eq. 8). "same": at all,
            "inverse": at those that are not live (Fig. 5 of Zhang et al., 2306.05612v3). "random":
            at as many as are live, the first in an order drawn once for each site.
        hysteresis: h: a tap comes alive where B^U keeps more than (1 + h) * N/M of its weights, and
            stays alive while it keeps more than (1 - h) * N/M.
        narrow: Start with all taps, and ask for a growing share of N/M, along this ramp, until at
            its end it is the whole and Eq. 8 holds.
        straight_through: Give every weight of W^S the gradient, so that a tap which comes alive
            brings weights that followed the training, and not ones left behind.

    Raises:
        OptionError: If an option is not one of those, or needs live taps where there are none.
    """

    taps: Taps = "spre"
    hysteresis: float = 0.0
    narrow: CubicRamp | None = None
    straight_through: bool = False

    def __post_init__(self) -> None:
        if self.taps not in get_args(Taps):
            raise OptionError(f"SpRe(taps={self.taps!r}): expected one of {list(get_args(Taps))}.")
        if not 0 <= self.hysteresis < math.inf:
            raise OptionError(f"SpRe(hysteresis={self.hysteresis}): expected a number >= 0.")
        if not isinstance(self.narrow, CubicRamp | None):
            raise OptionError(
                f"SpRe(narrow={self.narrow!r:.80}): expected a CubicRamp(start, end) in training "
                "forwards, or None."
            )
        if self.taps == "same" and (self.hysteresis or self.narrow):
            raise OptionError(
                f"{self}: expected another `taps`, or no hysteresis and narrow=None: with 'same' "
                "there are no taps to choose."
            )

    def needs_memory(self, criterion: object) -> bool:
        """Whether live taps depend on more than the weights of this moment."""
        options = self.hysteresis or self.narrow or self.taps == "random"
        return bool(options) or isinstance(criterion, WeightCriterion)


class SpatialMask(nn.Module):
    """Live taps that depend on earlier steps.

    Args:
        weight: `(C_out, C_in/groups, *kernel)`.
        pattern: The N:M pattern.
        options: Hysteresis, ramp and order of the taps.
        criterion: What B^U looks at; None: magnitudes.

    Attributes:
        mask: The live taps in force, bool of the shape of the kernel.
        step: Training forwards so far; calls, where code that is no graph calls a part of the model
            several times in a forward.
        memory: What the criterion remembers, of the shape of the weight; None: nothing.
        order: Of "random", the place of each tap in the order in which they come alive.
    """

    per_rank: ClassVar[tuple[str, ...]] = ("mask", "memory")
    mask: Tensor
    step: Tensor
    memory: Tensor | None
    order: Tensor | None

    def __init__(
        self, weight: Tensor, pattern: Pattern, options: SpRe, criterion: WeightCriterion | None
    ) -> None:
        super().__init__()
        self.pattern, self.options, self.criterion = pattern, options, criterion
        weight = weight.detach()
        taps = weight.shape[2:]
        order = torch.randperm(taps.numel()).view(taps).to(weight.device)
        self.register_buffer("order", order if options.taps == "random" else None)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=weight.device))
        self.register_buffer("memory", criterion.start(weight) if criterion else None)
        self.register_buffer("mask", weight.new_zeros(taps, dtype=torch.bool))
        self.mask = self._live(weight)

    def forward(self, weight: Tensor, update: Tensor | None) -> Tensor:
        """The live taps in force; in training, chosen anew first where `update` says so.

        A mask method's signal may be something else than a bool (LBC's is a share): that is an
        update.
        """
        if update is not None and self.training and not inside_backward():
            due = (
                update if update.dtype is torch.bool else torch.ones_like(update, dtype=torch.bool)
            )
            if may_be_true(due):
                self._update(weight.detach(), due)
            self.step.add_(1)
        return self.mask.clone()  # the next update writes into the buffer

    def _update(self, weight: Tensor, due: Tensor) -> None:
        if self.memory is not None and self.criterion is not None:
            advanced = self.criterion.advance(self.memory, weight)
            new = torch.where(self.step == 0, self.criterion.start(weight), advanced)
            self.memory.copy_(torch.where(due, new, self.memory))
        self.mask.copy_(torch.where(due, self._live(weight), self.mask))

    def _live(self, weight: Tensor) -> Tensor:
        """The condition of Eq. 8, with the options in the place of N/M; exact without them."""
        scores = weight
        if self.memory is not None and self.criterion is not None:
            scores = self.criterion.scores(self.memory, weight)
        kept = count_per_tap(masks.unstructured_mask(scores, self.pattern))
        share = 1 + self.options.hysteresis * (1 - 2 * self.mask.double())
        if self.options.narrow is not None:
            share = share * (1 - self.options.narrow.left(self.step))
        live = kept * self.pattern.m > share * (self.pattern.n * weight.shape[:2].numel())
        return live if self.order is None else self.order < live.sum()

    def extra_repr(self) -> str:
        """The options."""
        return f"{self.options}, criterion={self.criterion}"
