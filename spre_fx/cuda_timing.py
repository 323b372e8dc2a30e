"""Times on a CUDA device: functions as CUDA graphs, replayed in turn between two events.

A replay has no launches in it, which take the CPU longer than small layers take the GPU. So times
are those of a model that runs in CUDA graphs, as under `torch.compile(mode="reduce-overhead")`; one
that launches kernel by kernel may be bound by launches whatever the kernels. Nothing here has run
on a GPU yet.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from textwrap import shorten

import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

Run = Callable[[], object]

_ROUNDS = 9  # of which the median counts
_SHORTEST = 1.0  # milliseconds between two events, which resolve half a microsecond
_WARM_UP = 3


def medians(runs: Sequence[Run]) -> list[float]:
    """The milliseconds of device time that each of several functions takes.

    Rounds of all functions are interleaved, so that clocks and heat are the same for all. Inputs
    stay where they are: what fits into the L2 cache is found there by all of them.
    """
    return [statistics.median(times) for times in rounds([as_graph(run) for run in runs])]


def rounds(runs: Sequence[Run], count: int = _ROUNDS) -> list[list[float]]:
    """The milliseconds of each of several functions, as they are, in each interleaved round."""
    repeats = [repeats_of(run) for run in runs]
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(count):
        for times, run, repeat in zip(found, runs, repeats, strict=True):
            times.append(milliseconds(run, repeat))
    return found


def as_graph(run: Run) -> Run:
    """A function captured as a CUDA graph; itself, with a warning, where that is not possible."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a capture may start no library and allocate no workspace
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        reason = shorten(str(error), 300)
        warnings.warn(
            f"timed with its launches, since no CUDA graph holds it: {reason}", stacklevel=2
        )
        return run
    return graph.replay


def repeats_of(run: Run) -> int:
    """How often to run in a row for events to resolve the time."""
    milliseconds(run, _WARM_UP)
    return max(1, min(1000, round(_SHORTEST / max(milliseconds(run, 1), 1e-3))))


def milliseconds(run: Run, repeats: int) -> float:
    """The device time of one of several runs in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    elapsed: float = start.elapsed_time(end)
    return elapsed / repeats


def compiled(layer: nn.Module, x: Tensor) -> Run | None:
    """A layer as `torch.compile` runs it on inputs like x; None, with a warning, where it cannot.

    It is traced first, since what is compiled at once is limited for each piece of code, and all
    convs have theirs in common.
    """
    run = torch.compile(symbolic_trace(nn.Sequential(layer)), dynamic=False)
    try:
        run(x)
    except Exception as error:  # whatever the compiler, or the one below it, raises
        reason = shorten(f"{type(error).__name__}: {error}", 300)
        warnings.warn(f"dense layers are measured without torch.compile: {reason}", stacklevel=2)
        return None
    return lambda: run(x)


@contextmanager
def fastest_convolutions() -> Iterator[None]:
    """Let cuDNN measure its algorithms instead of guessing."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
