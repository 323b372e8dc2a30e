"""Chooses how a layer runs by measuring: the dense layer and each sparse way, on its real input.

Times depend on the machine, the versions of torch and of the kernels, the layer's settings and its
input's shape. All of these are the key under which times are kept, in memory and in a file, so that
layers of equal settings are measured once. On a CPU the engine runs them as it does in a planned
graph, and the dense layer runs by torch as well. On a CUDA device times are `cuda_timing`'s, and
the dense layer also runs as `torch.compile` compiles it. The file lies in the user's cache
directory (`$XDG_CACHE_HOME/spre_fx`, or `~/.cache/spre_fx`); the environment variable
`SPRE_FX_CACHE` names another directory, or says "off".
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spre_fx import cpu_timing, cuda_timing
from spre_fx.atomic_write import write_atomically
from spre_fx.backends import Lowered, Tunable, dense
from spre_fx.modules import SPARSIFIABLE

Shape = tuple[int, ...]
_ROUNDS = 7  # of which the median counts
_SHORTEST = 2e-3  # seconds: what is faster is called several times in a row
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_SETTINGS = (*_CONV, "in_features", "out_features")


@dataclass(frozen=True)
class Choice:
    """How a layer runs.

    Attributes:
        lowered: The way chosen.
        dense_ms: Milliseconds of the dense layer, None where nothing was measured.
        chosen_ms: Milliseconds of the way chosen.
    """

    lowered: Lowered
    dense_ms: float | None = None
    chosen_ms: float | None = None


class Timings:
    """Measured times, kept in memory and in a file.

    Args:
        machine: What the times are of: the processor and the version of the kernels.
        file: Where they are kept; None to keep them in memory only. A file that is missing, or
            holds something else, counts as empty.
    """

    def __init__(self, machine: str, file: Path | None = None) -> None:
        self.machine = machine
        self.file = file
        self._times = _read(file)
        self._new = False

    @classmethod
    def of_machine(cls, machine: str) -> Timings:
        """The times of this machine and this torch that are kept in the cache directory."""
        directory = cache_directory()
        name = hashlib.sha256(f"{machine} {torch.__version__}".encode()).hexdigest()[:16]
        return cls(machine, None if directory is None else directory / f"timings-{name}.json")

    def choose(self, layer: nn.Module, ways: Sequence[Lowered], shapes: Sequence[Shape]) -> Choice:
        """The fastest way to run a layer; dense where none is faster than dense.

        Args:
            layer: The dense layer.
            ways: The sparse ways.
            shapes: The shapes of its inputs, one for each call in a forward.
        """
        found = [self.milliseconds(layer, ways, shape) for shape in shapes]
        totals = [sum(times) for times in zip(*found, strict=True)]
        dense_ms, sparse = totals[0], totals[1:]
        fastest = min(range(len(sparse)), key=lambda i: sparse[i] * ways[i].price)
        chosen_ms, way = sparse[fastest], ways[fastest]
        where = " and ".join("x".join(map(str, shape)) for shape in dict.fromkeys(shapes))
        if chosen_ms * way.price < dense_ms:
            if isinstance(way.module, Tunable):
                way.module.tune(_inputs(layer, shapes[0])[1])
            ratio = dense_ms / chosen_ms
            why = f"{way.why}: {ratio:.2f} times as fast as dense, on {where}"
            return Choice(Lowered(way.module, way.kind, why), dense_ms, chosen_ms)
        why = f"dense: {way.kind} takes {chosen_ms / dense_ms:.2f} times as long, on {where}"
        if chosen_ms < dense_ms:
            why = (
                f"dense: {way.kind} is {dense_ms / chosen_ms:.2f} times as fast, for its memory it "
                f"would have to be {way.price} times, on {where}"
            )
        return Choice(dense(layer, why), dense_ms, dense_ms)

    def milliseconds(
        self, layer: nn.Module, ways: Sequence[Lowered], shape: Shape
    ) -> tuple[float, ...]:
        """The time of the dense layer, then of each way, on an input of that shape."""
        key = _key(layer, ways, shape)
        times = self._times.get(key)
        if times is None:
            times = _measure(layer, ways, shape)
            self._times[key] = times
            self._new = True
        return times

    def save(self) -> None:
        """Add what was measured to the file. A directory that cannot be written is no error."""
        if self.file is None or not self._new:
            return
        times = _read(self.file) | self._times  # another process may have added some
        content = {"machine": self.machine, "torch": torch.__version__, "milliseconds": times}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.file, json.dumps(content, indent=1, sort_keys=True).encode())
        except OSError:
            return
        self._new = False


def cache_directory() -> Path | None:
    """Where measured times are kept, None where they are not."""
    chosen = os.environ.get("SPRE_FX_CACHE", "")
    if chosen.lower() == "off":
        return None
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "spre_fx"


def _read(file: Path | None) -> dict[str, tuple[float, ...]]:
    try:
        content = {} if file is None else json.loads(file.read_bytes())
        return {
            str(key): tuple(float(each) for each in times)
            for key, times in content.get("milliseconds", {}).items()
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _key(layer: nn.Module, ways: Sequence[Lowered], shape: Shape) -> str:
    base = next(kind.__name__ for kind in SPARSIFIABLE if isinstance(layer, kind))
    weight = layer.weight
    assert isinstance(weight, Tensor)
    facts = [
        base,
        *(f"{name}={getattr(layer, name)}" for name in _SETTINGS if hasattr(layer, name)),
    ]
    facts += [f"input={shape}", str(weight.dtype).removeprefix("torch."), str(weight.device.type)]
    facts += [f"threads={torch.get_num_threads()}"]
    facts += [f"{way.kind}({getattr(way.module, 'layout', '')})" for way in ways]
    return " ".join(facts)


@torch.inference_mode()
def _measure(layer: nn.Module, ways: Sequence[Lowered], shape: Shape) -> tuple[float, ...]:
    x, last = _inputs(layer, shape)
    for way in ways:
        if isinstance(way.module, Tunable):
            way.module.tune(last)
    baseline: Any = copy.deepcopy(layer)
    runs = [_planned_call(way.module, last) or _call(way.module, last) for way in ways]
    # Dense in the fastest of its ways, though a planned graph runs it by the engine if it can: no
    # sparse way is taken that is slower than torch alone.
    if (planned := _planned_call(baseline, last)) is not None:
        runs.append(planned)
    if last is not x:  # dense in the faster of the two memory formats
        runs.append(_call(copy.deepcopy(baseline).to(memory_format=torch.channels_last), last))
        baseline = baseline.to(memory_format=torch.contiguous_format)
    runs.append(_call(baseline, x))
    times = _on_cuda(runs, layer, last) if x.is_cuda else medians(runs, x.device)
    return (min(times[len(ways) :]), *times[: len(ways)])


def _on_cuda(runs: list[Callable[[], object]], layer: nn.Module, x: Tensor) -> list[float]:
    """The times of the runs, and of the layer compiled."""
    with cuda_timing.fastest_convolutions():
        run = cuda_timing.compiled(copy.deepcopy(layer).to(memory_format=torch.channels_last), x)
        return cuda_timing.medians(runs if run is None else [*runs, run])


def _inputs(layer: nn.Module, shape: Shape) -> tuple[Tensor, Tensor]:
    """A random input, and the same in channels_last where it is one of images."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    x = torch.randn(shape, device=weight.device, dtype=weight.dtype)
    return x, x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _planned_call(module: nn.Module, x: Tensor) -> Callable[[], object] | None:
    return cpu_timing.planned_call(module, x) if x.is_cpu else None


def _call(module: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: module(x)


def medians(runs: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """The milliseconds that each of several functions takes: medians of interleaved rounds."""
    repeats = [_repeats(run, device) for run in runs]
    rounds = [
        [_seconds(run, count, device) for run, count in zip(runs, repeats, strict=True)]
        for _ in range(_ROUNDS)
    ]
    return [1e3 * statistics.median(times) for times in zip(*rounds, strict=True)]


def _repeats(run: Callable[[], object], device: torch.device) -> int:
    """How often to call in a row, after calls that warm caches up."""
    _seconds(run, 2, device)
    return max(1, min(200, int(_SHORTEST / max(_seconds(run, 1, device), 1e-9))))


def _seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
