"""2:4 on a GPU: is it right, what does each layer gain, and what does ResNet-50? One command.

    python benchmarks/gpu/run.py --out results/h200             # under 8 minutes
    python benchmarks/gpu/run.py --out results/h200 --minutes 60

Runs from a bare checkout, with torch, torchvision, tabulate and safetensors installed; with
`tensorrt`, `onnx` and `onnxscript` TensorRT is measured as well. Each part has a share of the time;
what it does not get to is noted, and so is what fails. The tables are printed and written to
OUT.json and OUT.md, also if the run is interrupted. Other work on the GPU shows in the times.

1. correctness: each way to run a layer against float64, over sizes, patterns and types.
2. layers: ResNet-50's distinct layers, sparse ways next to eager cuDNN and torch.compile.
3. models: ResNet-50 through `finalize` next to eager, torch.compile max-autotune and TensorRT.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from limits import time_limit
from report import Report, environment

ROOT = Path(__file__).resolve().parents[2]
SHARES = {"correctness": 0.15, "layers": 0.37, "models": 0.48}  # of the time
MODULES = {"correctness": "correctness", "layers": "layer_times", "models": "model_times"}


def use_this_checkout() -> None:
    """Import spre_fx, and spre_fx.passes from passes/ beside it, from where this script lies."""
    sys.path.insert(0, str(ROOT))
    spre_fx = importlib.import_module("spre_fx")
    spre_fx.__path__.append(str(ROOT))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.json and OUT.md")
    parser.add_argument("--minutes", type=float, default=7.5, help="in all (7.5)")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 256, 1])
    parser.add_argument("--dtypes", nargs="+", choices=("float16", "bfloat16"))
    parser.add_argument("--device", default="cuda", help="such as cuda:1 (cuda)")
    parser.add_argument("--pattern", default="2:4", help="of layers and models (2:4)")
    options = parser.parse_args(arguments)
    options.dtypes = options.dtypes or ["float16", "bfloat16"]
    return options


def run_parts(
    parts: dict[str, Callable[[float], None]], note: Callable[[str], None], seconds: float
) -> None:
    """Run each part until its share of the time is over; go on behind one that fails.

    Args:
        parts: Name -> what is called with the `time.monotonic()` at which to be done.
        note: Takes sentences on what failed.
        seconds: For all of them. What a part leaves over goes to the next ones.
    """
    end = time.monotonic() + seconds
    for index, (name, part) in enumerate(parts.items()):
        left = sum(SHARES[other] for other in list(parts)[index:])
        now = time.monotonic()
        deadline = now + (end - now) * SHARES[name] / left
        print(f"{name}, {deadline - now:.0f} s", flush=True)
        try:
            with time_limit(deadline - now + 5):  # it should have stopped by itself
                part(deadline)
        except Exception as error:
            traceback.print_exc()
            note(f"{name} stopped: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    started = time.monotonic()
    if not torch.cuda.is_available():
        print(
            f"benchmarks/gpu/run.py needs a CUDA device, and torch {torch.__version__} sees none.",
            file=sys.stderr,
        )
        return 2
    use_this_checkout()
    torch.cuda.set_device(options.device)
    report = Report(environment=environment())
    try:
        parts = {name: _part(name, report, options) for name in options.parts}
        run_parts(parts, report.note, 60 * options.minutes - (time.monotonic() - started))
    finally:
        report.write(options.out)
        print(f"\n{report.markdown()}\nwritten to {options.out}.json and {options.out}.md")
    return 0


def _part(name: str, report: Report, options: argparse.Namespace) -> Callable[[float], None]:
    return lambda deadline: importlib.import_module(MODULES[name]).run(report, options, deadline)


if __name__ == "__main__":
    sys.exit(main())
