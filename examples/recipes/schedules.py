"""Learning rates by step, as factors of the peak."""

from __future__ import annotations

import math
from collections.abc import Sequence


def warmup_cosine(step: int, warmup: int, steps: int, floor: float = 0.0) -> float:
    """A linear rise over `warmup` steps, then half a cosine down to `floor` at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def warmup_steps(
    step: int, warmup: int, milestones: Sequence[int], gamma: float = 0.1, start: float = 0.0
) -> float:
    """A linear rise from `start` over `warmup` steps; from each milestone on, `gamma` times less.

    Both are in steps.
    """
    rise = 1.0 if step >= warmup else start + (1 - start) * (step + 1) / warmup
    return rise * gamma ** sum(step >= milestone for milestone in milestones)
