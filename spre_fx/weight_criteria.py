"""Criteria for the unstructured mask B^U of Eq. 8 that look at weights over time.

Eq. 8 takes the magnitudes of this moment. Of new weights those are noise, and between steps they
cross the threshold back and forth, so the live taps flicker. These criteria remember something of
each weight, and need no gradient: taps update themselves as those by magnitude do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from spre_fx.errors import OptionError


class WeightCriterion(ABC):
    """Scores weights by what they are and were. Subclass it, as a frozen dataclass, to add another.

    All tensors have the shape of the weight, `(C_out, C_in/groups, *kernel)`; weights come
    detached.
    """

    @abstractmethod
    def start(self, weight: Tensor) -> Tensor:
        """What is remembered of the weights of the first training forward."""

    @abstractmethod
    def advance(self, memory: Tensor, weight: Tensor) -> Tensor:
        """What is remembered after an update."""

    @abstractmethod
    def scores(self, memory: Tensor, weight: Tensor) -> Tensor:
        """The score of each weight, after `advance`. B^U keeps the largest magnitudes of it."""


@dataclass(frozen=True)
class RunningMean(WeightCriterion):
    """Exponential running mean of |w| over the updates: |w| without its flicker.

    Attributes:
        decay: Share of the mean that an update leaves as it was; 0.99 looks back over about 100.

    Raises:
        OptionError: Unless 0 <= decay < 1.
    """

    decay: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise OptionError(f"RunningMean(decay={self.decay}): expected 0 <= decay < 1.")

    def start(self, weight: Tensor) -> Tensor:
        """|w|."""
        return weight.abs()

    def advance(self, memory: Tensor, weight: Tensor) -> Tensor:
        """The mean, moved towards |w|."""
        return memory.lerp(weight.abs(), 1 - self.decay)

    def scores(self, memory: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG002
        """The mean."""
        return memory


@dataclass(frozen=True)
class Change(WeightCriterion):
    """|w - w_0|, how far training has moved a weight: |w| without the noise it started from.

    w_0 are the weights of the first training forward. In it nothing has moved, and equal scores go
    by index, which spreads B^U evenly: at most one tap is live.
    """

    def start(self, weight: Tensor) -> Tensor:
        """The first weights."""
        return weight.clone()

    def advance(self, memory: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG002
        """They stay."""
        return memory

    def scores(self, memory: Tensor, weight: Tensor) -> Tensor:
        """The difference."""
        return weight - memory
