"""Does SpRe help? Accuracy of dense, N:M and unstructured training on patches of photographs.

    python benchmarks/accuracy/run.py                 # everything, then the tables and the picture
    python benchmarks/accuracy/run.py search          # one stage only
    python benchmarks/accuracy/run.py --report        # tables and picture of what there is

Every run is one line of results.jsonl, written when it is done: whatever stops this script, the
same command goes on where it stopped. Seeds are paired: the same seed means the same initial
weights and the same batches in the same order, whatever the arm.

How long a step takes with and without the SpRe branch is measured first, once; from it follows how
many epochs the controls get. Then come the stages:

    search     remedies at 1:16, judged on the validation strip, which lies inside the training
               strip of all other stages
    headline   SR-STE, with SpRe and Same, and its control, at 1:16, with many seeds
    confirm    the remedy that was best in the search, on the test strip, with the headline's seeds
    table      every arm at every pattern
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

import plot
import torch
from accuracy_report import markdown
from arms import BRANCHED, CONTROLS, METHODS, PATTERNS, PLAIN
from stages import NAMES, chosen, comparisons, confirmed, searched, stage
from tqdm import tqdm
from trainings import TASK, Job, Recipe, row_of, run, step_times

HERE = Path(__file__).parent
RECIPE = Recipe()
INTRODUCTION = f"""The task "{TASK}": which of 20 photographs (scikit-image's and scikit-learn's)
was this 16 x 16 grey patch cut from? 16,000 patches to train on from the left 70 % of each
photograph, 8,000 to test on from the right 25 %; for the search, from the left 55 % and from 57 %
to 70 %. The network is a ResNet of one block of 16 and one of 32 channels, on 8 x 8 and 4 x 4
pixels, with a dense stem and classifier; {RECIPE.epochs} epochs of SGD with momentum 0.9, batch 64,
learning rate {RECIPE.learning_rate} after a warm-up epoch and with a cosine to 0, weight decay
{RECIPE.weight_decay}, SR-STE's decay 2e-4. ASP starts from the dense network of its seed, whose
training its seconds leave out. What is judged is what `finalize` returns. "Same time" are controls:
the plain method, trained for as long as SpRe takes by step_times.json, where all arms took turns;
the median seconds here are of runs that shared a machine."""
DRAWN = [PLAIN["SR-STE"], *BRANCHED["SR-STE"], CONTROLS["SR-STE"]]


def control_epochs(file: Path, recipe: Recipe) -> dict[tuple[str, str], float]:
    """Epochs of each control, by its name and pattern: as long as its SpRe arm takes."""
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
            recipe.epochs * times[control.same_time_as] / times[PLAIN[method].name], 1
        )
        for method, control in CONTROLS.items()
        for pattern, times in measured.items()
    }


def work(jobs: list[Job], recipe: Recipe, file: Path, workers: int) -> None:
    """Make the runs that are missing, and append each to the file as soon as it is done."""
    done = {_key(row) for row in rows(file)}
    left = [job for job in jobs if _key(vars(job)) not in done]
    environment, cache = versions(), file.parent / ".cache"
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, context, _start_worker) as pool,
        file.open("a") as results,
        tqdm(total=len(left), unit="run", smoothing=0.05) as progress,
    ):
        running = {pool.submit(run, job, recipe, cache): job for job in left}
        for future in as_completed(running):
            job = running[future]
            row = row_of(job, recipe, future.result(), environment)
            results.write(json.dumps(row) + "\n")
            results.flush()
            progress.set_description(f"{job.arm}, {job.pattern}: {row['accuracy']:.1%}")
            progress.update()


def _start_worker() -> None:
    """One thread, and an end when this script is killed, which would leave workers behind."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


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
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    packages = {name: version(name) for name in ("torch", "spre_fx", "scikit-image")}
    return {"python": platform.python_version(), **packages, "cpu": cpu or platform.machine()}


def report(file: Path, document: Path) -> None:
    """Write the tables, and the picture beside them.

    Args:
        file: The results.
        document: A Markdown file; the picture is a PNG of the same name.
    """
    found = rows(file)
    remedy = chosen(found)
    text = markdown(found, comparisons(), searched(), confirmed(remedy), introduction=INTRODUCTION)
    document.write_text(text, encoding="utf-8")
    drawn = [c for c in (*comparisons(), *confirmed(remedy)) if c.baseline == PLAIN["SR-STE"].name]
    names = [arm.name for arm in DRAWN if any(row["arm"] == arm.name for row in found)]
    plot.draw(found, names, drawn, document.with_suffix(".png"), task=TASK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--folder", type=Path, default=HERE, help="where results.jsonl is")
    parser.add_argument("--epochs", type=float, default=RECIPE.epochs, help="of all but controls")
    parser.add_argument("--seeds", type=int, help="of each stage, at most")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    if unknown := set(options.stages) - set(NAMES):
        parser.error(f"expected stages of {', '.join(NAMES)}, found {', '.join(sorted(unknown))}")
    file = options.folder / "results.jsonl"
    if not options.report:
        recipe = Recipe(epochs=options.epochs)
        controls = control_epochs(options.folder / "step_times.json", recipe)
        for name in options.stages or NAMES:
            print(f"{name}:", flush=True)
            jobs = stage(name, rows(file)).jobs(recipe, controls, options.seeds)
            work(jobs, recipe, file, options.workers)
    if options.report or not options.stages:
        report(file, options.folder.parent / "accuracy.md")


if __name__ == "__main__":
    main()
