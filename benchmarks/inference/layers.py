"""How fast each conv of ResNet-50 runs by itself, next to the dense one and to the kernels' limit.

    python benchmarks/inference/layers.py --threads 1

Each distinct conv, with its bias and a ReLU, runs in every way that `finalize` chooses from for a
pattern, as a planned graph runs it, in turn with oneDNN's dense conv (weights packed beforehand). A
cell is of the fastest, where Winograd's filtering is held to be slower by the price of its memory.
Of all times that of a call with next to nothing to compute is taken off.

GFLOP/s count non-zeros only, and the limit is of kernels that compute those. With AVX-512 a permute
precedes every multiply-add and shares a port with one of the two units of a Zen 4, so that 0.75 of
the dense peak is left. Elsewhere planar kernels need no permutes: a multiply-add with a load each,
of which a core with two units does two a cycle, so that the dense peak is the limit. Winograd's
filtering is dense, with fewer multiplications, and may be beyond it. The peak is what the best
dense conv of the table reaches, or --peak.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "common"))

import machine
import networks
import timing
import torch
from tabulate import tabulate
from torch import Tensor, nn

import spre_fx
from spre_fx import engine
from spre_fx.backends import Lowered

_PERMUTING = ("avx512_bf16", "avx512")  # the instruction sets whose kernels permute


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the time of a conv depends on; `size` is the input's (batch, C_in, H, W)."""

    size: tuple[int, ...]
    out_channels: int
    kernel: int
    stride: int

    def __str__(self) -> str:
        _, channels, height, width = self.size
        taps = f"{self.kernel}x{self.kernel}" + f"/{self.stride}" * (self.stride > 1)
        return f"{channels}-{self.out_channels} {taps} {height}x{width}"


@dataclasses.dataclass(frozen=True)
class Figures:
    """One conv, measured.

    Attributes:
        count: How often the network has it.
        milliseconds: Of "dense", and of each pattern.
        flops: Of one call, two a multiply-add, by the same names; zeros do not count.
        ways: How each pattern runs.
    """

    shape: Shape
    count: int
    milliseconds: dict[str, float]
    flops: dict[str, float]
    ways: dict[str, str]

    def rate(self, name: str) -> float:
        """GFLOP/s."""
        return self.flops[name] / self.milliseconds[name] / 1e6

    def floor(self, name: str, limit: float) -> float:
        """Milliseconds at a limit in GFLOP/s."""
        return self.flops[name] / limit / 1e6


