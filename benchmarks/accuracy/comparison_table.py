"""The table of the arms at one pattern, and the notes below it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median

from results import Comparison, Results, Setting
from seed_statistics import Estimate, PairedDifference
from tabulate import tabulate

NOTHING = "-"
TARGET = 0.5  # points: the standard error at which a true difference of 1 begins to show
HOLM = "p (Holm)"
SEEDS = f"seeds for ± {TARGET}"


def table(
    results: Results,
    setting: Setting,
    comparisons: Sequence[Comparison],
    corrected_ps: Mapping[tuple[Setting, Comparison], float],
) -> str:
    """A row for each arm that has runs; a column in which no row tells anything is not shown.

    Args:
        results: All runs.
        setting: Task, pattern and split of those in the table.
        comparisons: In the order of the rows.
        corrected_ps: p of differences from the baseline, corrected for their number; where there
            is none, p is not shown either.
    """
    cells = [
        _cells(results, setting, comparison, corrected_ps.get((setting, comparison)))
        for comparison in comparisons
        if results.of(setting, comparison.arm)
    ]
    told = {name for line in cells for name, cell in line.items() if cell != NOTHING}
    lines = [{name: cell for name, cell in line.items() if name in told} for line in cells]
    return tabulate(lines, "keys", "github", disable_numparse=True)


def _cells(
    results: Results, setting: Setting, comparison: Comparison, corrected_p: float | None
) -> dict[str, str]:
    """A row by column."""
    arm = comparison.arm
    runs = results.of(setting, arm).values()
    difference = results.difference(setting, arm, comparison.baseline)
    control = results.difference(setting, arm, comparison.control)
    return {
        "arm": arm,
        "accuracy, %": _accuracy(results.accuracy(setting, arm)),
        "seeds": str(len(runs)),
        "epochs": _range(run.epochs for run in runs),
        "seconds a run": f"{median(run.seconds for run in runs):.1f}",
        "baseline": comparison.baseline or NOTHING,
        "difference": _difference(difference),
        **_tested(difference.estimate, corrected_p),
        "control": comparison.control or NOTHING,
        "difference from the control": _difference(control),
    }


def _accuracy(estimate: Estimate) -> str:
    error = NOTHING if estimate.standard_error is None else f"{estimate.standard_error:.2f}"
    return f"{estimate.mean:.2f} ± {error}"


def _difference(difference: PairedDifference) -> str:
    estimate = difference.estimate
    if estimate is None:
        return NOTHING
    interval = NOTHING
    if estimate.interval is not None:
        interval = ", ".join(map(_signed, estimate.interval))
    return f"{_signed(estimate.mean)} [{interval}] ({difference.wins}/{estimate.n})"


def _signed(points: float) -> str:
    """Two digits; what rounds to 0 has no sign."""
    return f"{points:+.2f}" if round(points, 2) else "0.00"


def _tested(estimate: Estimate | None, corrected_p: float | None) -> dict[str, str]:
    if estimate is None or estimate.p is None or corrected_p is None:
        return dict.fromkeys(("p", HOLM, SEEDS), NOTHING)
    return {
        "p": _p(estimate.p),
        HOLM: _p(corrected_p),
        SEEDS: str(estimate.seeds_for(TARGET)),
    }


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _range(values: Iterable[float]) -> str:
    found = set(values)
    low, high = min(found), max(found)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def notes(results: Results, setting: Setting, comparisons: Sequence[Comparison]) -> list[str]:
    """What the table does not show: arms without runs, seeds left out or used before, versions."""
    shown = [c for c in comparisons if results.of(setting, c.arm)]
    absent = [c.arm for c in comparisons if c not in shown]
    found: dict[str, list[str]] = defaultdict(list)  # reason -> what it holds for
    for comparison in shown:
        for other in comparison.arms[1:]:
            for reason in _pair_notes(results, setting, comparison.arm, other):
                found[reason].append(f"{comparison.arm} - {other}")
        for reason in _seed_notes(results, setting, comparison.arm):
            found[reason].append(comparison.arm)
    lines = [f"No runs: {'; '.join(absent)}"] if absent else []
    return lines + [f"{reason}: {'; '.join(dict.fromkeys(w))}" for reason, w in found.items()]


def _pair_notes(results: Results, setting: Setting, arm: str, other: str) -> list[str]:
    first, second = results.of(setting, arm), results.of(setting, other)
    if not second:
        return [f"No runs of {other} to compare with"]
    difference = results.difference(setting, arm, other)
    mixed = [s for s in difference.by_seed if first[s].versions != second[s].versions]
    reasons = {
        "Left out, with a run of one arm only": difference.unpaired,
        "Compared across versions": mixed,
    }
    return [f"{reason}, {named(seeds)}" for reason, seeds in reasons.items() if seeds]


def _seed_notes(results: Results, setting: Setting, arm: str) -> list[str]:
    """Test seeds on which choices may have been made already."""
    if setting.split != "test":
        return []
    searched = results.of(replace(setting, split="validation"), arm)
    again = [seed for seed in results.of(setting, arm) if seed in searched]
    return [f"Not fresh, with validation runs too, {named(again)}"] if again else []


def named(seeds: Sequence[int]) -> str:
    """How many seeds, and which."""
    return f"{len(seeds)} seed{'s' * (len(seeds) != 1)} ({', '.join(map(str, seeds))})"
