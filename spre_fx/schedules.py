"""Mask schedules: at which steps the masks are recomputed from the weights.

A step is one training forward of the prepared model, counted from 0. Evaluation is not a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spre_fx.errors import OptionError


class Schedule(ABC):
    """Answers one question: is this an update step?"""

    @abstractmethod
    def is_update(self, step: Tensor) -> Tensor:
        """Whether masks are recomputed at `step`.

        Args:
            step: The step, an int64 tensor of shape (). A tensor, so that a compiled model asks
                again at every step without being compiled again.

        Returns:
            A bool tensor of shape ().
        """

    @property
    def keeps_masks(self) -> bool:
        """Whether a mask outlives the step that made it, and so belongs in the `state_dict`."""
        return True

    @property
    def counts_steps(self) -> bool:
        """Whether the answer depends on the step at all."""
        return True


@dataclass(frozen=True)
class EveryStep(Schedule):
    """Recompute at every training forward. Masks are a pure function of the weights: no state."""

    def is_update(self, step: Tensor) -> Tensor:
        """True at every step."""
        return step >= 0

    @property
    def keeps_masks(self) -> bool:
        """False: a mask can always be made again from the weights."""
        return False

    @property
    def counts_steps(self) -> bool:
        """False: the answer is the same at every step."""
        return False


@dataclass(frozen=True)
class EveryK(Schedule):
    """Recompute at steps 0, k, 2k, ...

    Attributes:
        k: Training forwards from one update to the next, at least 1.

    Raises:
        OptionError: If k < 1.
    """

    k: int

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise OptionError(f"EveryK(k={self.k}): expected k >= 1 training forwards.")

    def is_update(self, step: Tensor) -> Tensor:
        """True at multiples of k."""
        return step % self.k == 0


@dataclass(frozen=True)
class Freeze(Schedule):
    """Follow another schedule, then never recompute again from step `at` on.

    Attributes:
        at: First step without an update. 0: as 1, the masks of the first training step stay for
            good.
        before: The schedule followed until then.

    Raises:
        OptionError: If at < 0.
    """

    at: int
    before: Schedule = field(default_factory=EveryStep)

    def __post_init__(self) -> None:
        if not isinstance(self.at, int) or self.at < 0:
            raise OptionError(f"Freeze(at={self.at}): expected a step >= 0.")

    def is_update(self, step: Tensor) -> Tensor:
        """What `before` says until step `at`, False from there on."""
        return self.before.is_update(step) & (step < self.at)


@dataclass(frozen=True)
class CubicRamp(Schedule):
    """Remove more and more from step `start` to step `end`, fast at first, along a cubic curve.

    Eq. 1 of Zhu & Gupta, 2017: `s_t = s_f + (s_i - s_f) * (1 - (t - start) / (end - start))^3`.
    Used by LBC, GMP and GraNet, which ask it how much is gone; another mask method follows it as
    any schedule, and recomputes its masks at the update steps.

    Attributes:
        start: First update step (t_i of LBC).
        end: Last update step (t_f of LBC): from there on the final sparsity holds.
        every: Training forwards from one update to the next.

    Raises:
        OptionError: Unless 0 <= start < end and every >= 1.
    """

    start: int
    end: int
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise OptionError(
                f"CubicRamp(start={self.start}, end={self.end}): expected 0 <= start < end."
            )
        if self.every < 1:
            raise OptionError(f"CubicRamp(every={self.every}): expected every >= 1 forwards.")

    def is_update(self, step: Tensor) -> Tensor:
        """True every `every` steps from `start` on, and at `end`."""
        on_beat = ((step - self.start) % self.every == 0) | (step == self.end)
        return on_beat & (step >= self.start) & (step <= self.end)

    def left(self, step: Tensor) -> Tensor:
        """The share of what is to be removed that is still there, float64: 1 at start, 0 at end."""
        progress = (step - self.start).to(torch.float64) / (self.end - self.start)
        return (1 - progress.clamp(0, 1)) ** 3

    def sparsity(self, step: Tensor, final: float, initial: float = 0.0) -> Tensor:
        """Fraction of zeros at `step`, on the way from `initial` to `final`."""
        return final + (initial - final) * self.left(step)
