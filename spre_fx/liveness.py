"""Where activations lie in one block of memory: those that are alive at one time do not overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


@dataclass(frozen=True)
class Lifetime:
    """How much memory something needs, and when.

    Attributes:
        size: Bytes.
        first: The step that writes it.
        last: The last step that reads or writes it.
    """

    size: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Whether both are alive at some step."""
        return self.first <= other.last and other.first <= self.last


def assign_offsets(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
    """Offsets such that no two that meet overlap, and the bytes that all need together.

    Greedy by size: the largest first, each into the smallest gap that holds it, among those placed
    that it meets, or behind them.

    Args:
        lifetimes: In any order.

    Returns:
        An offset for each, in bytes and aligned, and the end of the last.
    """
    offsets = [0] * len(lifetimes)
    placed: list[int] = []
    for index in sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].size, i)):
        own = lifetimes[index]
        taken = sorted(
            (offsets[other], offsets[other] + _aligned(lifetimes[other].size))
            for other in placed
            if own.meets(lifetimes[other])
        )
        offsets[index] = _best_fit(taken, _aligned(own.size))
        placed.append(index)
    ends = (offset + _aligned(each.size) for offset, each in zip(offsets, lifetimes, strict=True))
    return offsets, max(ends, default=0)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _best_fit(taken: list[tuple[int, int]], size: int) -> int:
    """The start of the smallest gap of `size` bytes or more; where there is none, the end."""
    end, gaps = 0, []
    for start, stop in taken:
        if start - end >= size:
            gaps.append((start - end, end))
        end = max(end, stop)
    return min(gaps)[1] if gaps else end
