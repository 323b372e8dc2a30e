"""Does SpRe help? Accuracy of dense, N:M and unstructured training on patches of photographs.

    python benchmarks/accuracy/run.py                 # everything, then the table and the plot
    python benchmarks/accuracy/run.py search          # one stage only
    python benchmarks/accuracy/run.py --report        # the table and the plot from what there is

Every run is one line of results.jsonl, written when it is done: whatever stops this script, the
same command goes on where it stopped. Seeds are paired: the same seed means the same initial
weights and the same batches in the same order, whatever the arm.

Stages, in this order:

    times      how long a step of each method takes with and without the SpRe branch, from which
               follows how many epochs the controls get; measured once
    search     remedies at 1:16, judged on the validation strip, which lies inside the training
               strip of all other stages
    headline   SR-STE, with SpRe and Same, and its control, at 1:16, for a standard error of 0.5
    table      every arm at every pattern
    confirm    the remedy that was best in the search, on the test strip, with fresh seeds
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import platform
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, BRANCHED, CONTROLS, DENSE, METHODS, PATTERNS, PLAIN, REMEDIES, UNSTRUCTURED
from tqdm import tqdm
from trainings import Job, Recipe, row_of, run, step_times

HERE = Path(__file__).parent
RECIPE = Recipe()
SEARCH_SEEDS = range(100, 104)
HEADLINE_SEEDS = range(24)
TABLE_SEEDS = range(3)
STAGES = ("search", "headline", "table", "confirm")


def jobs(
    stage: str, results: list[dict[str, Any]], epochs: dict[tuple[str, str], float]
) -> list[Job]:
    """The runs of a stage, those of one seed next to one another.

    Args:
        stage: One of STAGES.
        results: The rows so far, from which `confirm` learns what to confirm.
        epochs: Of each control, by its name and pattern.
    """
    steep = "1:16"
    sr_ste, spre, same = PLAIN["SR-STE"], *BRANCHED["SR-STE"][:2]
    control = CONTROLS["SR-STE"]
    if stage == "search":
        cells = [(arm, steep) for arm in (DENSE, sr_ste, spre, same, control, *REMEDIES)]
        split, seeds = "validation", SEARCH_SEEDS
    elif stage == "headline":
        cells = [(arm, steep) for arm in (DENSE, sr_ste, spre, same, control)]
        split, seeds = "test", HEADLINE_SEEDS
    elif stage == "confirm":
        cells = [(ARMS[chosen(results)], steep)]
        split, seeds = "test", HEADLINE_SEEDS
    else:
        by_method = [(PLAIN[m], *BRANCHED[m], CONTROLS[m]) for m in METHODS]
        arms = [arm for group in by_method for arm in group] + UNSTRUCTURED
        cells = [(DENSE, ""), *itertools.product(arms, PATTERNS)]
        split, seeds = "test", TABLE_SEEDS
    return [
        Job(
            pattern=pattern if arm.method else "dense",
            arm=arm.name,
            seed=seed,
            split=split,
            epochs=epochs.get((arm.name, pattern), RECIPE.epochs),
        )
        for seed in seeds
        for arm, pattern in cells
    ]


def chosen(results: list[dict[str, Any]]) -> str:
    """The remedy with the best mean accuracy in the search."""
    means = {}
    for arm in REMEDIES:
        found = [
            row["accuracy"]
            for row in results
            if row["split"] == "validation" and row["arm"] == arm.name
        ]
        if len(found) < len(SEARCH_SEEDS):
            raise SystemExit(
                f"{arm.name}: expected {len(SEARCH_SEEDS)} runs of the search, found {len(found)}. "
                "Run: python benchmarks/accuracy/run.py search"
            )
        means[arm.name] = sum(found) / len(found)
    return max(means, key=lambda name: means[name])


def control_epochs(file: Path) -> dict[tuple[str, str], float]:
    """Epochs of each control: as long as its SpRe arm takes. Step times are measured only once."""
    if not file.exists():
        arms = [PLAIN[method] for method in METHODS] + [BRANCHED[method][0] for method in METHODS]
        times = {
            pattern: step_times(arms, pattern, rounds=40)
            for pattern in tqdm(PATTERNS, desc="step times", unit="pattern")
        }
        record = {"versions": versions(), "milliseconds": times}
        file.write_text(json.dumps(record, indent=1) + "\n")
    measured = json.loads(file.read_text())["milliseconds"]
    return {
        (control.name, pattern): round(
            RECIPE.epochs * times[control.same_time_as] / times[PLAIN[method].name], 1
        )
        for method, control in CONTROLS.items()
        for pattern, times in measured.items()
    }


def work(jobs: list[Job], file: Path, workers: int) -> None:
    """Make the runs that are missing, and append each to the file as soon as it is done."""
    done = {_key(row) for row in rows(file)}
    left = [job for job in jobs if _key(vars(job)) not in done]
    if not left:
        return
    environment, cache = versions(), file.parent / ".cache"
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool,
        file.open("a") as results,
        tqdm(total=len(left), unit="run", smoothing=0.05) as progress,
    ):
        running = {pool.submit(run, job, RECIPE, cache): job for job in left}
        for future in as_completed(running):
            job = running[future]
            row = row_of(job, RECIPE, future.result(), environment)
            results.write(json.dumps(row) + "\n")
            results.flush()
            progress.set_description(f"{job.arm}, {job.pattern}: {row['accuracy']:.1%}")
            progress.update()


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("pattern", "arm", "seed", "split"))


def rows(file: Path) -> list[dict[str, Any]]:
    """The rows so far. A last line that a kill cut short does not count, and is removed."""
    if not file.exists():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def versions() -> dict[str, str]:
    """What the runs depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    packages = {name: version(name) for name in ("torch", "spre_fx", "scikit-image")}
    return {"python": platform.python_version(), **packages, "cpu": cpu or platform.machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], help="default: all, in order")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--folder", type=Path, default=HERE, help="where results.jsonl is")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    file = options.folder / "results.jsonl"
    if not options.report:
        epochs = control_epochs(options.folder / "step_times.json")
        for stage in options.stages or STAGES:
            print(f"{stage}:")
            work(jobs(stage, rows(file), epochs), file, options.workers)


if __name__ == "__main__":
    main()
