"""The choice by measuring: times, their cache, and what a cache file may do wrong."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spre_fx import choice, cuda_timing, engine
from spre_fx.backends import Lowered
from spre_fx.choice import Timings, cache_directory, medians
from spre_fx.packed_layers import PackedConv2d, PackedLinear

SHAPE = (2, 8, 6, 6)


class Counting(nn.Module):
    """Counts its calls, and waits 1 ms in each."""

    layout = "of 3 slots"

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        time.sleep(0.001)
        return x


def ways() -> list[Lowered]:
    return [Lowered(Counting(), "toy", "counts")]


def test_layers_of_equal_settings_and_shapes_are_measured_once() -> None:
    timings = Timings("machine")
    first, second, other, stride = ways(), ways(), ways(), ways()
    times = timings.milliseconds(nn.Conv2d(8, 8, 3), first, SHAPE)
    assert first[0].module.calls > 0
    assert timings.milliseconds(nn.Conv2d(8, 8, 3), second, SHAPE) == times
    assert second[0].module.calls == 0
    timings.milliseconds(nn.Conv2d(8, 8, 3), other, (1, 8, 6, 6))
    timings.milliseconds(nn.Conv2d(8, 8, 3, stride=2), stride, SHAPE)
    assert other[0].module.calls > 0
    assert stride[0].module.calls > 0


@pytest.mark.parametrize("change", ["layout", "kind", "dtype", "threads"])
def test_what_changes_times_is_part_of_the_key(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    timings = Timings("machine")
    layer, again = nn.Linear(8, 8), ways()
    timings.milliseconds(layer, ways(), (2, 8))
    if change == "layout":
        again[0].module.layout = "of 4 slots"
    elif change == "kind":
        again = [Lowered(again[0].module, "other", "counts")]
    elif change == "dtype":
        layer = layer.bfloat16()
    else:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    timings.milliseconds(layer, again, (2, 8))
    assert again[0].module.calls > 0


def test_a_layer_called_twice_counts_twice() -> None:
    timings = Timings("machine")
    conv, found = nn.Conv2d(8, 8, 3), ways()
    once = timings.choose(conv, found, [SHAPE])
    twice = timings.choose(conv, found, [SHAPE, SHAPE])
    assert twice.dense_ms == 2 * once.dense_ms
    assert twice.lowered.why.endswith("on 2x8x6x6")


def test_times_are_kept_in_a_file_and_found_again(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "timings.json"
    timings = Timings("machine", file)
    times = timings.milliseconds(nn.Conv2d(8, 8, 3), ways(), SHAPE)
    timings.save()
    again = ways()
    assert Timings("machine", file).milliseconds(nn.Conv2d(8, 8, 3), again, SHAPE) == times
    assert again[0].module.calls == 0


def test_times_that_another_process_has_added_stay(tmp_path: Path) -> None:
    file = tmp_path / "timings.json"
    one, other = Timings("machine", file), Timings("machine", file)
    one.milliseconds(nn.Conv2d(8, 8, 3), ways(), SHAPE)
    other.milliseconds(nn.Linear(8, 8), ways(), (2, 8))
    one.save()
    other.save()
    assert len(json.loads(file.read_bytes())["milliseconds"]) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"milliseconds": {"a": ["b"]}}', b'{"milliseconds": 3}'],
)
def test_a_corrupted_file_counts_as_empty_and_is_replaced(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "timings.json"
    file.write_bytes(content)
    timings, found = Timings("machine", file), ways()
    timings.milliseconds(nn.Conv2d(8, 8, 3), found, SHAPE)
    assert found[0].module.calls > 0
    timings.save()
    assert len(json.loads(file.read_bytes())["milliseconds"]) == 1


def test_a_directory_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    timings = Timings("machine", blocked / "timings.json")
    timings.milliseconds(nn.Linear(8, 8), ways(), (2, 8))
    timings.save()
    assert blocked.read_bytes() == b""


def test_the_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPRE_FX_CACHE", "off")
    assert cache_directory() is None
    assert Timings.of_machine("machine").file is None
    monkeypatch.setenv("SPRE_FX_CACHE", "/somewhere")
    assert cache_directory() == Path("/somewhere")
    monkeypatch.delenv("SPRE_FX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_directory() == Path("/xdg/spre_fx")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "spre_fx"


def test_each_machine_has_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPRE_FX_CACHE", "/somewhere")
    assert Timings.of_machine("one").file != Timings.of_machine("other").file


def test_medians_are_not_moved_by_a_hiccup() -> None:
    calls = iter(range(10_000))

    def hiccup() -> None:
        time.sleep(0.05 if next(calls) == 8 else 0.002)

    slow, fast = medians([hiccup, lambda: time.sleep(0.0005)], torch.device("cpu"))
    assert 2 <= slow < 10
    assert 0.5 <= fast < 2


@pytest.mark.parametrize(("price", "chosen"), [(1.0, 1), (1.9, 1), (2.1, 0)])
def test_what_takes_memory_has_to_be_faster_by_its_price(
    price: float, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [*ways(), Lowered(Counting(), "large", "counts", price)]
    monkeypatch.setattr(choice, "_measure", lambda *_: (100.0, 2.0, 1.0))
    best = Timings("machine").choose(nn.Conv2d(8, 8, 3), found, [SHAPE])
    assert best.lowered.module is found[chosen].module
    assert best.chosen_ms == [2.0, 1.0][chosen]
    monkeypatch.setattr(choice, "_measure", lambda *_: (1.5, 2.0, 1.0))
    best = Timings("machine").choose(nn.Conv2d(8, 8, 3), found, [SHAPE])
    assert best.lowered.kind == ("large" if price < 1.5 else "dense")
    if price == 1.9:
        words = "large is 1.50 times as fast, for its memory it would have to be 1.9 times"
        assert words in best.lowered.why


@pytest.mark.skipif(engine.load() is None, reason="needs the engine")
def test_layers_of_the_engine_are_timed_as_a_planned_graph_runs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PackedConv2d, "forward", None)
    monkeypatch.setattr(PackedLinear, "forward", None)
    for layer, way in (
        (conv := nn.Conv2d(8, 8, 3), PackedConv2d.from_dense(conv)),
        (conv, PackedConv2d.from_dense(conv, winograd=4)),
        (linear := nn.Linear(8, 8), PackedLinear.from_dense(linear)),
    ):
        shape = SHAPE if layer is conv else (2, 3, 8)
        times = Timings("machine").milliseconds(layer, [Lowered(way, "cpu", "")], shape)
        assert all(each > 0 for each in times)


class Slow(nn.Conv2d):
    """By torch."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.02)
        return super().forward(x)


