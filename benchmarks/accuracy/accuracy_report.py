"""The Markdown of what run.py measured: benchmarks/accuracy.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from comparison_table import HOLM, NOTHING, SEEDS, TARGET, named, notes, table
from results import DENSE, Comparison, Results, Run, Setting
from seed_statistics import holm

COMMAND = "python benchmarks/accuracy/run.py"

_READING = f"""## How to read it

- **accuracy**: of the network after its last epoch, mean ± standard error over the seeds.
- **difference**: accuracy of the arm minus that of its baseline, the method it should be better
  than, in points. Runs of one seed start from the same weights and see the same batches, so they
  are compared in pairs: mean difference [95 % confidence interval, Student's t] (pairs in which the
  arm was better / pairs).
- **control**: an arm that tells whether what helped is what the arm is named after, such as the
  baseline trained for as many seconds as the arm took.
- Every interval stands for itself: where there is nothing to find, one in twenty excludes 0 by
  chance. **{HOLM}** is p of the two-sided paired t-test, corrected for all comparisons with a
  baseline in its section.
- **{SEEDS}**: what brings the standard error of the difference down to {TARGET} points, as far as
  the spread of the pairs tells.
- `{NOTHING}`: not known, or not asked. A single seed has no standard error and no interval."""

_SEARCH = """Choices were made here, on patches and seeds that no test accuracy was taken with. The
best of many looks better than it is: p (Holm) is corrected for all comparisons below, {family}."""

_CONFIRMED = """What was chosen on validation, once more with other seeds and on the test patches. p
(Holm) is corrected for all comparisons below, {family}."""


def markdown(
    rows: Iterable[Mapping[str, Any]],
    comparisons: Sequence[Comparison],
    search: Sequence[Comparison] = (),
    confirmed: Sequence[Comparison] = (),
    *,
    introduction: str = "",
    command: str = COMMAND,
) -> str:
    """The whole document. The same rows in another order give the same text.

    Args:
        rows: As results.jsonl has them.
        comparisons: The rows of each pattern's table of test accuracies, in this order.
        search: Those of the validation accuracies that choices were made on.
        confirmed: What was chosen there, compared on test accuracies.
        introduction: Paragraphs on what was trained.
        command: What wrote the rows.

    Raises:
        ValueError: If a row is not one of a run, or two are of the same run.
    """
    results = Results(rows)
    parts = [
        "# Accuracy",
        f"Written by `{command}`.",
        introduction,
        _origin(results.runs),
        _READING,
    ]
    for task in results.tasks():
        tested = results.settings(task, "test")
        searched = results.settings(task, "validation")
        parts += _section(task, results, tested, comparisons)
        parts += _corrected(f"{task}: the search", _SEARCH, results, searched, search)
        parts += _corrected(f"{task}: what was chosen", _CONFIRMED, results, tested, confirmed)
    parts += _left_over(results, {"test": [*comparisons, *confirmed], "validation": search})
    return "\n\n".join(part for part in parts if part) + "\n"


def _origin(runs: Sequence[Run]) -> str:
    """Versions and hardware; all of them where the runs do not agree."""
    counts = Counter(tuple(sorted(run.versions.items())) for run in runs)
    if not counts:
        return "No runs."
    if len(counts) == 1:
        return f"{len(runs)} runs: {_sentence(*counts)}."
    lines = [
        f"- {_sentence(versions)}: {count} of {len(runs)} runs"
        for versions, count in sorted(counts.items())
    ]
    return (
        f"**Mixed versions**: the runs come from {len(counts)} set-ups, which need not agree in "
        "seconds or, with the same seed, in accuracy.\n\n" + "\n".join(lines)
    )


def _sentence(versions: Sequence[tuple[str, str]]) -> str:
    others = dict(versions)
    cpu = others.pop("cpu", "unknown CPU")
    return ", ".join([cpu, *(f"{name} {number}" for name, number in others.items())])


def _section(
    title: str,
    results: Results,
    settings: Sequence[Setting],
    comparisons: Sequence[Comparison],
    *,
    corrected_ps: Mapping[tuple[Setting, Comparison], float] | None = None,
    text: str = "",
) -> list[str]:
    """A table for each setting in which any arm has runs."""
    parts = []
    for setting in settings:
        if any(results.of(setting, comparison.arm) for comparison in comparisons):
            parts += [
                f"### {setting.pattern}",
                table(results, setting, comparisons, corrected_ps or {}),
                "\n".join(f"- {note}" for note in notes(results, setting, comparisons)),
            ]
    return [f"## {title}", text, *parts] if parts else []


def _corrected(
    title: str,
    text: str,
    results: Results,
    settings: Sequence[Setting],
    comparisons: Sequence[Comparison],
) -> list[str]:
    """A section in which p is corrected for all comparisons with a baseline.

    One of a single seed counts as well: it was tried, and can show nothing.
    """
    ps = {}
    for setting in settings:
        for comparison in comparisons:
            found = results.difference(setting, comparison.arm, comparison.baseline).estimate
            if found is not None:
                ps[setting, comparison] = 1.0 if found.p is None else found.p
    corrected = dict(zip(ps, holm(list(ps.values())), strict=True))
    text = text.format(family=len(ps))
    return _section(title, results, settings, comparisons, corrected_ps=corrected, text=text)


def _left_over(results: Results, listed: Mapping[str, Sequence[Comparison]]) -> list[str]:
    """Runs that no table has."""
    lines = []
    for (setting, arm), runs in results.arms.items():
        named_arms = {name for comparison in listed[setting.split] for name in comparison.arms}
        alone = setting.pattern == DENSE and not results.settings(setting.task, setting.split)
        if arm not in named_arms or alone:
            lines.append(f"- {setting}: {arm}, {named(sorted(runs))}")
    return ["## Runs in no table", "\n".join(sorted(lines))] if lines else []
