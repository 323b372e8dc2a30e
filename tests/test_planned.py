"""Running what was planned: memory of each call, outputs, and a batch in parts."""

import copy
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_planned_graph import ResNet, X, assert_same, conv, graph_of
from torch import Tensor, nn
from torch.nn import functional as F

from spre_fx import engine, planned
from spre_fx.passes.planned_graph import planned as plan_graph
from spre_fx.planned import (
    ARENA,
    Location,
    Plan,
    PlannedBatches,
    PlannedProgram,
    PlanRow,
    ShapesChangedError,
    images_at_a_time,
)

needs_engine = pytest.mark.skipif(engine.load() is None, reason="needs the engine")


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 7, 1, 1), (6, 5), (2, 3, 5)])
def test_strides_are_those_of_channels_last_memory(shape: tuple[int, ...]) -> None:
    images = len(shape) == 4
    layout = torch.channels_last if images else torch.contiguous_format
    whole = torch.randn(shape).to(memory_format=layout)
    channels = shape[1] if images else shape[-1]
    found = Location(ARENA, 0, shape, torch.float32, channels)
    assert torch.equal(whole.as_strided(shape, found.strides), whole)
    memory = torch.randn(whole.numel() // channels * 20)
    part = Location(ARENA, 0, shape, torch.float32, 20)
    pixels = memory.view(-1, 20)[:, :channels]
    expected = pixels.unflatten(0, (shape[0], *shape[2:])).movedim(-1, 1) if images else pixels
    assert torch.equal(memory.as_strided(shape, part.strides), expected.reshape(shape))


def test_a_plan_is_a_table_of_steps() -> None:
    rows = (
        PlanRow("conv", "sparse conv", (1, 8, 2, 2), 128, "arena", 0),
        PlanRow("odd", "torch", None, None, "torch", None),
        PlanRow("fc", "sparse conv", (1, 8), 32, "arena", 0),
    )
    plan = Plan(rows, arena=128, activations=160, engine_calls=2)
    lines = str(plan).splitlines()
    assert lines[2].split() == ["conv", "sparse", "conv", "1x8x2x2", "128", "arena", "0", "0"]
    assert lines[3].split() == ["odd", "torch", "torch"]
    assert lines[4].split()[-1] == "1"
    assert lines[-1] == (
        "2 calls of the engine. Activations take 128 bytes of memory (80%), each in a place of its "
        "own 160."
    )


def program_of(model: nn.Module, *inputs: Tensor) -> Any:
    """The program of a graph for these inputs."""
    graph_module = plan_graph(graph_of(model))
    graph_module(*inputs)
    assert graph_module.why_not == ""
    (program,) = graph_module._runs.programs.values()
    return program


@needs_engine
def test_a_second_call_takes_the_memory_of_the_first() -> None:
    program = program_of(ResNet(), X)
    (workspace,) = program.pool
    program([X])
    assert list(program.pool) == [workspace]


@needs_engine
def test_calls_at_one_time_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(ResNet(), X)
    meeting, arenas = threading.Barrier(2, timeout=20), set()
    run = PlannedProgram._run

    def both(self: PlannedProgram, workspace: Any, inputs: Any) -> Any:
        arenas.add(workspace.arena.data_ptr())
        meeting.wait()
        return run(self, workspace, inputs)

    monkeypatch.setattr(PlannedProgram, "_run", both)
    threads = [threading.Thread(target=program, args=([X],)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(arenas) == len(program.pool) == 2


@needs_engine
def test_memory_comes_back_from_a_call_that_fails() -> None:
    program = program_of(ResNet(), X)
    with pytest.raises(ShapesChangedError):
        program([X[:1]])
    assert len(program.pool) == 1
    assert program([X]).shape == (2, 7)


@needs_engine
def test_outputs_are_new_each_time_and_share_nothing_with_the_arena() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = conv(8, 8), conv(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.one(x)
            return y, self.two(y)

    x = torch.randn(1, 8, 6, 6)
    program = program_of(Two(), x)
    arena = program.pool[0].arena
    outputs = [*program([x]), *program([x])]
    starts = {y.untyped_storage().data_ptr() for y in (*outputs, arena)}
    assert len(starts) == 5


@needs_engine
def test_what_torch_computes_is_dropped_after_its_last_reader() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = conv(8, 8), conv(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            a = torch.sort(self.one(x), 3).values
            b = torch.cumsum(a, 2)
            return self.two(b) + a

    program = program_of(Sorted(), torch.randn(1, 8, 6, 6))
    names = [{node.name for node in drops} for drops in program.drops]
    order = [getattr(getattr(item, "node", None), "name", "engine") for item in program.items]
    after = {name: index for index, dropped in enumerate(names) for name in dropped}
    assert after["sort"] == order.index("getattr_1")
    assert after["cumsum"] == len(order) - 1 == after["getattr_1"]


class Small(nn.Module):
    """Large activations and few weights; results of every kind."""

    def __init__(self, together: bool = False) -> None:
        super().__init__()
        self.one, self.two = conv(8, 16), conv(16, 8)
        self.together = together

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.one(x))
        z = self.two(y)
        if self.together:
            z = z - z.mean(0)
        return {"y": y, "all": (z, [F.max_pool2d(z, 2)])}, None, 3


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches run two images at a time."""
    monkeypatch.setattr("spre_fx.passes.planned_graph.images_at_a_time", lambda *_, **__: 2)


def checked_program(model: nn.Module, *inputs: Tensor) -> PlannedBatches | PlannedProgram:
    """The program for these inputs, after a look at what it computes."""
    gm = graph_of(model)
    found = plan_graph(copy.deepcopy(gm))
    assert_same(found(*inputs), gm(*inputs))
    assert found.why_not == ""
    return next(iter(found._runs.programs.values()))


@needs_engine
@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("batch", [2, 4, 5])
def test_a_batch_in_parts_computes_what_its_graph_does(batch: int) -> None:
    program = checked_program(Small(), torch.randn(batch, 8, 12, 10))
    if batch == 2:
        assert isinstance(program, PlannedProgram)
        return
    assert isinstance(program, PlannedBatches)
    assert (program.rest is None) == (batch % 2 == 0)
    assert "2 images of the batch" in str(program.plan)


@needs_engine
def test_a_batch_without_room_in_the_cache_takes_less_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(3, 3, 160, 160)
    whole = checked_program(ResNet(), x)
    assert isinstance(whole, PlannedProgram)
    monkeypatch.setattr(planned, "_CACHED", 0)
    parts = checked_program(ResNet(), x)
    assert isinstance(parts, PlannedBatches)
    assert parts.images == 1
    assert parts.plan.arena < whole.plan.arena / 2


@needs_engine
@pytest.mark.usefixtures("pairs")
def test_images_that_meet_stay_together() -> None:
    x = torch.randn(6, 8, 12, 10)
    assert isinstance(checked_program(Small(together=True), x), PlannedProgram)


@needs_engine
@pytest.mark.usefixtures("pairs")
def test_a_linear_that_torch_runs_takes_a_batch_in_parts() -> None:
    pooled = nn.Sequential(conv(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    gm = graph_of(nn.Sequential(pooled, nn.Linear(8, 5)))
    gm.set_submodule("1", nn.Linear(8, 5).requires_grad_(False))
    found, x = plan_graph(copy.deepcopy(gm)), torch.randn(5, 8, 12, 10)
    assert_same(found(x), gm(x))
    (program,) = found._runs.programs.values()
    assert isinstance(program, PlannedBatches)
    assert [row.kind for row in program.plan.rows] == ["sparse conv", "average pool", "torch"]


@needs_engine
@pytest.mark.usefixtures("pairs")
def test_inputs_of_several_batches_stay_together() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = conv(8, 8)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x), self.one(y)

    shapes = ((6, 8, 12, 10), (3, 8, 12, 10))
    inputs = [torch.randn(shape) for shape in shapes]
    assert isinstance(checked_program(Pair(), *inputs), PlannedProgram)
    same = torch.randn(6, 8, 12, 10)
    assert isinstance(checked_program(Pair(), same, same), PlannedBatches)


sizes = st.integers(0, 1 << 26)


@given(st.integers(1, 512), sizes, sizes, sizes)
def test_how_many_images_go_together(
    batch: int, weights: int, activations: int, arena: int
) -> None:
    images = images_at_a_time(batch, weights=weights, activations=activations, arena=arena)
    assert 1 <= images <= batch
    if arena <= planned._CACHED:
        assert images == batch
    if images < batch:  # no fewer than the weights are worth, and no more than there is room for
        assert images * max(1, activations // batch) >= weights
        beyond = arena * (images - 1) > planned._CACHED * batch
        assert not beyond or (images - 1) * max(1, activations // batch) < weights


def test_how_many_images_of_some_networks() -> None:
    def images(weights: int, activations: int, arena: int) -> int:
        sizes = {"weights": weights << 20, "activations": activations << 20, "arena": arena << 20}
        return images_at_a_time(64, **sizes)

    assert images(1, 64, 8) == 64
    assert images(1, 640, 96) == 8
    assert images(160, 640, 96) == 16
    assert images(900, 640, 96) == 64
