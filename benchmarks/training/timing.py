"""Steps in turn, and what is said of their times: quartiles and paired ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np


def interleave(
    functions: Mapping[str, Callable[[], float]], rounds: Iterable[int]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Call each function once a round, each round beginning with the next one.

    Args:
        functions: Each returns the milliseconds it took. The others go on without one that raises.
        rounds: The numbers of the rounds.

    Returns:
        The milliseconds of every round, by name, and why the others have none.
    """
    taken: dict[str, list[float]] = {name: [] for name in functions}
    failed: dict[str, str] = {}
    for number in rounds:
        for name in rotated(list(taken), number):
            try:
                taken[name].append(functions[name]())
            except Exception as error:  # whatever a kernel or a compiler raises
                failed[name] = said(error)
                del taken[name]
    return taken, failed


def rotated(names: list[str], by: int) -> list[str]:
    """The names, from another one on."""
    start = by % max(len(names), 1)
    return names[start:] + names[:start]


def said(error: Exception) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def ratios(times: Sequence[float], dense: Sequence[float]) -> list[float]:
    """How many times as long as dense, round by round: slow seconds of a machine cancel out."""
    return [own / theirs for own, theirs in zip(times, dense, strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return low, median, high
