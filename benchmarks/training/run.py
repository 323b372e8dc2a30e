"""What a training step costs, relative to a dense one: of N:M models, with and without SpRe.

    python benchmarks/training/run.py                                      # hours
    python benchmarks/training/run.py --models resnet18 --threads 1 --modes eager
    python benchmarks/training/run.py --device cuda --models resnet50 --batch 256 --pixels 224

A setting (network, input, pattern, mode, threads) runs in a process of its own, in which all
contenders take turns; peak memory is measured in a process for each. A finished setting is one line
of JSON and is not run again on the same machine and versions (`--again` does); the table is written
from these lines, with the targets. Exits with 1 if something failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "common"))

import contenders
import inputs
import machine
import memory
import operations
import rows
import setting
import tables
import timing
import torch
from setting import Setting
from tqdm import tqdm
from training import Training

HERE = Path(__file__)


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: In which each contender trains a timed step.
        warm_up: Rounds before them, not timed: of those compiled, masks taken, memory allocated.
        profiled: Steps under the profiler.
        memory: Steps whose peak of memory is read.
        processes: In which it is read, one after the other; the median counts, since what lies
            where in memory differs from one to the next.
    """

    rounds: int = 15
    warm_up: int = 3
    profiled: int = 3
    memory: int = 3
    processes: int = 3

    def __post_init__(self) -> None:
        for name, number in dataclasses.asdict(self).items():
            if number < (least := 2 if name == "warm_up" else 1):
                raise ValueError(f"{name}={number}: expected at least {least}.")


def measure(where: Setting, names: list[str], effort: Effort) -> dict[str, Any]:
    """Milliseconds of each contender's steps, shares of mask updates, and why others have none."""
    torch.set_num_threads(where.threads)
    torch.backends.cudnn.benchmark = True
    trainings, failed = {}, {}
    for name in names:
        try:
            trainings[name] = Training(name, where)
        except Exception as error:  # one that cannot be built is no reason to stop
            failed[name] = timing.said(error)
    steps = {name: training.milliseconds for name, training in trainings.items()}
    warm, stopped = timing.interleave(steps, range(effort.warm_up))
    progress = tqdm(range(effort.rounds), "rounds", leave=False, disable=None)
    times, stopped_later = timing.interleave({name: steps[name] for name in warm}, progress)
    ready = {name: trainings[name] for name in times}
    shares = {} if where.mode == "compile" else _mask_shares(ready, effort.profiled)
    live = {name: contenders.live_taps(training.network) for name, training in ready.items()}
    return {
        "milliseconds": {name: [round(ms, 3) for ms in taken] for name, taken in times.items()},
        "mask_share": shares,
        "live_taps": {name: round(share, 4) for name, share in live.items() if share is not None},
        "failed": failed | stopped | stopped_later,
    }


def _mask_shares(trainings: dict[str, Training], steps: int) -> dict[str, float]:
    taken = {
        name: operations.measure(training, steps, split=False)
        for name, training in trainings.items()
        if name != contenders.DENSE
    }
    return {name: round(operations.share(ms, operations.MASKS), 5) for name, ms in taken.items()}


