"""How long the masks of one layer take, next to plain ways of computing the same with torch.

Run: python benchmarks/masks.py [--threads 2] [--repeats 15]

Each line is one layer and pattern: the median of interleaved runs in ms, with the quartiles, for
this library and for a stable sort (N:M) or `torch.kthvalue` and a full argsort (live taps), all
checked to give the same mask first. Ratios are what to quote: machines differ.
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

from spre_fx import Pattern, masks

SHAPES = [(512, 512, 3, 3), (2048, 512, 1, 1)]
PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(1, 8), Pattern(1, 16), Pattern(8, 16)]


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


def interleaved(functions: list[Callable[[], Tensor]], repeats: int) -> list[list[float]]:
    """Milliseconds of each run of each function, the functions in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            taken.append(1e3 * (time.perf_counter() - start))
    return [taken[1:] for taken in times]


def cell(taken: list[float]) -> str:
    low, median, high = statistics.quantiles(taken, n=4)
    return f"{median:.1f} ({low:.1f}-{high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, "
          f"{options.threads} threads; ms, median (quartiles)\n")  # fmt: skip
    rows = []
    for shape in SHAPES:
        weight = torch.randn(shape)
        for pattern in PATTERNS:
            ways: list[Callable[[Tensor, Pattern], Tensor]] = [
                masks.nm_mask,
                nm_by_sort,
                masks.live_taps,
                live_by_kthvalue,
                live_by_argsort,
            ]
            results = [way(weight, pattern) for way in ways]
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[2], results[3])
            assert torch.equal(results[2], results[4])
            calls = [lambda way=way, p=pattern, w=weight: way(w, p) for way in ways]
            times = interleaved(calls, options.repeats)
            medians = [statistics.median(taken) for taken in times]
            rows.append(
                (
                    "x".join(map(str, shape)),
                    pattern,
                    cell(times[0]),
                    f"{medians[1] / medians[0]:.1f}x",
                    cell(times[2]),
                    f"{medians[3] / medians[2]:.1f}x",
                    f"{medians[4] / medians[2]:.1f}x",
                )
            )
    headers = (
        "weight",
        "pattern",
        "N:M mask",
        "stable sort takes",
        "live taps",
        "kthvalue takes",
        "argsort takes",
    )
    print(tabulate(rows, headers))


if __name__ == "__main__":
    main()
