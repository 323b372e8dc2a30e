"""Interleaved timing, and what is said of the times: medians, quartiles and paired ratios."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_PAUSE = 0.05  # seconds for the threads of the engine before to stop spinning
_LONG = 500.0  # milliseconds from which a call needs no untimed one before it


class Spread(NamedTuple):
    """The 10th percentile, lower quartile, median, upper quartile and 90th percentile."""

    p10: float
    low: float
    median: float
    high: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The percentiles of values, interpolated linearly."""
        return cls(*np.percentile(values, [10, 25, 50, 75, 90]).tolist())


def call(function: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def visit(function: Callable[[], Any], seconds: float) -> float:
    """Milliseconds of a call: the median of as many as fit into the seconds, and of one at least.

    An untimed call goes before them, which brings back caches and wakes threads; where one call is
    so long that neither shows, it is the only one.
    """
    first = call(function)
    if first >= _LONG:
        return first
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while not taken or time.perf_counter() < until:
        taken.append(call(function))
    return statistics.median(taken)


def interleave(
    functions: Mapping[str, Callable[[], Any]],
    *,
    seconds: float,
    rounds: int,
    visit_seconds: float = 0.1,
) -> dict[str, list[float]]:
    """Visit each function once a round, in an order that changes, until the seconds are over.

    Returns:
        Milliseconds of each round, by name; never of fewer than `rounds` rounds.
    """
    taken: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    until, done = time.perf_counter() + seconds, 0
    while done < rounds or time.perf_counter() < until:
        shuffle(order)
        for name in order:
            time.sleep(_PAUSE)
            taken[name].append(visit(functions[name], visit_seconds))
        done += 1
    return taken


def too_slow(
    milliseconds: Mapping[str, float], peers: Collection[str], *, rounds: int, limit: float
) -> dict[str, str]:
    """The peers to leave out, and why, so that the rounds end within `limit` seconds.

    The slowest goes first; the fastest, which is what ratios are to, always stays.
    """
    kept, reasons = dict(milliseconds), {}
    *slower, fastest = sorted(peers, key=milliseconds.__getitem__, reverse=True) or [""]
    for name in slower:
        total = rounds * sum(kept.values()) / 1e3
        if total <= limit:
            break
        reasons[name] = (
            f"a call takes {kept.pop(name) / 1e3:.1f} s, of {fastest} "
            f"{milliseconds[fastest] / 1e3:.1f} s; {rounds} rounds with both would take "
            f"{total:.0f} s, and --limit is {limit:.0f} s"
        )
    return reasons


def fastest(times: Mapping[str, Sequence[float]], peers: Collection[str]) -> str | None:
    """The peer with the least median, None without any peer."""
    measured = [name for name in times if name in peers]
    return min(measured, key=lambda name: statistics.median(times[name]), default=None)


def speedups(peer: Sequence[float], ours: Sequence[float]) -> list[float]:
    """How many times faster than the peer, round by round: slow seconds of a machine cancel out."""
    return [theirs / own for theirs, own in zip(peer, ours, strict=True)]