def convs(model: str, pattern: str, x: Tensor) -> dict[str, tuple[Shape, nn.Conv2d]]:
    """Every conv of a deployed network that holds N:M weights, by name, in their order."""
    dense = spre_fx.finalize(networks.prepared(model, pattern), backend="dense")
    found: dict[str, tuple[Shape, nn.Conv2d]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            assert isinstance(module, nn.Conv2d)
            size, (kernel, _), (stride, _) = inputs[0].shape, module.kernel_size, module.stride
            shape = Shape(tuple(size), module.out_channels, kernel, stride)
            found[name] = (shape, module)

        return hook

    sparse = {s.name for s in spre_fx.sites(dense) if s.state is spre_fx.State.DEPLOYED}
    for name, module in dense.named_modules():
        if isinstance(module, nn.Conv2d) and name in sparse:
            module.register_forward_pre_hook(note(name))
    with torch.inference_mode():
        dense(x)
    return found


def dense_runner(conv: nn.Conv2d, x: Tensor) -> Callable[[], Any]:
    """OneDNN's conv and ReLU, as torch.compile with freezing calls it."""
    geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
    weight = torch._C._nn.mkldnn_reorder_conv2d_weight(
        conv.weight.detach().to_mkldnn(), *geometry, list(x.shape)
    )
    run = torch.ops.mkldnn._convolution_pointwise
    return lambda: run(x, weight, conv.bias, *geometry, "relu", [], "")


def sparse_ways(conv: nn.Conv2d, pattern: str) -> dict[str, Lowered]:
    """The ways that `finalize` chooses from, by name, with a ReLU."""
    from spre_fx.cpu_backend import CPUBackend  # noqa: PLC0415

    found = CPUBackend().candidates(conv, spre_fx.Pattern.parse(pattern))
    if isinstance(found, str):
        raise RuntimeError(f"expected a conv that can be packed: {found}")
    ways: dict[str, Lowered] = {}
    for way in found:
        layer: Any = way.module
        layer.activation = "relu"
        layout = "planar" if layer.layout.planar else "quartered" * layer.layout.quartered
        ways[way.kind if layer.winograd else layout or "permuted"] = way
    return ways


def sparse_runner(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    """One packed layer, as a planned graph runs it."""
    from spre_fx.cpu_timing import planned_call  # noqa: PLC0415

    run = planned_call(layer, x)
    if run is None:
        raise RuntimeError(f"expected a layer that the engine runs, found {layer}")
    return run


def nothing_to_do() -> tuple[nn.Conv2d, Tensor]:
    """A conv of which all but the call is negligible."""
    x = torch.randn(1, 16, 1, 1).contiguous(memory_format=torch.channels_last)
    return nn.Conv2d(16, 16, 1).requires_grad_(requires_grad=False), x


def calls_alone() -> dict[str, float]:
    """Milliseconds of a call that has nothing to compute, dense and sparse."""
    conv, x = nothing_to_do()
    packed = next(iter(sparse_ways(conv, "1:16").values())).module
    runs = {"dense": dense_runner(conv, x), "sparse": sparse_runner(packed, x)}
    return {name: timing.visit(run, 0.1) for name, run in runs.items()}


def measure(options: argparse.Namespace) -> list[Figures]:
    """The figures of each distinct conv."""
    x = networks.images(options.batch, options.pixels)
    by_pattern = {p: convs(options.model, p, x) for p in options.patterns}
    first = next(iter(by_pattern.values()))
    counts = Counter(shape for shape, _ in first.values())
    calls = calls_alone()
    print(f"a call with nothing to compute, ms: {_named(calls)}; taken off below", flush=True)
    figures = []
    for shape, count in counts.items():
        name = next(name for name, (other, _) in first.items() if other == shape)
        layers = {p: found[name][1] for p, found in by_pattern.items()}
        figures.append(_figures(shape, count, layers, calls, options))
    return figures


def _figures(
    shape: Shape,
    count: int,
    layers: dict[str, nn.Conv2d],
    calls: dict[str, float],
    options: argparse.Namespace,
) -> Figures:
    x = torch.randn(shape.size).contiguous(memory_format=torch.channels_last)
    any_layer = next(iter(layers.values()))
    ways = {pattern: sparse_ways(conv, pattern) for pattern, conv in layers.items()}
    runners = {"dense": dense_runner(any_layer, x)}
    for pattern, found in ways.items():
        runners |= {f"{pattern} {way}": sparse_runner(found[way].module, x) for way in found}
    times = timing.interleave(
        runners, seconds=options.seconds, rounds=options.rounds, visit_seconds=0.02
    )
    taken = {
        name: max(statistics.median(ms) - calls["dense" if name == "dense" else "sparse"], 1e-6)
        for name, ms in times.items()
    }
    fastest = {
        pattern: min(found, key=lambda way: taken[f"{pattern} {way}"] * found[way].price)
        for pattern, found in ways.items()
    }
    positions = any_layer(x)[:, 0].numel()
    weights = {"dense": any_layer.weight.numel()}
    weights |= {pattern: int((conv.weight != 0).sum()) for pattern, conv in layers.items()}
    return Figures(
        shape,
        count,
        {"dense": taken["dense"], **{p: taken[f"{p} {way}"] for p, way in fastest.items()}},
        {name: 2.0 * numbers * positions for name, numbers in weights.items()},
        fastest,
    )


def table(figures: list[Figures], limit: float) -> str:
    """Each conv, and the network's sum; a cell for each pattern."""
    patterns = [name for name in figures[0].milliseconds if name != "dense"]
    rows = [
        (
            *(str(each.shape), each.count),
            f"{each.milliseconds['dense']:.3f} ({each.rate('dense'):.0f})",
            *(_cell(each, pattern, limit) for pattern in patterns),
        )
        for each in figures
    ]
    rows.append(("all", sum(each.count for each in figures), *_sums(figures, patterns, limit)))
    headers = ("conv", "count", "dense ms (GFLOP/s)", *patterns)
    return tabulate(rows, headers, "github", disable_numparse=True)


def _cell(figures: Figures, pattern: str, limit: float) -> str:
    taken = figures.milliseconds[pattern]
    rate, left = figures.rate(pattern), taken - figures.floor(pattern, limit)
    ratio = figures.milliseconds["dense"] / taken
    return (
        f"{figures.ways[pattern]}: {taken:.3f} ms, {ratio:.2f}x, {rate:.0f} GFLOP/s, "
        f"{100 * rate / limit:.0f}%, left {figures.count * left:.2f} ms"
    )


def _sums(figures: list[Figures], patterns: list[str], limit: float) -> list[str]:
    dense = sum(each.count * each.milliseconds["dense"] for each in figures)
    cells = [f"{dense:.2f}"]
    for pattern in patterns:
        taken = sum(each.count * each.milliseconds[pattern] for each in figures)
        floor = sum(each.count * each.floor(pattern, limit) for each in figures)
        cells.append(
            f"{taken:.2f} ms, {dense / taken:.2f}x, {100 * floor / taken:.0f}%, "
            f"left {taken - floor:.2f} ms"
        )
    return cells


def _named(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--patterns", nargs="+", default=list(networks.PATTERNS))
    parser.add_argument("--seconds", type=float, default=2, help="to time a conv for")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", type=float, help="dense GFLOP/s on so many threads")
    parser.add_argument("--share", type=float, help="of the peak: the kernels' limit")
    options = parser.parse_args()
    loaded = engine.load()
    if loaded is None:
        sys.exit(engine.why_not())
    torch.set_num_threads(options.threads)
    print(f"{machine.sentence(machine.describe())}\n{options.model}, batch {options.batch}, "
          f"{options.pixels} pixels, {options.threads} threads", flush=True)  # fmt: skip
    with torch.no_grad():  # of weights made in inference mode no filters are transformed
        figures = measure(options)
    peak = options.peak or max(each.rate("dense") for each in figures)
    limit = (options.share or (0.75 if loaded.isa in _PERMUTING else 1.0)) * peak
    print(
        f"dense peak {peak:.0f} GFLOP/s, the kernels' limit {limit:.0f} GFLOP/s. For each pattern: "
        "the way and its ms; times faster than dense; GFLOP/s of non-zeros; share of the limit; ms "
        f"of the network that the limit leaves to gain\n\n{table(figures, limit)}"
    )


if __name__ == "__main__":
    main()
