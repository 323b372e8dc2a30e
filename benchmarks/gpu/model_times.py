"""What ResNet-50 gains: through `finalize`, next to eager, torch.compile and TensorRT.

The weights are random and N:M, batch norms are folded on both sides, memory is channels_last. But
for the columns "eager" and "spre_fx", which launch kernel by kernel, all run in CUDA graphs.

First every type and batch gets what is quick to make; then, one after the other, the compiled
models and TensorRT's engines, which take up to minutes each, as far as the time goes. All that
there is for a type and batch is timed in turn, again after each that is added.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import tensorrt_engine
import torch
from correctness import relative
from limits import time_limit
from report import Report, spread
from torch import Tensor, nn
from torchvision.models import resnet50

import spre_fx
from spre_fx import cuda_timing

TABLE = "ResNet-50: milliseconds for a batch, median (quartiles)"
LEDGER = "ResNet-50: what its layers run as, and errors relative to float64"


@dataclass(eq=False)
class Setting:
    """One type and batch.

    Attributes:
        x: The input.
        dense: The folded model of ordinary layers.
        lowered: The same as `finalize` lowers it.
        runs: What there is to time, by name.
        times: Name -> milliseconds of each round.
    """

    x: Tensor
    dense: nn.Module
    lowered: nn.Module
    runs: dict[str, cuda_timing.Run] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{str(self.x.dtype).removeprefix('torch.')}, batch {self.x.shape[0]}"

    def add(self, name: str, run: cuda_timing.Run) -> None:
        """Add one to those that are timed, and time all of them in turn."""
        runs = self.runs | {name: run}
        times = cuda_timing.rounds(list(runs.values()))
        self.runs, self.times = runs, dict(zip(runs, times, strict=True))

    def row(self) -> dict[str, Any]:
        """The columns of the table."""
        medians = {name: statistics.median(times) for name, times in self.times.items()}
        ours = [ms for name, ms in medians.items() if name.startswith("spre_fx")]
        others = [ms for name, ms in medians.items() if not name.startswith("spre_fx")]
        row: dict[str, Any] = {"model": str(self)}
        row |= {name: spread(times) for name, times in self.times.items()}
        return row | {"best other over best spre_fx": min(others) / min(ours) if ours else None}


def run(report: Report, options: argparse.Namespace, deadline: float) -> None:
    """One row for each type and batch, of what there was time for."""
    os.environ["SPRE_FX_CACHE"] = "off"
    prepared = spre_fx.prepare(resnet50(), options.pattern).eval().to(options.device)
    if (reason := tensorrt_engine.why_not()) is not None:
        report.note(reason)
    settings: list[Setting] = []
    with torch.no_grad(), cuda_timing.fastest_convolutions():
        try:
            for dtype, batch in itertools.product(options.dtypes, options.batches):
                x = torch.randn(batch, 3, 224, 224, dtype=getattr(torch, dtype))
                make = partial(start, report, prepared, x.to(options.device), settings)
                attempt(report, f"{dtype}, batch {batch}", make, deadline)
            for setting in settings:
                for name, make in slow(setting):
                    attempt(report, f"{setting}, {name}", make, deadline)
        finally:
            for setting in settings:
                report.add(TABLE, setting.row())


def attempt(report: Report, what: str, make: Callable[[], None], deadline: float) -> None:
    """Do something unless the time is over, and note it if it fails or takes too long."""
    left = deadline - time.monotonic()
    if left < 1:
        report.note(f"{what}: out of time")
        return
    started = time.monotonic()
    try:
        with time_limit(left):
            make()
    except Exception as error:
        report.note(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    print(f"  {what}: took {time.monotonic() - started:.0f} s", flush=True)


def start(report: Report, prepared: nn.Module, x: Tensor, settings: list[Setting]) -> None:
    """Make what is quick to make for an input."""
    x = x.contiguous(memory_format=torch.channels_last)
    dense = spre_fx.finalize(prepared, "dense", dtype=x.dtype)
    lowered = spre_fx.finalize(prepared, "cuda", example_inputs=x, dtype=x.dtype)
    setting = Setting(x, *(m.to(memory_format=torch.channels_last) for m in (dense, lowered)))
    report.add(LEDGER, {"model": str(setting)} | ledger(setting))
    settings.append(setting)
    for name, model in (("eager", dense), ("spre_fx", lowered)):
        setting.add(name, partial(model, x))
        setting.add(f"{name}, graph", cuda_timing.as_graph(partial(model, x)))


def ledger(setting: Setting) -> dict[str, Any]:
    """How many layers run as what, and the errors of both models."""
    few = setting.x[:2]
    exact = copy.deepcopy(setting.dense).double()(few.double())
    backends = Counter(site.backend or "dense" for site in spre_fx.sites(setting.lowered))
    return dict(backends) | {
        "dense error": relative(setting.dense(few), exact),
        "spre_fx error": relative(setting.lowered(few), exact),
    }


def slow(setting: Setting) -> Iterator[tuple[str, Callable[[], None]]]:
    """What takes long to make: names, and what makes and times it."""
    for name, model in (("compiled", setting.dense), ("spre_fx compiled", setting.lowered)):
        yield name, partial(add_compiled, setting, name, model)
    for sparse in () if tensorrt_engine.why_not() else (False, True):
        yield "TensorRT" + " sparse" * sparse, partial(add_tensorrt, setting, sparse)


def add_compiled(setting: Setting, name: str, model: nn.Module) -> None:
    """A model by torch.compile with max-autotune, in a CUDA graph of ours like all others."""
    compiled = torch.compile(model, mode="max-autotune-no-cudagraphs", dynamic=False)
    setting.add(name, cuda_timing.as_graph(partial(compiled, setting.x)))


def add_tensorrt(setting: Setting, sparse: bool) -> None:
    """The dense model by TensorRT."""
    content = tensorrt_engine.onnx_file(setting.dense, setting.x)
    engine = tensorrt_engine.build(content, setting.x, sparse=sparse)
    setting.add("TensorRT" + " sparse" * sparse, cuda_timing.as_graph(engine))