@pytest.mark.skipif(engine.load() is None, reason="needs the engine")
def test_a_dense_layer_runs_by_the_engine_as_well() -> None:
    (dense_ms, _) = Timings("machine").milliseconds(Slow(8, 8, 3), ways(), SHAPE)
    assert dense_ms < 20


class Tuned(Counting):
    """Remembers the inputs it was tuned for."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        assert self.shapes
        return x

    def tune(self, x: Tensor) -> None:
        self.shapes.append(tuple(x.shape))


def test_what_can_be_tuned_is_before_it_is_measured_and_when_chosen() -> None:
    timings = Timings("machine")
    conv = nn.Conv2d(8, 8, 3).double()
    first, second = Tuned(), Tuned()
    assert timings.choose(conv, [Lowered(first, "toy", "")], [SHAPE]).lowered.module is first
    assert timings.choose(conv, [Lowered(second, "toy", "")], [SHAPE]).lowered.module is second
    assert set(first.shapes) == set(second.shapes) == {SHAPE}  # though the second is not measured


@pytest.mark.parametrize("compiles", [True, False])
def test_on_cuda_the_compiled_layer_is_a_dense_peer(
    compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = nn.Conv2d(8, 8, 3), torch.randn(SHAPE)
    run = (lambda: "compiled") if compiles else None
    monkeypatch.setattr(cuda_timing, "compiled", lambda layer, x: run)
    monkeypatch.setattr(cuda_timing, "medians", lambda runs: [each() for each in runs])
    found = choice._on_cuda([lambda: "sparse", lambda: "eager"], layer, x)
    assert found == ["sparse", "eager", *["compiled"] * compiles]
