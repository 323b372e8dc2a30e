"""How much faster N:M networks run than the fastest dense engine, called as a user calls them.

    python benchmarks/inference/run.py --quick        # ResNet-50, 224 pixels, batch 1 and 8
    python benchmarks/inference/run.py                # every setting; hours
    python benchmarks/inference/run.py --models resnet18 --batches 1 --engines eager 1:16

A setting (network, pixels, batch, threads, type) runs in a process of its own, in which all engines
take turns. Every engine's output is compared with float64 first, and one that differs is not timed.
A finished setting is one line of JSON and is not run again on the same machine and versions; the
table is written from these lines. What was left out, and why, is printed and stands below it.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "common"))

import engines
import machine
import networks
import rows
import tables
import timing
import torch
from torch import nn
from tqdm import tqdm

import spre_fx

HERE = Path(__file__)
ENGINES = (*engines.PEERS, *networks.PATTERNS)


def measure(setting: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The row of one setting: milliseconds per round of each engine, and why others have none."""
    start = time.perf_counter()
    torch.set_num_threads(setting["threads"])
    ready = Contest(setting, options.backend)
    for pattern, names in _entries(options.engines).items():
        ready.enter(pattern, names)
    with torch.inference_mode():
        times = ready.run(options)
    row = {
        "setting": setting,
        "machine": machine.describe(),
        "backend": options.backend,
        "engines": options.engines,
        "fastest": timing.fastest(times, engines.PEERS),
        "differences": ready.differences,
        "milliseconds": {name: [round(ms, 4) for ms in taken] for name, taken in times.items()},
        "left_out": ready.left_out,
        "failed": ready.failed,
    }
    return row | {"summary": summary(row), "seconds": round(time.perf_counter() - start, 1)}


def _entries(names: list[str]) -> dict[str, list[str]]:
    """Which engines run the weights of which pattern: dense peers those of the first."""
    patterns = [name for name in names if name in networks.PATTERNS] or [networks.PATTERNS[0]]
    peers = [name for name in names if name in engines.PEERS]
    own = {pattern: [pattern] if pattern in names else [] for pattern in patterns}
    return own | {patterns[0]: peers + own[patterns[0]]}


class Contest:
    """The engines of one setting, each either ready to be timed or with the reason why not.

    Attributes:
        runners: Those whose output is right, by name.
        differences: Of their outputs to float64, relative to the largest.
        left_out: Why engines do not run here: not installed, no such type, too slow.
        failed: What went wrong with those that should.
    """

    def __init__(self, setting: dict[str, Any], backend: str) -> None:
        self.setting, self.backend = setting, backend
        self.x = networks.images(setting["batch"], setting["pixels"])
        self.runners: dict[str, engines.Runner] = {}
        self.differences: dict[str, float] = {}
        self.left_out: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def enter(self, pattern: str, names: list[str]) -> None:
        """Build engines on a network with weights of a pattern, and check what they compute."""
        prepared = networks.prepared(self.setting["model"], pattern)
        dense = spre_fx.finalize(prepared, backend="dense")
        reference = networks.expected(dense, self.x)
        for name in names:
            self._enter(name, self._builder(name, prepared, dense), reference)
        engines.forget_exports()
        gc.collect()

    def _builder(
        self, name: str, prepared: nn.Module, dense: nn.Module
    ) -> Callable[[], engines.Runner]:
        threads, dtype = self.setting["threads"], self.setting["dtype"]
        if name in engines.PEERS:
            return lambda: engines.PEERS[name](dense, self.x, threads, dtype)
        return lambda: engines.ours(prepared, self.x, self.backend, dtype)

    def _enter(
        self, name: str, build: Callable[[], engines.Runner], reference: torch.Tensor
    ) -> None:
        try:
            runner = build()
            with torch.inference_mode():
                found = engines.difference(runner(), reference)
        except engines.LeftOutError as reason:
            self.left_out[name] = str(reason)
        except ImportError as error:
            self.left_out[name] = f"not installed: {error}"
        except Exception as error:  # engines raise what they like, and the others are to run
            self.failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        else:
            self.differences[name] = found
            if found <= (tolerance := engines.TOLERANCE[self.setting["dtype"]]):
                self.runners[name] = runner
            else:
                self.failed[name] = (
                    f"differs from float64 by {found:.1e} of the largest output, more than "
                    f"{tolerance:.0e}: not timed"
                )

    def run(self, options: argparse.Namespace) -> dict[str, list[float]]:
        """Milliseconds of each round, by engine, without peers too slow for the time there is."""
        once = {name: timing.call(runner) for name, runner in self.runners.items()}
        peers = [name for name in once if name in engines.PEERS]
        slow = timing.too_slow(once, peers, rounds=options.rounds, limit=options.limit)
        self.left_out |= slow
        kept = {name: runner for name, runner in self.runners.items() if name not in slow}
        return timing.interleave(kept, seconds=options.seconds, rounds=options.rounds)


