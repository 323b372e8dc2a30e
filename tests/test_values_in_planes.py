"""What stays in planes between planar convs, and that programs compute the same with it."""

import copy
from collections.abc import Callable

import pytest
import torch
from test_planned_graph import assert_same, conv, graph_of
from torch import Tensor, nn
from torch.nn import functional as F

from spre_fx import engine
from spre_fx.passes.planned_graph import PlannedGraphModule, planned
from spre_fx.passes.values_in_planes import plane_stride

pytestmark = pytest.mark.skipif(engine.load() is None, reason="needs the engine")


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a residual, of 24 channels or, with a stride, to 40."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        outputs = 24 if stride == 1 else 40
        self.a, self.b = conv(24, 16, 1), conv(16, 16, stride=stride)
        self.c = conv(16, outputs, 1)
        self.down = nn.Identity() if stride == 1 else conv(24, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.b(F.relu(self.a(x))))
        return F.relu(self.c(y) + self.down(x))


class Network(nn.Module):
    """A pool, a packed 1x1 conv, three bottlenecks and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv(8, 24, 1)
        self.blocks = nn.Sequential(Bottleneck(), Bottleneck(2), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(F.max_pool2d(x, 2))
        y: Tensor = self.blocks(x)
        return y.flatten(1)


def places(program: PlannedGraphModule, *inputs: Tensor) -> dict[str, bool]:
    """Of each step, whether what it computes lies in planes."""
    plan = program.plan(*inputs)
    assert not isinstance(plan, str), plan
    return {row.step: row.place.endswith("planes") for row in plan.rows}


def in_planes(program: PlannedGraphModule, *inputs: Tensor) -> set[str]:
    return {step for step, planes in places(program, *inputs).items() if planes}


@pytest.mark.parametrize("size", [(1, 8, 28, 28), (3, 8, 22, 17), (2, 8, 7, 64)], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_program_computes_what_its_graph_does(size: tuple[int, ...], threads: int) -> None:
    graph_module = graph_of(Network(), planar=True)
    program = planned(copy.deepcopy(graph_module))
    assert isinstance(program, PlannedGraphModule)
    torch.set_num_threads(threads)
    for seed in range(2):
        x = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            assert_same(program(x), graph_module(x))
            assert not program.why_not
    torch.set_num_threads(1)


def test_what_lies_between_planar_convs_stays_in_planes() -> None:
    x = torch.randn(2, 8, 28, 28)
    program = planned(graph_of(Network(), planar=True))
    assert isinstance(program, PlannedGraphModule)
    found = places(program, x)
    # All but what the pools compute and read.
    outside = [step for step, planes in found.items() if not planes]
    assert sum(found.values()) == 8 - 1
    assert len(outside) == 3
    assert not in_planes(planned(graph_of(Network())), x)


class Then(nn.Module):
    """A planar 1x1 conv, what follows it, and another."""

    def __init__(self, then: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.one, self.two, self.wide = conv(8, 8, 1), conv(8, 8, 1), conv(16, 8, 1)
        self.three, self.four = conv(8, 8), conv(8, 8)
        self.then = then

    def forward(self, x: Tensor) -> object:
        return self.then(self, self.one(x))


CASES: dict[str, tuple[Callable[[Then, Tensor], object], int]] = {
    "read by a planar conv": (lambda m, x: m.two(x), 1),
    "read by two, one of which is added": (lambda m, x: m.two(x) + m.three(x), 2),
    "activated": (lambda m, x: m.two(F.relu(x)), 1),
    "leaves": (lambda m, x: (m.two(x), x), 0),
    "read by torch": (lambda m, x: (m.two(x), x.cumsum(2)), 0),
    "pooled": (lambda m, x: (m.two(x), F.max_pool2d(x, 2)), 0),
    "concatenated": (lambda m, x: m.wide(torch.cat([x, F.max_pool2d(x, 1)], 1)), 0),
    "of another activation": (lambda m, x: m.two(F.silu(x)), 0),
    "of 3x3 convs alone": (lambda m, x: m.four(m.three(F.max_pool2d(x, 1))), 0),
    "between a 1x1 conv and others": (lambda m, x: m.four(m.three(x)), 1),
    "added to pixels": (lambda m, x: m.three(m.two(y := F.max_pool2d(x, 1)) + y), 0),
    "adds planes": (lambda m, x: F.max_pool2d(m.two(x) + x, 2), 1),
}


@pytest.mark.parametrize(("then", "count"), CASES.values(), ids=CASES)
def test_what_else_reads_or_writes_it_decides(
    then: Callable[[Then, Tensor], object], count: int
) -> None:
    graph_module = graph_of(Then(then), planar=True)
    program = planned(copy.deepcopy(graph_module))
    assert isinstance(program, PlannedGraphModule)
    x = torch.randn(2, 8, 9, 11)
    assert len(in_planes(program, x)) == count
    with torch.inference_mode():
        assert_same(program(x), graph_module(x))


def test_planes_have_room_behind_and_do_not_share_sets_of_a_cache() -> None:
    for pixels in range(1, 400):
        stride = plane_stride(pixels)
        assert pixels + engine.PLANE_SLACK <= stride < pixels + engine.PLANE_SLACK + 32
        assert stride % 32 == 16
