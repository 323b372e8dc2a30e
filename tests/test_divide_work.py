"""What becomes of each node, and what torch writes to."""

from collections.abc import Callable

import pytest
import torch
from test_plan_memory import After
from test_planned_graph import graph_of
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from spre_fx import engine
from spre_fx.passes.divide_work import (
    Alias,
    Concatenation,
    Work,
    divide_work,
    writes_through_view,
)
from spre_fx.passes.graph_view import GraphView
from spre_fx.passes.native_steps import Operation, Values
from spre_fx.passes.plan_memory import values_of

pytestmark = pytest.mark.skipif(engine.load() is None, reason="needs the engine")
Then = Callable[[Tensor], object]


def divided(then: Then) -> tuple[GraphView, Values, list[Work]]:
    loaded = engine.load()
    assert loaded is not None
    gm = graph_of(After(then))
    values = values_of(gm, (torch.randn(2, 8, 6, 6),))
    view = GraphView(gm)
    return view, values, list(divide_work(view, values, loaded))


WORK: dict[str, tuple[Then, list[type]]] = {
    "a step of an activation with what is before it": (
        lambda x: F.relu(F.max_pool2d(x, 2)),
        [Operation],
    ),
    "an activation of two readers": (
        lambda x: F.silu(y := F.max_pool2d(x, 2)) + y,
        [Operation, Operation, Operation],
    ),
    "another name": (lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), [Operation, Alias]),
    "no other name of several pixels": (lambda x: x.flatten(1), [Node]),
    "operands side by side": (
        lambda x: torch.cat([x, F.max_pool2d(x, 1)], 1),
        [Operation, Concatenation],
    ),
    "torch's alone": (lambda x: torch.cumsum(x, 2), [Node]),
    "a concatenation of what torch makes": (
        lambda x: torch.cat([y := torch.cumsum(x, 2), y], 1),
        [Node, Node],
    ),
    "pointwise between calls of torch": (
        lambda x: torch.cumsum(F.relu(torch.cumsum(x, 2)), 2),
        [Node, Node, Node],
    ),
}


@pytest.mark.parametrize(("then", "kinds"), WORK.values(), ids=WORK)
def test_what_becomes_of_nodes(then: Then, kinds: list[type]) -> None:
    _, _, work = divided(then)
    assert [type(each) for each in work] == [Operation, *kinds]


def write_view(x: Tensor) -> Tensor:
    x[:, 0].mul_(2)
    return x


@pytest.mark.parametrize(
    ("then", "expected"),
    [(write_view, True), (lambda x: x.mul_(2), False), (lambda x: x[:, 0].mul(2), False)],
)
def test_writing_through_a_view(then: Then, expected: bool) -> None:
    assert writes_through_view(*divided(then)) == expected
