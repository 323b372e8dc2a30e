"""The rows of results.jsonl as runs, and which of them are compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from seed_statistics import Estimate, PairedDifference

from spre_fx.patterns import Pattern

DENSE = "dense"
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Comparison:
    """An arm, and what it is compared with.

    Attributes:
        arm: Such as "SR-STE + SpRe".
        baseline: The arm it should be better than, such as "SR-STE"; None if it is shown alone.
        control: An arm that tells whether what helped is what the arm is named after, such as the
            baseline trained for as long as the arm took.
    """

    arm: str
    baseline: str | None = None
    control: str | None = None

    @property
    def arms(self) -> list[str]:
        """All arms that are named."""
        return [name for name in (self.arm, self.baseline, self.control) if name is not None]


@dataclass(frozen=True)
class Setting:
    """What arms have in common where they are compared: task, pattern, split."""

    task: str
    pattern: str
    split: str

    def __str__(self) -> str:
        return f"{self.task}, {self.pattern}, {self.split}"


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        task: What was learned.
        pattern: N:M, or "dense".
        arm: How it was trained.
        seed: Of the initial weights and the order of the batches.
        epochs: Passes over the training data; those of a control need not be whole.
        steps: Steps of the optimiser.
        split: What `accuracy` was taken on: "validation", on which choices are made, or "test".
        accuracy: After the last epoch, a fraction.
        seconds: Wall time of the training.
        versions: Of the software, and the CPU.
    """

    task: str
    pattern: str
    arm: str
    seed: int
    epochs: float
    steps: int
    split: str
    accuracy: float
    seconds: float
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"expected a split of {SPLITS}, found {self.split!r}: {self}")
        if not 0 <= self.accuracy <= 1:
            raise ValueError(f"expected an accuracy from 0 to 1, found {self.accuracy}: {self}")
        if self.pattern != DENSE:
            Pattern.parse(self.pattern)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Run:
        """Read a row; what else is in it is not looked at.

        Raises:
            ValueError: If a field is missing, or a value is out of its range.
        """
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in row]:
            raise ValueError(f"expected a row with {names}, found no {missing}: {dict(row)}")
        return cls(**{name: row[name] for name in names})

    @property
    def setting(self) -> Setting:
        """Where the run belongs."""
        return Setting(self.task, self.pattern, self.split)


class Results:
    """All runs, by setting, arm and seed, whatever the order of the rows.

    Args:
        rows: As results.jsonl has them.

    Raises:
        ValueError: If a row is not one of a run, or two are of the same run.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.arms: dict[tuple[Setting, str], dict[int, Run]] = defaultdict(dict)
        for run in map(Run.of, rows):
            same = self.arms[run.setting, run.arm]
            if run.seed in same:
                raise ValueError(
                    f"expected one run of each seed, found two of {run.setting}, {run.arm}, seed "
                    f"{run.seed}: accuracy {same[run.seed].accuracy} and {run.accuracy}. Remove "
                    "the row that does not count."
                )
            same[run.seed] = run
        self.runs = [run for same in self.arms.values() for run in same.values()]

    def tasks(self) -> list[str]:
        """In alphabetical order."""
        return sorted({run.task for run in self.runs})

    def settings(self, task: str, split: str) -> list[Setting]:
        """One for each pattern with runs, the densest first; not the dense one."""
        found = {run.setting for run in self.runs if (run.task, run.split) == (task, split)}
        patterns = [Pattern.parse(s.pattern) for s in found if s.pattern != DENSE]
        patterns.sort(key=lambda pattern: (-pattern.density, pattern.m))
        return [Setting(task, str(pattern), split) for pattern in patterns]

    def of(self, setting: Setting, arm: str) -> dict[int, Run]:
        """Seed -> run, in the order of the seeds; empty if there is none.

        Runs with the pattern "dense" are the same beside every pattern.
        """
        dense = Setting(setting.task, DENSE, setting.split)
        runs = self.arms.get((setting, arm)) or self.arms.get((dense, arm), {})
        return dict(sorted(runs.items()))

    def points(self, setting: Setting, arm: str) -> dict[int, float]:
        """Seed -> accuracy in per cent."""
        return {seed: 100 * run.accuracy for seed, run in self.of(setting, arm).items()}

    def accuracy(self, setting: Setting, arm: str) -> Estimate:
        """Of an arm that has runs, in per cent."""
        return Estimate.of(list(self.points(setting, arm).values()))

    def difference(self, setting: Setting, arm: str, other: str | None) -> PairedDifference:
        """Accuracy of `arm` minus that of `other`, in points; without pairs if `other` is None."""
        theirs = {} if other is None else self.points(setting, other)
        return PairedDifference.of(self.points(setting, arm), theirs)
