"""What each layer gains: ResNet-50's distinct N:M layers, by every way to run them.

"GEMM alone" multiplies with a patch matrix that is there already: what a kernel that forms its
patches on the fly could come near to.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from correctness import on
from report import Report, spread
from torch import Tensor, nn
from torchvision.models import resnet50

from spre_fx import cuda_timing
from spre_fx.cuda_backend import libraries, ways
from spre_fx.cuda_layers import SemiStructuredConv2d
from spre_fx.patterns import Pattern

TABLE = "Layers of ResNet-50: milliseconds on the device in CUDA graphs, median (quartiles)"


@dataclass(frozen=True)
class Site:
    """A conv, or a linear as one of 1 x 1 pixels, and how often the model has it."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    size: int

    def layer(self) -> nn.Module:
        """With a bias, as after folding."""
        if self.size == 1:
            return nn.Linear(self.inputs, self.outputs)
        padding = self.kernel // 2
        return nn.Conv2d(self.inputs, self.outputs, self.kernel, self.stride, padding)

    def shape(self, batch: int) -> tuple[int, ...]:
        """Of its input."""
        image = (self.inputs, self.size, self.size)
        return (batch, self.inputs) if self.size == 1 else (batch, *image)

    def __str__(self) -> str:
        kernel = f"{self.kernel}x{self.kernel}" + f"/{self.stride}" * (self.stride > 1)
        return f"{self.inputs}->{self.outputs} {kernel} on {self.size}x{self.size}"


def sites() -> Counter[Site]:
    """The distinct layers of ResNet-50 that can be N:M, all but its stem, and how many of each."""
    with torch.device("meta"):
        model, image = resnet50(), torch.empty(1, 3, 224, 224)
    found: Counter[Site] = Counter()

    def note(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        (x,) = arguments
        if isinstance(layer, nn.Linear):
            found[Site(layer.in_features, layer.out_features, 1, 1, 1)] += 1
        elif layer.in_channels > 3:
            kernel, stride = layer.kernel_size[0], layer.stride[0]
            found[Site(layer.in_channels, layer.out_channels, kernel, stride, x.shape[2])] += 1

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_pre_hook(note)
    model(image)
    return found


def run(report: Report, options: argparse.Namespace, deadline: float) -> None:
    """One row for each type, batch and site, until the deadline."""
    wanted = [
        (dtype, batch, site, count)
        for dtype in options.dtypes
        for batch in options.batches
        for site, count in sites().items()
    ]
    for done, (dtype, batch, site, count) in enumerate(wanted):
        if time.monotonic() > deadline:
            report.note(f"layers: {done} of {len(wanted)} rows, out of time")
            return
        row = {"type": dtype, "batch": batch, "layer": str(site), "times": count}
        try:
            layer, x = on(
                torch.device(options.device),
                getattr(torch, dtype),
                site.layer(),
                Pattern.parse(options.pattern),
                site.shape(batch),
            )
            row |= measure(layer, x, Pattern.parse(options.pattern))
        except (RuntimeError, ValueError) as error:
            row |= {"note": f"failed: {str(error).strip().splitlines()[0]}"}
        report.add(TABLE, row)


@torch.inference_mode()
def measure(layer: nn.Module, x: Tensor, pattern: Pattern) -> dict[str, object]:
    """The columns of one row."""
    usable = libraries(layer, pattern, torch.cuda.get_device_capability(x.device))
    runs: dict[str, cuda_timing.Run] = {"eager": partial(layer, x)}
    for library in () if isinstance(usable, str) else usable:
        runs |= sparse_runs(layer, library, x)
    with cuda_timing.fastest_convolutions():
        compiled = cuda_timing.compiled(layer, x)
        if compiled is not None:
            runs["compiled"] = compiled
        replays = [cuda_timing.as_graph(run) for run in runs.values()]
        times = dict(zip(runs, cuda_timing.rounds(replays), strict=True))
    medians = {name: statistics.median(each) for name, each in times.items()}
    dense = min(medians[name] for name in ("eager", "compiled") if name in medians)
    sparse = [m for n, m in medians.items() if n not in ("eager", "compiled") and "alone" not in n]
    return {name: spread(each) for name, each in times.items()} | {
        "dense over sparse": dense / min(sparse) if sparse else None,
        "note": usable if isinstance(usable, str) else None,
    }


def sparse_runs(layer: nn.Module, library: str, x: Tensor) -> dict[str, cuda_timing.Run]:
    """Every way of a library, by default and after a search; of a K x K conv also its GEMM."""
    runs: dict[str, cuda_timing.Run] = {}
    for way in ways(layer, library):
        default, searched = way.module, copy.deepcopy(way.module)
        method = getattr(default, "method", "patch matrix")
        name = library if method == "patch matrix" else f"{library} {method}"
        searched.tune(x)
        runs[name] = partial(default, x)
        if searched.algorithm != default.algorithm:
            runs[f"{name} searched"] = partial(searched, x)
        if isinstance(searched, SemiStructuredConv2d) and searched.kernel_size != (1, 1):
            taps = searched.kernel_size[0] * searched.kernel_size[1]
            shape = (searched(x)[:, 0].numel(), taps * searched.in_channels)
            patches = torch.randn(shape, dtype=x.dtype, device=x.device)
            runs[f"{name}, GEMM alone"] = partial(searched.multiply, patches, searched.out_channels)
    return runs
