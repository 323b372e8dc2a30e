"""Which N:M pattern the zeros of a weight were made for, if any.

Every weight with zeros obeys some pattern, such as 30:32. One counts as made on purpose only if
chance would not give it: an unstructured weight with as many zeros obeys N:M with the probability

    P = P(Binomial(M, p) <= N) ^ groups,    p = the fraction of weights that are not zero

as if each were zero independently. That refuses what is all zeros, what is tiny, and what was
pruned without a pattern, however much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import comb, prod

from torch import Tensor

from spre_fx.patterns import Pattern

_SIZES = (2, 4, 8, 16, 32)
LIMIT = 1e-6  # beyond doubt, in a model with a thousand layers
LIMIT_IF_KNOWN = 0.05  # for a pattern that other layers of the model have beyond doubt


@dataclass(frozen=True)
class FoundPattern:
    """A pattern that a weight obeys.

    Attributes:
        pattern: N:M, N the largest number of values in any group.
        chance: The probability that an unstructured weight with as many zeros obeys it.
    """

    pattern: Pattern
    chance: float


def obeyed_patterns(weight: Tensor) -> list[FoundPattern]:
    """The patterns a weight obeys with M of 2, 4, 8, 16 or 32, the likeliest intent first.

    First those whose N is a power of two, as the paper's 2:4, 1:4, 1:8 and 1:16 are, then the rest;
    among them the sparsest first, and of two as sparse the one with the smaller M, which says more.

    Args:
        weight: `(C_out, C_in/groups, *kernel)`. M may be at most C_in/groups.
    """
    found = []
    for m in _SIZES:
        if m <= weight.shape[1]:
            n = largest_count(weight, m)
            if n < m:
                pattern = Pattern(max(n, 1), m)
                found.append(FoundPattern(pattern, chance(weight, pattern)))
    return sorted(found, key=lambda each: _order(each.pattern))


def _order(pattern: Pattern) -> tuple[bool, float, int]:
    power_of_two = pattern.n & (pattern.n - 1) == 0
    return not power_of_two, pattern.density, pattern.m


def largest_count(weight: Tensor, m: int) -> int:
    """The most values that any M consecutive input channels of one filter at one tap hold."""
    live = (weight.detach() != 0).flatten(2) if weight.ndim > 2 else weight.detach() != 0
    whole = weight.shape[1] // m * m
    groups = [live[:, :whole].unflatten(1, (-1, m)).sum(2), live[:, whole:].sum(1)]
    return max(int(counts.max()) for counts in groups if counts.numel())


def chance(weight: Tensor, pattern: Pattern) -> float:
    """The probability that a weight with as many zeros, wherever they fall, obeys `pattern`."""
    p = int(weight.count_nonzero()) / weight.numel()
    groups = weight.shape[0] * prod(weight.shape[2:]) * (weight.shape[1] // pattern.m)
    obeys = sum(
        comb(pattern.m, k) * p**k * (1 - p) ** (pattern.m - k) for k in range(pattern.n + 1)
    )
    return math.exp(groups * math.log(obeys)) if 0 < obeys < 1 else float(obeys > 0)
