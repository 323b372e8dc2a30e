"""Mask schedules: at which steps the masks are recomputed from the weights.

A step is one training forward of the prepared model, counted from 0. Evaluation is not a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

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
        at: First step without an update. 0: the masks taken by `prepare` stay for good.
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

    @property
    def counts_steps(self) -> bool:
        """False when frozen from the start."""
        return self.at > 0
