"""Times on a CUDA device: the order of rounds, the compiled peer, and what cannot be captured."""

import itertools
import time

import pytest
import torch
from torch import nn

from spre_fx import cuda_timing
from spre_fx.cuda_timing import compiled, fastest_convolutions, medians, repeats_of, rounds


@pytest.fixture
def clock(monkeypatch):
    """Without a device: each run says how long it takes, in milliseconds. The log of all runs."""
    log = []

    def milliseconds(run, repeats):
        log.append((run.name, repeats))
        return next(run.times)

    monkeypatch.setattr(cuda_timing, "as_graph", lambda run: run)
    monkeypatch.setattr(cuda_timing, "milliseconds", milliseconds)
    return log


class Run:
    def __init__(self, name, *times):
        self.name = name
        self.times = itertools.chain([0.0, 0.5], times, itertools.repeat(times[-1]))


def test_rounds_are_interleaved_and_their_medians_count(clock):
    assert medians([Run("a", 9, 1, 2), Run("b", 5, 4, 3)]) == [2, 3]
    assert [name for name, _ in clock[4:]] == ["a", "b"] * 9
    assert {repeats for _, repeats in clock[4:]} == {2}  # of half a millisecond
    assert rounds([Run("a", 1, 2, 3)], 3) == [[1, 2, 3]]


@pytest.mark.parametrize(("time", "repeats"), [(0.0, 1000), (0.01, 100), (0.4, 2), (50.0, 1)])
def test_short_runs_are_repeated_until_events_can_tell(clock, time, repeats):
    run = Run("a", 1)
    run.times = iter([1.0, time])
    assert repeats_of(run) == repeats


@torch._dynamo.config.patch(recompile_limit=4)  # timm raises it to a million
def test_more_convs_are_compiled_than_a_piece_of_code_may_be(monkeypatch):
    graphs = []

    def backend(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile_(f, backend=backend, **kw))
    count = 6
    for channels in range(1, count + 1):
        x = torch.randn(1, channels, 4, 4)
        layer = nn.Conv2d(channels, 2, 3)
        run = compiled(layer, x)
        assert run is not None
        assert torch.equal(run(), layer(x))
    assert len(graphs) == count


def test_a_compiler_that_fails_is_warned_of(monkeypatch):
    def backend(graph_module, inputs):
        raise ValueError("no such compiler\nand more")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile_(f, backend=backend, **kw))
    with pytest.warns(UserWarning, match="without torch.compile: .*no such compiler"):
        assert compiled(nn.Linear(2, 2), torch.randn(1, 2)) is None


def test_cudnn_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)

    @fastest_convolutions()
    def fail():
        assert torch.backends.cudnn.benchmark
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert not torch.backends.cudnn.benchmark


@pytest.mark.cuda
def test_cuda_tells_long_from_short():
    small, large = (torch.randn(n, n, device="cuda") for n in (256, 4096))
    found = medians([lambda: small @ small, lambda: large @ large])
    assert 0 < 4 * found[0] < found[1]


@pytest.mark.cuda
def test_cuda_runs_what_no_graph_holds_with_its_launches():
    x = torch.randn(16, device="cuda")

    def run():
        time.sleep(0.002)
        return x.sum().item()

    with pytest.warns(UserWarning, match="no CUDA graph holds it"):
        assert medians([run])[0] > 1