def row_of(where: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one setting."""
    start = time.perf_counter()
    row = apart(where, options)
    peaks: dict[str, int] = {}
    if where.mode == "eager":  # a compiler's own memory would hide that of the steps
        for name in row["milliseconds"]:
            found = [
                apart(where, options, "--memory-of", name) for _ in range(options.effort.processes)
            ]
            read = [each["peak_bytes"] for each in found if "peak_bytes" in each]
            peaks |= {name: int(statistics.median(read))} if read else {}
            row["failed"] |= {key: why for each in found for key, why in each["failed"].items()}
    return {
        "setting": dataclasses.asdict(where),
        "machine": inputs.machine_of(where.device),
        "contenders": options.contenders,
        "effort": dataclasses.asdict(options.effort),
        "command": shlex.join(["python", "benchmarks/training/run.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        **row,
        "peak_bytes": peaks,
        "seconds": round(time.perf_counter() - start, 1),
    }


def apart(where: Setting, options: argparse.Namespace, *more: str) -> dict[str, Any]:
    """What a process of its own finds; what it says besides is for the terminal."""
    command = [
        *(sys.executable, str(HERE), "--worker", json.dumps(dataclasses.asdict(where))),
        *("--contenders", *options.contenders),
        *itertools.chain.from_iterable(
            (f"--{name.replace('_', '-')}", str(number))
            for name, number in dataclasses.asdict(options.effort).items()
        ),
    ]
    environment = machine.one_thread_count(where.threads)
    done = subprocess.run(
        [*command, *more], stdout=subprocess.PIPE, text=True, check=False, env=environment
    )
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    what = " ".join(more) or "all"
    return {"milliseconds": {}, "mask_share": {}, "live_taps": {}} | {
        "failed": {what: f"its process ended with {done.returncode}"}
    }


def key(row: dict[str, Any]) -> str:
    """What a row is a measurement of: equal keys, equal conditions."""
    return json.dumps([row["setting"], row["machine"]], sort_keys=True)


def is_done(where: Setting, done: dict[str, Any], names: list[str]) -> bool:
    """Whether a row for the setting, on this machine, has all contenders that are asked for."""
    conditions = {"setting": dataclasses.asdict(where), "machine": inputs.machine_of(where.device)}
    return set(names) <= set(done.get(key(conditions), {}).get("contenders", ()))


def settings(options: argparse.Namespace) -> list[Setting]:
    """Every combination of what the command line asks for."""
    axes = (options.models, options.threads, options.modes, options.patterns)
    return [
        inputs.setting_for(options, model, pattern, threads, mode)
        for model, threads, mode, pattern in itertools.product(*axes)
    ]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    inputs.add_options(parser)
    cores = machine.describe(())["cores"]
    parser.add_argument("--models", nargs="+", default=list(setting.SIZES))
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:16"])
    parser.add_argument("--modes", nargs="+", choices=setting.MODES, default=list(setting.MODES))
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores}))
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=contenders.CONTENDERS,
        default=list(contenders.CONTENDERS),
        help="dense is always among them",
    )
    for field in dataclasses.fields(Effort):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=int, default=field.default, help="of a contender")
    parser.add_argument("--again", action="store_true", help="measure also what has a row")
    parser.add_argument("--rows", type=Path, default=HERE.parents[1] / "training.jsonl")
    parser.add_argument("--table", type=Path, help="default: beside --rows, ending in .md")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.effort = Effort(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(Effort)}
    )
    options.contenders = [
        name for name in contenders.CONTENDERS if name in {contenders.DENSE, *options.contenders}
    ]
    return options


def work(options: argparse.Namespace) -> dict[str, Any]:
    """What a worker prints."""
    where = Setting(**options.worker)
    if not options.memory_of:
        return measure(where, options.contenders, options.effort)
    torch.set_num_threads(where.threads)
    try:
        peak = memory.peak(options.memory_of, where, options.effort.memory)
    except Exception as error:  # such as a device without enough of it
        return {"failed": {f"memory of {options.memory_of}": timing.said(error)}}
    return {"peak_bytes": peak, "failed": {}}


def measure_all(options: argparse.Namespace) -> list[str]:
    """Measure what has no row yet, and say what failed, as lines."""
    done = rows.read(options.rows, key)
    todo = [
        where
        for where in settings(options)
        if options.again or not is_done(where, done, options.contenders)
    ]
    wrong = []
    for where in (progress := tqdm(todo, disable=None)):
        progress.set_description(str(where))
        row = row_of(where, options)
        if contenders.DENSE in row["milliseconds"]:
            rows.append(options.rows, row)
        bad = [f"{where}: {name} failed: {reason}" for name, reason in row["failed"].items()]
        wrong += bad
        tqdm.write("\n".join([tables.result_line(row), *bad]))
    return wrong


def main() -> None:
    """Measure, and write the table."""
    options = parse()
    if options.worker:
        print(json.dumps(work(options)))
        return
    print(machine.sentence(inputs.machine_of(options.device)), flush=True)
    wrong = measure_all(options)
    measured = list(rows.read(options.rows, key).values())
    path = options.table or options.rows.with_suffix(".md")
    path.write_text(tables.document(measured))
    print(f"{path}: {len(measured)} settings")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
