"""How the time of prepare, sites, diff and finalize grows with the model, and what prepare costs.

    python benchmarks/scale.py                        # some minutes
    python benchmarks/scale.py --sites 100 1000 --repeats 3

Three tables: CPU time per site on generated residual networks, `prepare` of ResNet-152 next to
`copy.deepcopy` and `torch.fx.symbolic_trace` of it, in turn, and the peak memory of `prepare` next
to the model's own. Ratios are what to quote: machines differ.
"""

from __future__ import annotations

import argparse
import copy
import gc
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torchvision.models import resnet152

import spre_fx
from spre_fx.passes import match_site, trace
from spre_fx.passes.graph_view import GraphView

HERE = Path(__file__)


class Block(nn.Module):
    """Two convs with batch norms, and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """relu(x + bn(conv(relu(bn(conv(x))))))."""
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


def network(sites: int) -> nn.Sequential:
    """Residual blocks with that many convs in all."""
    return nn.Sequential(*(Block(8) for _ in range(sites // 2)))


def match(prepared: torch.fx.GraphModule) -> None:
    """Match every candidate of a graph."""
    view = GraphView(prepared)
    for candidate in view.candidates.values():
        match_site(view, candidate)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, which other work on the machine does not lengthen, and the result."""
    gc.collect()
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def stages(sites: int) -> dict[str, float]:
    """Seconds of each operation on a network of that many sites."""
    model = network(sites)
    found = {"trace": timed(lambda: trace(model))[0]}
    found["prepare"], prepared = timed(lambda: spre_fx.prepare(model, "1:4"))
    found["match"], _ = timed(lambda: match(prepared))
    found["sites"], _ = timed(lambda: spre_fx.sites(prepared))
    found["finalize"], deployed = timed(lambda: spre_fx.finalize(prepared))
    found["diff"], _ = timed(lambda: spre_fx.diff(prepared, deployed))
    return found


def time_per_site(counts: list[int], repeats: int) -> str:
    """The first table: the least of the repeats, as work is only ever added; sizes in turn."""
    taken: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    stages(min(counts))  # warm
    for _ in range(repeats):
        for count in counts:
            taken[count].append(stages(count))
    rows = []
    for what in taken[counts[0]][0]:
        least = [1e3 * min(run[what] for run in taken[count]) / count for count in counts]
        rows.append((what, *(f"{ms:.3f}" for ms in least), f"{max(least) / min(least):.2f}x"))
    headers = ("ms per site", *(f"{count:,} sites" for count in counts), "largest / smallest")
    return tabulate(rows, headers, disable_numparse=True)


def spread(seconds: list[float]) -> str:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(seconds, n=4)
    return f"{median:.2f} s ({low:.2f}-{high:.2f})"


def next_to_torch(repeats: int) -> str:
    """The second table. SpRe branches are new weights, whose drawing has a line of its own."""
    model = resnet152()
    branched = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    ways: dict[str, Callable[[], Any]] = {
        "copy.deepcopy + symbolic_trace": lambda: symbolic_trace(copy.deepcopy(model)),
        "prepare, without SpRe branches": lambda: spre_fx.prepare(model, "1:4", branch=None),
        "prepare": lambda: spre_fx.prepare(model, "1:4"),
        "nn.Conv2d of each SpRe branch": lambda: [
            nn.Conv2d(c.in_channels, c.out_channels, 3, bias=False) for c in branched
        ],
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            seconds, _ = timed(way)
            if repeat:
                taken[name].append(seconds)
    base = statistics.median(next(iter(taken.values())))
    rows = [
        (name, spread(runs), f"{statistics.median(runs) / base:.2f}x")
        for name, runs in taken.items()
    ]
    return tabulate(rows, ("ResNet-152", "median (quartiles)", ""), disable_numparse=True)


def peak_memory(branch: str) -> None:
    """Print the bytes of the model, of the result, and the peak of `prepare` above the model."""
    torch.set_num_threads(1)
    spre_fx.prepare(network(10), "1:4")  # what is loaded once is not counted
    model = resnet152()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])
    prepared = spre_fx.prepare(model, "1:4", branch="auto" if branch == "auto" else None)
    peak = 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    print(_bytes(model), _bytes(prepared), peak - before)


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def memory() -> str:
    """The third table, each line from a process of its own."""
    rows = []
    for branch, name in (("none", "without SpRe branches"), ("auto", "with SpRe branches")):
        command = [sys.executable, str(HERE), "--memory-of", branch]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        model, result, peak = map(int, output.split())
        sizes = (f"{size / 2**20:.0f} MiB" for size in (model, result, peak))
        rows.append((name, *sizes, f"{peak / model:.2f}x"))
    headers = ("prepare of ResNet-152", "model", "result", "peak above the model", "peak / model")
    return tabulate(rows, headers, disable_numparse=True)


def machine() -> str:
    """What it ran on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return (
        f"{cpu or platform.machine()}, one thread; Python {platform.python_version()}, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, nargs="+", default=[100, 300, 1000, 3000, 10000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        peak_memory(options.memory_of)
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{machine()}\n\n{time_per_site(options.sites, options.repeats)}\n", flush=True)
    print(f"{next_to_torch(3 * options.repeats)}\n\n{memory()}", flush=True)


if __name__ == "__main__":
    main()