def summary(row: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Percentiles 10, 25, 50, 75 and 90 of each engine's ms, and of speed-ups over the fastest."""
    times = row["milliseconds"]
    found = {name: {"ms": _rounded(taken)} for name, taken in times.items()}
    for name in networks.PATTERNS:
        if name in times and row["fastest"]:
            ratios = timing.speedups(times[row["fastest"]], times[name])
            found[name]["speedup"] = _rounded(ratios)
    return found


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in timing.Spread.of(values)]


def measure_apart(setting: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The row of one setting, made by a process of its own; one with an `error` if that fails."""
    command = [
        *(sys.executable, str(HERE), "--worker", json.dumps(setting), "--backend", options.backend),
        *("--seconds", str(options.seconds), "--rounds", str(options.rounds)),
        *("--limit", str(options.limit), "--engines", *options.engines),
    ]
    environment = machine.one_thread_count(setting["threads"])
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines, said = done.stdout.splitlines(), done.stderr.strip().splitlines()
    if done.returncode == 0 and lines:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    return {"setting": setting, "error": said[-1] if said else f"exit status {done.returncode}"}


def settings(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every combination of what the command line asks for, the headline first."""
    axes = (options.models, options.pixels, options.batches, options.threads, options.dtypes)
    names = ("model", "pixels", "batch", "threads", "dtype")
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*axes)]


def key(row: dict[str, Any]) -> str:
    """What a row is a measurement of: equal keys, equal conditions."""
    return json.dumps([row[part] for part in ("setting", "machine", "backend")], sort_keys=True)


def is_done(setting: dict[str, Any], done: dict[str, Any], options: argparse.Namespace) -> bool:
    """Whether a row for the setting, on this machine, has all engines that are asked for."""
    here = {"setting": setting, "machine": machine.describe(), "backend": options.backend}
    return set(options.engines) <= set(done.get(key(here), {}).get("engines", ()))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ResNet-50, 224 pixels, batch 1 and 8")
    parser.add_argument("--models", nargs="+", default=list(networks.MODELS))
    parser.add_argument("--pixels", type=int, nargs="+", default=[160, 224, 320])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=list(engines.DTYPES), default=["float32"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--backend", default="auto", help="of spre_fx.finalize")
    parser.add_argument("--seconds", type=float, default=20, help="to time a setting for")
    parser.add_argument("--rounds", type=int, default=5, help="at least, whatever the seconds")
    parser.add_argument(
        "--limit", type=float, default=120, help="seconds; slow peers are left out to meet it"
    )
    parser.add_argument("--again", action="store_true", help="measure also what has a row")
    parser.add_argument("--rows", type=Path, default=HERE.parent.parent / "inference.jsonl")
    parser.add_argument("--table", type=Path, help="default: beside --rows, ending in .md")
    parser.add_argument("--plot", type=Path, help="also draw the speed-ups, as .png or .svg")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.models, options.pixels, options.batches = ["resnet50"], [224], [1, 8]
    return options


def measure_all(options: argparse.Namespace) -> list[str]:
    """Measure what has no row yet, and say what went wrong, as lines."""
    done = rows.read(options.rows, key)
    todo = [s for s in settings(options) if options.again or not is_done(s, done, options)]
    if any(s["dtype"] == "bfloat16" for s in todo) and not machine.has_bfloat16():
        print("bfloat16: this CPU has no instruction that multiplies it; not measured")
        todo = [s for s in todo if s["dtype"] != "bfloat16"]
    wrong = []
    for setting in (progress := tqdm(todo, disable=None)):
        name = tables.setting_name(setting)
        progress.set_description(name)
        row = measure_apart(setting, options)
        if "error" not in row:
            rows.append(options.rows, row)
        for engine, reason in row.get("left_out", {}).items():
            tqdm.write(f"{name}: {engine} left out: {reason}")
        bad = row.get("failed", {}) | ({"all": row["error"]} if "error" in row else {})
        wrong += [f"{name}: {engine} failed: {reason}" for engine, reason in bad.items()]
        tqdm.write("\n".join(wrong[-len(bad) :]) if bad else tables.result_line(row))
    return wrong


def main() -> None:
    """Measure, and write the table."""
    options = parse()
    if options.worker:
        print(json.dumps(measure(options.worker, options)))
        return
    print(machine.sentence(machine.describe()), flush=True)
    wrong = measure_all(options)
    measured = list(rows.read(options.rows, key).values())
    path = options.table or options.rows.with_suffix(".md")
    path.write_text(tables.document(measured))
    if options.plot:
        tables.plot(measured, options.plot)
    print(f"{path}: {len(measured)} settings")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
