"""What one run tells of a graph, and when there is a program at all."""

from collections.abc import Callable

import pytest
import torch
from test_planned_graph import ResNet, conv, graph_of
from torch import Tensor, nn
from torch.fx import GraphModule

from spre_fx import engine
from spre_fx.passes.native_steps import Value
from spre_fx.passes.plan_memory import plan_memory, values_of
from spre_fx.planned import PlannedProgram

needs_engine = pytest.mark.skipif(engine.load() is None, reason="needs the engine")
X = torch.randn(2, 8, 6, 5)


class After(nn.Module):
    """A packed conv, and something after it."""

    def __init__(self, then: Callable[[Tensor], object], inputs: int = 8) -> None:
        super().__init__()
        self.conv = conv(inputs, 8)
        self.then = then

    def forward(self, x: Tensor) -> object:
        return self.then(self.conv(x))


def program(gm: GraphModule, *inputs: Tensor) -> PlannedProgram | None:
    loaded = engine.load()
    assert loaded is not None
    return plan_memory(gm, values_of(gm, inputs), loaded, threads=1)


def test_values_are_shapes_types_and_whether_they_are_views() -> None:
    gm = graph_of(After(lambda x: (x.flatten(1)[:, 3:], x.shape, x.double())))
    found = {node.name: value for node, value in values_of(gm, (X,)).items()}
    assert found["conv"] == Value((2, 8, 6, 5), torch.float32)
    assert found["double"] == Value((2, 8, 6, 5), torch.float64)
    assert not found["conv"].is_view
    assert found["getitem"].shape == (2, 237)
    assert found["getitem"].is_view
    assert found.keys() == {"x", "conv", "flatten", "getitem", "double"}


def test_values_are_found_without_writing_to_inputs() -> None:
    x = X.clone()
    values_of(torch.fx.symbolic_trace(nn.Sequential(nn.ReLU(inplace=True))), (x,))
    assert torch.equal(x, X)


@needs_engine
def test_a_network_is_a_program_of_the_engine() -> None:
    found = program(graph_of(ResNet()), torch.randn(2, 3, 40, 40))
    assert found is not None
    assert found.threads == 1
    assert found.plan.engine_calls == 1


@needs_engine
def test_a_graph_without_steps_has_no_program() -> None:
    assert program(torch.fx.symbolic_trace(nn.Sequential(nn.GELU())), X) is None


@needs_engine
def test_writing_through_a_view_leaves_no_program() -> None:
    def write(x: Tensor) -> Tensor:
        x[:, 0].mul_(2)
        return x

    assert program(graph_of(After(write)), X) is None
