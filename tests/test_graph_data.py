"""Graphs as plain data: every kind of argument comes back, and no code gets through."""

import json
import math
import operator
from collections import namedtuple

import pytest
import torch
from models import MODELS, kinds, prepare
from torch.fx import Graph, GraphModule, Proxy
from torch.overrides import get_overridable_functions

from spre_fx import FileError, ModelError
from spre_fx.graph_data import graph_data, graph_from, is_name, is_path, value_data, value_from
from spre_fx.passes import FoldBranches, SpecialiseToEval

VALUES = [
    *(None, True, False, 0, -3, 10**30, 0.1, 1e-300, -0.0, math.inf, -math.inf),
    *("", "a 'quoted' \"string\"\n", [1, [2.5, None]], (1, (2,), []), {"a": (1, 2), "b": [None]}),
    *(slice(None, 3, None), ..., (slice(1, None), ..., None), torch.float32, torch.bfloat16),
    *(torch.device("cpu"), torch.device("cuda", 1), torch.channels_last, torch.strided),
    *(torch.Size([2, 3]), {}),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back(value):
    back = value_from(json.loads(json.dumps(value_data(value), allow_nan=False)))
    assert back == value
    assert math.copysign(1, back) == math.copysign(1, value) if value == 0 else True
    assert type(back) is (tuple if isinstance(value, torch.Size) else type(value))


def test_not_a_number_comes_back():
    assert math.isnan(value_from(value_data(math.nan)))


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    "value",
    [Pair(1, 2), {1: 2}, {1, 2}, 1j, b"", torch.ones(1), print, range(3), object()],
    ids=lambda value: type(value).__name__,
)
def test_values_that_plain_data_cannot_hold(value):
    with pytest.raises(FileError, match=f"a value of type {type(value).__name__}"):
        value_data(value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"node": 0}, r"\{'node': 0\}, which is no argument"),
        ({"code": "x"}, r"\{'code': 'x'\}, which is no argument"),
        ({"float": "1.0"}, r"a float '1\.0'"),
        ({"dtype": "load"}, r"a dtype 'load'"),
        ({"layout": "float32"}, r"a layout 'float32'"),
        ({"memory_format": "nothing"}, r"a memory_format 'nothing'"),
    ],
)
def test_data_that_is_no_value(data, words):
    with pytest.raises(FileError, match=words):
        value_from(data)


@pytest.mark.parametrize("name", sorted({*MODELS} - {"TiedConvs", "depthwise", "few channels"}))
def test_graphs_come_back(name):
    model = MODELS[name]()
    deployed = FoldBranches()(SpecialiseToEval()(prepare(model)).graph_module).graph_module
    back = GraphModule(deployed, graph_from(json.loads(json.dumps(graph_data(deployed.graph)))))
    assert kinds(back) == kinds(deployed)
    named = [[(n.name, n.op, str(n.target)) for n in m.graph.nodes] for m in (back, deployed)]
    assert named[0] == named[1]


def test_every_function_of_the_table_can_be_called_from_a_graph():
    graph = Graph()
    x = Proxy(graph.placeholder("x"))
    y = torch.cat([x[0, ..., None, 1:], x.view(x.shape[0], -1)], dim=-1).to(torch.float64)
    y = operator.add(y, math.inf).contiguous(memory_format=torch.channels_last)
    graph.output({"y": (y.node, None)})
    back = graph_from(json.loads(json.dumps(graph_data(graph))))
    assert str(back) == str(graph)


def test_a_graph_that_calls_what_a_file_cannot_name():
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(print, (x,)))
    with pytest.raises(
        ModelError, match=r"print_1: .* found a call of builtins\.print\. A file loads"
    ):
        graph_data(graph)
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.mul, (x, torch.ones(2))))
    with pytest.raises(ModelError, match=r"mul: .* found a value of type Tensor\. A file loads"):
        graph_data(graph)


def test_names_and_paths():
    assert is_name("x1")
    assert not any(map(is_name, ["", "1x", "a b", "a.b", "def", "x\n", 3, None]))
    assert all(map(is_path, ["conv", "layer1.0.conv-1", "a b.c", "\u00fc"]))
    assert not any(map(is_path, ["", ".", "a.", "a..b", 'a"', "a'", "a\\", "a(b)", "a\nb", None]))


def test_the_tables_of_torch_are_read_without_warnings(recwarn):
    get_overridable_functions()
    assert not recwarn
