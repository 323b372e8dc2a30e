"""What counts as an activation, as nothing at all, and as writing over its input."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F

from spre_fx.passes.activations import activation_of, does_nothing, in_place
from spre_fx.passes.graph_view import GraphView

What = nn.Module | Callable[[Graph, Node], Node]


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> What:
    """A call of a function on the input and more."""
    return lambda graph, x: graph.call_function(function, (x, *args), kwargs)


def method(name: str, *args: Any) -> What:
    return lambda graph, x: graph.call_method(name, (x, *args))


class Relu6Like(nn.ReLU6):
    """A ReLU6 that does something more."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


def node_of(what: What) -> tuple[GraphView, Node]:
    """The only node of a graph between input and output: a call of a layer, or of a function."""
    graph, root = Graph(), nn.Module()
    x = graph.placeholder("x")
    if isinstance(what, nn.Module):
        root.layer = what
        node = graph.call_module("layer", (x,))
    else:
        node = what(graph, x)
    graph.output(node)
    return GraphView(GraphModule(root.eval(), graph)), node


ACTIVATIONS: dict[str, tuple[What, str | None]] = {
    "ReLU": (nn.ReLU(inplace=True), "relu"),
    "ReLU6": (nn.ReLU6(), "relu6"),
    "Hardtanh of 0 and 6": (nn.Hardtanh(0, 6), "relu6"),
    "Hardtanh": (nn.Hardtanh(), None),
    "SiLU": (nn.SiLU(), "silu"),
    "Hardswish": (nn.Hardswish(), "hardswish"),
    "GELU": (nn.GELU(), None),
    "ReLU with a hook": (hooked(nn.ReLU()), None),
    "ReLU6 that does more": (Relu6Like(), None),
    "relu": (call(F.relu), "relu"),
    "torch.relu": (call(torch.relu), "relu"),
    "torch.relu_": (call(torch.relu_), "relu"),
    "method relu": (method("relu"), "relu"),
    "method relu_": (method("relu_"), "relu"),
    "method sigmoid": (method("sigmoid"), None),
    "relu6": (call(F.relu6), "relu6"),
    "hardtanh": (call(F.hardtanh, 0, max_val=6), "relu6"),
    "hardtanh of -1 and 1": (call(F.hardtanh), None),
    "hardtanh from 0": (call(F.hardtanh, 0), None),
    "silu": (call(F.silu), "silu"),
    "hardswish": (call(F.hardswish), "hardswish"),
}


@pytest.mark.parametrize(("what", "name"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations(what: What, name: str | None) -> None:
    assert activation_of(*node_of(what)) == name


def test_activations_compute_what_their_names_say() -> None:
    x = torch.linspace(-8, 8, 99)
    for what, name in ACTIVATIONS.values():
        if name is not None:
            view, _ = node_of(what)
            assert torch.equal(view.graph_module(x.clone()), getattr(F, name)(x))


WRITES: dict[str, tuple[What, bool]] = {
    "ReLU(inplace=True)": (nn.ReLU(inplace=True), True),
    "ReLU": (nn.ReLU(), False),
    "relu, named": (call(F.relu, inplace=True), True),
    "relu, by position": (call(F.relu, True), True),
    "relu": (call(F.relu, False), False),
    "leaky_relu, by position": (call(F.leaky_relu, 0.1, True), True),
    "leaky_relu": (call(F.leaky_relu, 0.1), False),
    "dropout": (call(F.dropout, 0.5, True), False),
    "relu_": (call(torch.relu_), True),
    "add_": (method("add_", 1), True),
    "add": (method("add", 1), False),
    "setitem": (call(operator.setitem, 0, 1), True),
    "and_": (call(operator.and_, 1), False),
}


@pytest.mark.parametrize(("what", "expected"), WRITES.values(), ids=WRITES)
def test_writing_over_the_input(what: What, expected: bool) -> None:
    assert in_place(*node_of(what)) == expected


def test_reading_a_parameter_writes_over_nothing() -> None:
    graph, root = Graph(), nn.Module()
    root.weight = nn.Parameter(torch.ones(2))
    node = graph.get_attr("weight")
    graph.output(node)
    assert not in_place(GraphView(GraphModule(root, graph)), node)


def test_operators_that_assign_write_over_their_input() -> None:
    names = {name.strip("_") for name in dir(Tensor) if name.startswith("__i")} & set(dir(operator))
    functions = [getattr(operator, name) for name in names - {"invert", "index"}]
    assert {operator.iadd, operator.ipow, operator.iand} <= set(functions)
    assert all(in_place(*node_of(call(function, 2))) for function in functions)


NOTHING: dict[str, tuple[What, bool]] = {
    "Identity": (nn.Identity(), True),
    "Dropout": (nn.Dropout(), True),
    "Dropout2d": (nn.Dropout2d(), True),
    "StochasticDepth": (torchvision.ops.StochasticDepth(0.5, "row"), True),
    "Dropout with a hook": (hooked(nn.Dropout()), False),
    "ReLU": (nn.ReLU(), False),
    "dropout, by position": (call(F.dropout, 0.5, False), True),
    "dropout, named": (call(F.dropout, training=False), True),
    "dropout in training": (call(F.dropout, 0.5), False),
    "stochastic_depth": (call(torchvision.ops.stochastic_depth, 0.5, "row", False), True),
    "stochastic_depth in training": (
        call(torchvision.ops.stochastic_depth, 0.5, "row"),
        False,
    ),
    "relu": (call(F.relu), False),
}


@pytest.mark.parametrize(("what", "expected"), NOTHING.values(), ids=NOTHING)
def test_doing_nothing(what: What, expected: bool) -> None:
    assert does_nothing(*node_of(what)) == expected
