"""The picture of what run.py measured: benchmarks/accuracy.png."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import DENSE, Comparison, Results, Setting
from seed_statistics import Estimate, PairedDifference

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its pale yellow.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_OTHER = "#595959"
_DODGE = 0.09  # between arms, of the distance of two patterns
_DOTS = 0.24  # below the interval, of the distance of two lines


def draw(
    rows: Iterable[Mapping[str, Any]],
    arms: Sequence[str],
    comparisons: Sequence[Comparison],
    path: Path,
    *,
    task: str,
    pattern: str = "1:16",
) -> Figure:
    """Draw test accuracy over patterns, and paired differences from the baseline at one pattern.

    Args:
        rows: As results.jsonl has them.
        arms: Those drawn over patterns, seven at most; the dense network is a line in any case.
        comparisons: Those drawn at `pattern`, where they have pairs of runs.
        path: What to write, in the format of its suffix.
        task: Whose runs are drawn.
        pattern: Of the differences.

    Raises:
        ValueError: If there are too many arms to tell apart, or a panel has nothing to draw.
    """
    if len(arms) > len(_COLOURS):
        raise ValueError(f"expected {len(_COLOURS)} arms or fewer, found {len(arms)}: {arms}")
    results = Results(rows)
    settings = results.settings(task, "test")
    if not settings:
        raise ValueError(f"expected test runs of the task {task!r}, found {results.tasks()}")
    at = Setting(task, pattern, "test")
    compared = [c for c in comparisons if results.difference(at, c.arm, c.baseline).by_seed]
    if not compared:
        raise ValueError(f"expected pairs of test runs to compare, found none of {at}")
    height = max(4.6, 1.2 + 0.34 * len(_lines(compared)))
    # Legible at the width of a README.
    with rc_context({"font.size": 11, "axes.titlesize": "medium"}):
        figure = Figure(figsize=(10, height), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_accuracies(left, results, settings, arms)
        _draw_differences(right, results, at, compared, dict(zip(arms, _COLOURS, strict=False)))
        figure.savefig(path)
    return figure


def _draw_accuracies(
    ax: Axes, results: Results, settings: Sequence[Setting], arms: Sequence[str]
) -> None:
    """Mean and standard error of each arm at each pattern, side by side; dense as a line."""
    if results.of(settings[0], DENSE):
        dense = results.accuracy(settings[0], DENSE)
        ax.axhline(dense.mean, color=_OTHER, linewidth=1.2, linestyle="--")
        at_right = ax.get_yaxis_transform()
        ax.text(1, dense.mean, DENSE, transform=at_right, color=_OTHER, ha="right", va="bottom")
    for index, (arm, colour, marker) in enumerate(zip(arms, _COLOURS, _MARKERS, strict=False)):
        places = [place for place, at in enumerate(settings) if results.of(at, arm)]
        found = [results.accuracy(settings[place], arm) for place in places]
        ax.errorbar(
            [place + _DODGE * (index - (len(arms) - 1) / 2) for place in places],
            [estimate.mean for estimate in found],
            [estimate.standard_error or 0.0 for estimate in found],
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=0.6,
            elinewidth=1.8,
            label=arm if found else f"{arm}: no runs",
        )
    ax.set_title("Accuracy: mean ± standard error", loc="left")
    ax.set_xticks(range(len(settings)), [at.pattern for at in settings])
    ax.set_xlabel("pattern")
    ax.set_ylabel("test accuracy, %")
    ax.legend(frameon=False, loc="best", fontsize="small")
    ax.set_box_aspect(1)
    ax.set_anchor("N")
    _clean(ax, "y")


def _draw_differences(
    ax: Axes,
    results: Results,
    at: Setting,
    comparisons: Sequence[Comparison],
    colours: Mapping[str, str],
) -> None:
    """A line for each arm, grouped by baseline: a dot a seed, the mean, and its 95 % interval."""
    lines = _lines(comparisons)
    ax.axvline(0, color=_OTHER, linewidth=0.8)
    for place, line in enumerate(lines):
        if isinstance(line, Comparison):
            difference = results.difference(at, line.arm, line.baseline)
            _draw_difference(ax, place, difference, colours.get(line.arm, _OTHER))
    names = [line.arm if isinstance(line, Comparison) else line for line in lines]
    ax.set_yticks(range(len(lines)), names)
    for line, label in zip(lines, ax.get_yticklabels(), strict=True):
        label.set_fontweight("normal" if isinstance(line, Comparison) else "bold")
    ax.set_ylim(len(lines) - 0.5, -0.5)
    ax.set_title(f"Difference at {at.pattern}: mean, 95 % interval", loc="left")
    ax.set_xlabel("difference, points (a dot: a seed)")
    _clean(ax, "x")
    ax.tick_params(axis="y", length=0)


def _lines(comparisons: Sequence[Comparison]) -> list[Comparison | str]:
    """The comparisons, those with the same baseline below one heading."""
    groups: dict[str | None, list[Comparison | str]] = {}
    for comparison in comparisons:
        heading = f"against {comparison.baseline}"
        groups.setdefault(comparison.baseline, [heading]).append(comparison)
    return [line for group in groups.values() for line in group]


def _draw_difference(ax: Axes, place: int, difference: PairedDifference, colour: str) -> None:
    values = list(difference.by_seed.values())
    dots = [place + _DOTS] * len(values)
    ax.plot(values, dots, "o", color=colour, alpha=0.4, markersize=4.5, markeredgewidth=0)
    estimate = Estimate.of(values)
    if estimate.interval is not None:
        ax.plot(estimate.interval, [place] * 2, color=colour, linewidth=2.2)
        ax.plot(estimate.mean, place, "D", color=colour, markersize=6)


def _clean(ax: Axes, values: Literal["x", "y"]) -> None:
    """Nothing but the data, and faint lines to read values off."""
    ax.grid(axis=values, color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
