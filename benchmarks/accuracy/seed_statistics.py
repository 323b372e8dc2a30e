"""What few seeds tell: of one arm, of the difference of two arms, and of many such differences.

Runs of two arms with the same seed start from the same weights and see the same batches. They are
compared in pairs, in which what the seed does to both cancels out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and how well it is known.

    Attributes:
        n: How many values.
        mean: Their mean.
        standard_error: Of the mean; None for a single value, which has no spread.
    """

    n: int
    mean: float
    standard_error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The estimate from independent values.

        Raises:
            ValueError: If there is none.
        """
        if not values:
            raise ValueError("expected the values of one seed or more, found none")
        n = len(values)
        error = statistics.stdev(values) / math.sqrt(n) if n > 1 else None
        return cls(n, statistics.fmean(values), error)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval by Student's t; None for a single value."""
        if self.standard_error is None:
            return None
        half = student_t.ppf((1 + CONFIDENCE) / 2, self.n - 1) * self.standard_error
        return float(self.mean - half), float(self.mean + half)

    @property
    def p(self) -> float | None:
        """Of the two-sided t-test that the true mean is 0; None for a single value.

        Of paired differences this is the paired t-test. Values that are all the same leave the test
        undefined only if they are 0, which is no evidence: p is then 1.
        """
        if self.standard_error is None:
            return None
        if self.standard_error == 0:
            return 0.0 if self.mean else 1.0
        return float(2 * student_t.sf(abs(self.mean) / self.standard_error, self.n - 1))

    def seeds_for(self, standard_error: float) -> int | None:
        """The seeds that bring the standard error down to this; None for a single value.

        Raises:
            ValueError: If `standard_error` is not positive.
        """
        if standard_error <= 0:
            raise ValueError(f"expected a standard error above 0, found {standard_error}")
        if self.standard_error is None:
            return None
        seeds = self.n * (self.standard_error / standard_error) ** 2
        return max(2, math.ceil(round(seeds, 9)))  # 16.000000000000004 are 16


@dataclass(frozen=True)
class PairedDifference:
    """An arm minus another, by seed.

    Attributes:
        by_seed: Seed -> difference, in the order of the seeds.
        unpaired: Seeds that only one of the two has; they are left out.
    """

    by_seed: Mapping[int, float]
    unpaired: tuple[int, ...]

    @classmethod
    def of(cls, arm: Mapping[int, float], other: Mapping[int, float]) -> PairedDifference:
        """`arm` minus `other`, each seed -> value, over the seeds that both have."""
        by_seed = {seed: arm[seed] - other[seed] for seed in sorted(arm.keys() & other.keys())}
        return cls(by_seed, tuple(sorted(arm.keys() ^ other.keys())))

    @property
    def estimate(self) -> Estimate | None:
        """Of the mean difference; None without a pair."""
        return Estimate.of(list(self.by_seed.values())) if self.by_seed else None

    @property
    def wins(self) -> int:
        """Pairs in which the arm is above the other; a tie is no win."""
        return sum(difference > 0 for difference in self.by_seed.values())


def holm(ps: Sequence[float]) -> list[float]:
    """The p-values of a family of comparisons, corrected for how many there are.

    The step-down method of Holm (1979): rejecting where the corrected p is below 0.05 is wrong
    anywhere in the family with a probability below 0.05, however the comparisons depend on each
    other.
    """
    corrected = [0.0] * len(ps)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = largest
    return corrected
