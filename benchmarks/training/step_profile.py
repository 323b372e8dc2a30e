"""Where the time of a training step goes, next to a dense one: by kind of operation.

    python benchmarks/training/step_profile.py --contender "SR-STE + SpRe" --pattern 1:16

Both models train in one process, one after the other, in eager mode under torch.profiler. The two
gradients of a conv are computed one by one, to tell them apart.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "common"))

import contenders
import inputs
import machine
import operations
import torch
from tabulate import tabulate
from training import Training


def table(dense: dict[str, float], other: dict[str, float], contender: str) -> str:
    """Milliseconds of each kind, and what they are of the dense step, the longest first."""
    whole = sum(dense.values())
    kinds = sorted({*dense, *other}, key=lambda kind: -other.get(kind, 0.0))
    lines = [(kind, dense.get(kind, 0.0), other.get(kind, 0.0)) for kind in kinds]
    lines.append(("step", whole, sum(other.values())))
    cells = [
        (kind, f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}", f"{100 * (b - a) / whole:+.1f}%")
        for kind, a, b in lines
    ]
    headers = ("", "dense, ms", f"{contender}, ms", "more, ms", "more, of the dense step")
    return tabulate(cells, headers, disable_numparse=True, colalign=("left", *("right",) * 4))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [name for name in contenders.CONTENDERS if name != contenders.DENSE]
    parser.add_argument("--contender", choices=names, default="SR-STE + SpRe")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    inputs.add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = inputs.setting_for(options, options.model, options.pattern, options.threads)
    print(f"{machine.sentence(inputs.machine_of(where.device))}\n{where}\n", flush=True)
    dense, other = (
        operations.measure(Training(name, where), options.steps)
        for name in (contenders.DENSE, options.contender)
    )
    print(table(dense, other, options.contender))


if __name__ == "__main__":
    main()
