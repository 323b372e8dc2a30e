"""Is it right: each library's layers against float64, by default and after a search."""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections import defaultdict
from collections.abc import Iterator

import torch
from report import Report
from torch import Tensor, nn

from spre_fx.cuda_backend import libraries, ways
from spre_fx.masks import nm_mask
from spre_fx.patterns import Pattern

TABLE = "Correctness: largest error over largest output, in units of eps"
PATTERNS = ("2:4", "1:4", "1:8", "1:16")
ALLOWED = 4  # eps: the output is rounded once, sums are float32
LINEARS = ((64, 64, 1), (96, 80, 49), (2048, 1000, 256), (70, 33, 7))
CONVS = (
    (64, 64, 1, {}),
    (256, 512, 1, {"stride": 2}),
    (64, 64, 3, {"padding": 1}),
    (128, 96, 3, {"stride": 2, "padding": 1}),
    (70, 33, 3, {"padding": 1, "dilation": 2}),
    (32, 40, (5, 1), {"padding": "same"}),
)


def run(report: Report, options: argparse.Namespace, deadline: float) -> None:
    """One row for each library and type, of the worst case."""
    device = torch.device(options.device)
    capability = torch.cuda.get_device_capability(device)
    found: dict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)
    refused = set()
    for dtype, pattern, (layer, x) in cases(device):
        if time.monotonic() > deadline:
            report.note("correctness: not all cases, out of time")
            break
        usable = libraries(layer, pattern, capability)
        if isinstance(usable, str):
            refused.add(usable)
            continue
        exact = copy.deepcopy(layer).double()(x.double()).detach()
        for library in usable:
            for error, what in errors(layer, library, x, exact):
                units = error / torch.finfo(dtype).eps
                found[library, str(dtype)].append((units, f"{pattern} {layer} {what}"))
    for sentence in sorted(refused):
        report.note(f"correctness: {sentence}")
    for (library, name), each in found.items():
        worst, case = max(each)
        wrong = sum(not units <= ALLOWED for units, _ in each)  # a NaN is wrong
        report.add(
            TABLE,
            {
                "library": library,
                "type": name.removeprefix("torch."),
                "cases": len(each),
                "wrong": wrong,
                "worst": worst,
                "worst case": case,
            },
        )


def cases(device: torch.device) -> Iterator[tuple[torch.dtype, Pattern, tuple[nn.Module, Tensor]]]:
    """Types, patterns, and layers with inputs."""
    for dtype, text in itertools.product((torch.float16, torch.bfloat16), PATTERNS):
        pattern = Pattern.parse(text)
        for inputs, outputs, rows in LINEARS:
            layer: nn.Module = nn.Linear(inputs, outputs, bias=rows != 49)
            yield dtype, pattern, on(device, dtype, layer, pattern, (rows, inputs))
        for inputs, outputs, kernel, settings in CONVS:
            layer = nn.Conv2d(inputs, outputs, kernel, **settings)
            yield dtype, pattern, on(device, dtype, layer, pattern, (3, inputs, 15, 13))


def on(
    device: torch.device,
    dtype: torch.dtype,
    layer: nn.Module,
    pattern: Pattern,
    shape: tuple[int, ...],
) -> tuple[nn.Module, Tensor]:
    """A layer with N:M weights and an input, in channels_last."""
    with torch.no_grad():
        layer.weight *= nm_mask(layer.weight, pattern)
    x = torch.randn(shape, device=device, dtype=dtype)
    layer = layer.eval().to(device, dtype).to(memory_format=torch.channels_last)
    return layer, x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


@torch.inference_mode()
def errors(layer: nn.Module, library: str, x: Tensor, exact: Tensor) -> Iterator[tuple[float, str]]:
    """The error of every way to run a layer: by default, after a search, then on other sizes."""
    for way in ways(layer, library):
        yield relative(way.module(x), exact), "default"
        way.module.tune(x)
        yield relative(way.module(x), exact), "searched"
        yield relative(way.module(x[:1]), exact[:1]), "searched for more rows"


def relative(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).abs().max() / exact.abs().max())
