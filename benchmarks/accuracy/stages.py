"""Which runs there are to make, and which of them are compared."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arms import (
    ARMS,
    BRANCHED,
    CONTROLS,
    DENSE,
    METHODS,
    PATTERNS,
    PLAIN,
    REMEDIES,
    UNSTRUCTURED,
    Arm,
)
from results import Comparison
from trainings import Job, Recipe

STEEP = "1:16"
_SR_STE = (DENSE, PLAIN["SR-STE"], *BRANCHED["SR-STE"][:2], CONTROLS["SR-STE"])
_TABLE = [
    *(arm for method in METHODS for arm in (PLAIN[method], *BRANCHED[method], CONTROLS[method])),
    *UNSTRUCTURED,
]


@dataclass(frozen=True)
class Stage:
    """A part of the benchmark.

    Attributes:
        cells: Arms and the patterns they are trained at.
        seeds: Of each cell.
        split: What the runs are judged on.
    """

    cells: Sequence[tuple[Arm, str]]
    seeds: range
    split: str

    def jobs(
        self, recipe: Recipe, epochs: Mapping[tuple[str, str], float], seeds: int | None = None
    ) -> list[Job]:
        """Its runs, those of one seed next to one another.

        Args:
            recipe: Of all arms but the controls.
            epochs: Of each control, by its name and pattern.
            seeds: How many at most; None: all.
        """
        return [
            Job(
                pattern=pattern if arm.method else "dense",
                arm=arm.name,
                seed=seed,
                split=self.split,
                epochs=epochs.get((arm.name, pattern), recipe.epochs),
            )
            for seed in self.seeds[:seeds]
            for arm, pattern in self.cells
        ]


STAGES = {
    "search": Stage([(a, STEEP) for a in (*_SR_STE, *REMEDIES)], range(100, 104), "validation"),
    "headline": Stage([(arm, STEEP) for arm in _SR_STE], range(32), "test"),
    "table": Stage([(DENSE, ""), *itertools.product(_TABLE, PATTERNS)], range(2), "test"),
}
NAMES = ("search", "headline", "confirm", "table")


def stage(name: str, rows: Iterable[Mapping[str, Any]]) -> Stage:
    """A stage by its name; that of `confirm` follows from the rows of the search."""
    if name != "confirm":
        return STAGES[name]
    return Stage([(ARMS[chosen(rows)], STEEP)], STAGES["headline"].seeds, "test")


def chosen(rows: Iterable[Mapping[str, Any]]) -> str:
    """The remedy with the best mean accuracy in the search.

    Raises:
        SystemExit: If the search is not finished.
    """
    found: dict[str, list[float]] = {arm.name: [] for arm in REMEDIES}
    for row in rows:
        if row["split"] == "validation" and row["arm"] in found:
            found[row["arm"]].append(row["accuracy"])
    expected = len(STAGES["search"].seeds)
    for name, accuracies in found.items():
        if len(accuracies) < expected:
            raise SystemExit(
                f"{name}: expected {expected} runs of the search, found {len(accuracies)}. Run: "
                "python benchmarks/accuracy/run.py search"
            )
    return max(found, key=lambda name: sum(found[name]))


def comparisons() -> list[Comparison]:
    """Rows of the table of each pattern."""
    found = [Comparison("dense")]
    for method in METHODS:
        plain, control = PLAIN[method].name, CONTROLS[method].name
        found += [Comparison(plain), Comparison(control, plain)]
        found += [Comparison(arm.name, plain, control) for arm in BRANCHED[method]]
    return found + [Comparison(arm.name, PLAIN["SR-STE"].name) for arm in UNSTRUCTURED]


def searched() -> list[Comparison]:
    """What the remedies are judged by: SpRe as the paper has it."""
    spre, same = (arm.name for arm in BRANCHED["SR-STE"][:2])
    control = CONTROLS["SR-STE"].name
    known = [Comparison("dense"), Comparison("SR-STE", spre), Comparison(control, spre)]
    known += [Comparison(spre), Comparison(same, spre, control)]
    return known + [Comparison(arm.name, spre, control) for arm in REMEDIES]


def confirmed(remedy: str) -> list[Comparison]:
    """What a remedy has to be better than."""
    spre, same = (arm.name for arm in BRANCHED["SR-STE"][:2])
    plain, control = PLAIN["SR-STE"].name, CONTROLS["SR-STE"].name
    return [Comparison(remedy, other, control) for other in (plain, spre, same, control)]
