"""How long the masks of one layer take, next to plain ways of computing the same with torch.

Run: python benchmarks/masks.py [--threads 2] [--repeats 15]

Each line is one layer: the median of interleaved runs in ms, with the quartiles, for this library,
and how many times as long others take, all checked to give the same first. Of masks, others are
what the library computes where it has no engine, a stable sort (N:M), `torch.kthvalue` and a full
argsort (live taps); of masked weights and their SR-STE gradients, the same in operations of torch.
On one thread times are those of the thread, else of the clock. Ratios are what to quote: machines
differ.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor

from spre_fx import Pattern, engine, mask_ops, masks
from spre_fx.masked_weight import StraightThroughDecay

SHAPES = [(512, 512, 3, 3), (2048, 512, 1, 1)]
PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(1, 8), Pattern(1, 16), Pattern(8, 16)]
DECAY = 2e-4


def nm_by_sort(weight: Tensor, pattern: Pattern) -> Tensor:
    groups = weight.abs().unflatten(1, (-1, pattern.m))
    order = groups.argsort(dim=2, descending=True, stable=True)[:, :, : pattern.n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order, True).flatten(1, 2)


def live_by_kthvalue(weight: Tensor, pattern: Pattern) -> Tensor:
    magnitude, kept = weight.abs(), pattern.kept(weight.numel())
    threshold = magnitude.flatten().kthvalue(weight.numel() - kept + 1).values
    return live_from(magnitude >= threshold, weight, pattern)


def live_by_argsort(weight: Tensor, pattern: Pattern) -> Tensor:
    order = weight.abs().flatten().argsort(dim=0, descending=True, stable=True)
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[order[: pattern.kept(weight.numel())]] = True
    return live_from(mask.view(weight.shape), weight, pattern)


def live_from(mask: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:
    return mask.sum((0, 1)) * pattern.m > pattern.n * weight.shape[:2].numel()


def nm_by_torch(weight: Tensor, pattern: Pattern) -> Tensor:
    return mask_ops.nm_mask_by_torch(weight, pattern.n, pattern.m)


def live_by_torch(weight: Tensor, pattern: Pattern) -> Tensor:
    return live_from(mask_ops.largest(weight, pattern.kept(weight.numel())), weight, pattern)


NM = {"by torch": nm_by_torch, "stable sort": nm_by_sort}
LIVE = {"by torch": live_by_torch, "kthvalue": live_by_kthvalue, "argsort": live_by_argsort}


def interleaved(
    functions: list[Callable[[], Tensor]], repeats: int, clock: Callable[[], float]
) -> list[list[float]]:
    """Milliseconds of each run of each function, the functions in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, taken in zip(functions, times, strict=True):
            start = clock()
            function()
            taken.append(1e3 * (clock() - start))
    return [taken[1:] for taken in times]


def cells(times: list[list[float]]) -> list[str]:
    """The first with its quartiles, and how many times as long each of the others takes."""
    low, median, high = statistics.quantiles(times[0], n=4)
    others = (f"{statistics.median(taken) / median:.1f}x" for taken in times[1:])
    return [f"{median:.2f} ({low:.2f}-{high:.2f})", *others]


def mask_rows(measure: Callable[[list[Callable[[], Tensor]]], list[str]]) -> list[list[str]]:
    rows = []
    for shape in SHAPES:
        weight = torch.randn(shape)
        for pattern in PATTERNS:
            row = ["x".join(map(str, shape)), str(pattern)]
            for ours, others in ((masks.nm_mask, NM), (masks.live_taps, LIVE)):
                ways = [ours, *others.values()]
                results = [way(weight, pattern) for way in ways]
                assert all(torch.equal(results[0], other) for other in results[1:])
                row += measure([lambda way=way, p=pattern, w=weight: way(w, p) for way in ways])
            rows.append(row)
    return rows


def masked_rows(measure: Callable[[list[Callable[[], Tensor]]], list[str]]) -> list[list[str]]:
    rows = []
    for shape in SHAPES:
        weight, gradient = torch.randn(shape, requires_grad=True), torch.randn(shape)
        plain, mask = weight.detach(), masks.nm_mask(weight, Pattern(2, 4))
        masked = StraightThroughDecay.apply(weight, mask, DECAY)
        forward = [
            lambda w=weight, b=mask: StraightThroughDecay.apply(w, b, DECAY),
            lambda w=plain, b=mask: w * b,
        ]
        backward = [
            lambda w=weight, g=gradient, y=masked: torch.autograd.grad(y, w, g, True)[0],
            lambda w=plain, b=mask, g=gradient: torch.where(b, g, g + DECAY * w),
        ]
        assert all(torch.equal(ours(), others()) for ours, others in (forward, backward))
        rows.append(["x".join(map(str, shape)), *measure(forward), *measure(backward)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    loaded = engine.load()
    isa = loaded.isa if loaded else "none"
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, "
          f"engine {isa}, {options.threads} threads; ms, median (quartiles)\n")  # fmt: skip
    clock = time.thread_time if options.threads == 1 else time.perf_counter

    def measure(functions: list[Callable[[], Tensor]]) -> list[str]:
        return cells(interleaved(functions, options.repeats, clock))

    print(tabulate(mask_rows(measure), ("weight", "pattern", "N:M mask", *NM, "live taps", *LIVE)))
    headers = ("weight", "B * W", "by torch", "its gradient", "by torch")
    print(f"\n{tabulate(masked_rows(measure), headers)}")


if __name__ == "__main__":
    main()
