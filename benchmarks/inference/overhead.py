"""What a call of a deployed network costs besides its arithmetic; it has to stay below 2%.

    python benchmarks/inference/overhead.py

ResNet-50 at 1:16 is the hardest case: some fifty layers in some milliseconds. Its call is timed in
turn with the same call whose engine returns at once, which leaves what Python does; and with a
network of as many layers and next to no arithmetic, which adds what the engine needs to start and
join its threads at every layer. Exits with 1 where Python's part is too large.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.append(str(Path(__file__).parents[1] / "common"))

import machine
import networks
import timing
import torch
from tabulate import tabulate
from torch import Tensor, nn

import spre_fx
from spre_fx import engine

ALLOWED = 0.02


class Narrow(nn.Module):
    """Convs one behind the other, of few channels, with a residual around every three."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(16, 16, 1), nn.ReLU()),
                *(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1)),
            )
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        """relu(x + block(x)), again and again."""
        for block in self.blocks:
            x = (x + block(x)).relu()
        return x


def narrow(pattern: str, blocks: int) -> tuple[nn.Module, Tensor]:
    """A deployed network of so many blocks and its input."""
    x = torch.randn(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    return on_the_engine(spre_fx.prepare(Narrow(blocks), pattern, branch=None), x), x


def on_the_engine(prepared: nn.Module, x: Tensor) -> nn.Module:
    """A deployed network of which the engine runs every node, so that all arithmetic is its.

    Nothing is measured, as in `engines.deployed`: layers this small may be faster when torch runs
    them, whose arithmetic would count as Python's.

    Raises:
        RuntimeError: If torch runs some node for inputs like x.
    """
    network: Any = spre_fx.finalize(prepared, "cpu")
    plan = network.plan(x) if hasattr(network, "plan") else "runs as a graph of dense layers."
    rows = () if isinstance(plan, str) else plan.rows
    by_torch = [row.step for row in rows if row.kind == "torch"]
    if by_torch or not rows:
        found = f"torch runs {', '.join(by_torch)}" if by_torch else plan
        raise RuntimeError(f"expected a network that the engine runs whole, found: {found}")
    return network


def without_engine(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same call, whose engine returns at once.

    Raises:
        RuntimeError: If the call does not come to the engine.
    """
    with mock.patch.object(engine.Engine, "run") as replaced, torch.inference_mode():
        run()
    if not replaced.called:
        raise RuntimeError("expected a network that runs on the engine, found one that does not.")

    def empty() -> None:
        kept = engine.Engine.run
        engine.Engine.run = _nothing
        try:
            run()
        finally:
            engine.Engine.run = kept

    return empty


def _nothing(*_: Any) -> None:
    """Stand for the engine."""


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of the three calls."""
    x = networks.images(1, options.pixels)
    prepared = networks.prepared(options.model, options.pattern)
    network = on_the_engine(prepared, x)
    layers = sum(s.state is spre_fx.State.DEPLOYED for s in spre_fx.sites(network))
    small, little = narrow(options.pattern, blocks := math.ceil(layers / 3))
    runners: dict[str, Callable[[], Any]] = {
        "the call": lambda: network(x),
        "Python's part of it": without_engine(lambda: network(x)),
        f"{3 * blocks} layers without arithmetic": lambda: small(little),
    }
    with torch.inference_mode():
        times = timing.interleave(runners, seconds=options.seconds, rounds=5)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--pattern", default="1:16")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10)
    options = parser.parse_args()
    if engine.load() is None:
        sys.exit(engine.why_not())
    torch.set_num_threads(options.threads)
    print(f"{machine.sentence(machine.describe())}\n{options.model} {options.pattern}, batch 1, "
          f"{options.pixels} pixels, {options.threads} threads\n", flush=True)  # fmt: skip
    found = measure(options)
    whole, python, _ = found.values()
    rows = [(name, f"{ms:.4f}", f"{100 * ms / whole:.2f}%") for name, ms in found.items()]
    print(tabulate(rows, ("", "ms", "of the call"), "github", disable_numparse=True))
    if python > ALLOWED * whole:
        sys.exit(f"Python's part is more than {100 * ALLOWED:.0f}% of the call")


if __name__ == "__main__":
    main()
