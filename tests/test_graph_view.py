"""GraphView: candidates, calls, owners and edges of a traced model."""

import operator

import pytest
import torch
import torch.nn.functional as F
from models import (
    Attention,
    FunctionalConv,
    KeywordCall,
    Model,
    Residual,
    SharedConv,
    TiedConvs,
    conv_bn,
    node_of,
    prepare,
)
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from spre_fx.passes import trace
from spre_fx.passes.graph_view import GraphView, input_of, is_item


def test_candidates_are_every_conv_and_linear_in_module_order() -> None:
    view = GraphView(trace(Residual()))
    assert list(view.candidates) == ["conv1", "conv2", "shortcut.conv", "fc"]
    for name, candidate in view.candidates.items():
        assert candidate.name == name
        assert candidate.module is view.graph_module.get_submodule(name)
        assert [call.target for call in candidate.calls] == [name]
        assert candidate.inside is None


def test_spre_branches_are_no_candidates() -> None:
    assert list(GraphView(prepare(Residual())).candidates) == list(
        GraphView(trace(Residual())).candidates
    )


def test_a_shared_conv_is_one_candidate_with_two_calls() -> None:
    candidate = GraphView(trace(SharedConv())).candidates["conv1"]
    assert [call.name for call in candidate.calls] == ["conv1", "conv1_1"]


def test_a_conv_under_two_names_is_one_candidate_with_the_calls_of_both() -> None:
    root = nn.ModuleDict({"a": nn.Conv2d(8, 8, 1)})
    root["b"] = root["a"]
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("b", (graph.call_module("a", (x,)),)))
    view = GraphView(GraphModule(root, graph))
    assert list(view.candidates) == ["a"]
    assert [call.target for call in view.candidates["a"].calls] == ["a", "b"]


def test_a_conv_never_called_is_a_candidate_without_calls() -> None:
    gm = trace(Model())
    gm.add_module("never", nn.Conv2d(8, 8, 3))
    candidates = GraphView(gm).candidates
    assert list(candidates) == ["conv1", "conv2", "never"]
    assert candidates["never"].calls == ()
    assert candidates["never"].inside is None


def test_a_linear_inside_a_module_kept_whole_knows_which() -> None:
    candidates = GraphView(trace(Attention())).candidates
    assert candidates["attention.out_proj"].inside == "attention"
    assert candidates["attention.out_proj"].calls == ()


def test_a_leaf_hides_every_depth_below_it() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 1)))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    assert GraphView(trace(Outer(), ["body"])).candidates["body.0.0"].inside == "body"
    assert GraphView(trace(Outer(), ["body.0"])).candidates["body.0.0"].inside == "body.0"


def test_functional_convs_and_linears_are_candidates_under_their_node_names() -> None:
    def forward(x: Tensor, v: Tensor, w: Tensor) -> tuple[object, ...]:
        return (
            F.conv2d(x, w),
            torch.conv2d(x, w),
            F.conv1d(x, w),
            F.conv3d(x, w),
            F.conv_transpose1d(x, w),
            F.conv_transpose2d(x, w),
            torch.conv_transpose3d(x, w),
            F.linear(v, w),
            F.max_pool2d(x, 2),
        )

    view = GraphView(symbolic_trace(forward))
    functions = ["conv2d", "conv2d_1", "conv1d", "conv3d"]
    functions += [f"conv_transpose{rank}d" for rank in (1, 2, 3)] + ["linear"]
    assert list(view.candidates) == functions
    assert all(candidate.module is None for candidate in view.candidates.values())
    assert [candidate.calls[0].name for candidate in view.candidates.values()] == functions


def test_a_functional_call_does_not_hide_a_module_of_the_same_name() -> None:
    view = GraphView(trace(FunctionalConv()))
    modules = [c.name for c in view.candidates.values() if c.module is not None]
    functions = [c for c in view.candidates.values() if c.module is None]
    assert sorted(modules) == ["conv2", "conv2d"]
    assert len(functions) == 1


def test_owners_name_every_module_that_holds_a_parameter() -> None:
    view = GraphView(trace(TiedConvs()))
    conv1, conv2 = (view.candidates[name].module for name in ("conv1", "conv2"))
    assert view.owners[id(conv1.weight)] == ["conv1", "conv2"]
    assert view.owners[id(conv2.bias)] == ["conv2"]


def test_owners_of_a_shared_module_are_one() -> None:
    view = GraphView(trace(SharedConv()))
    assert view.owners[id(view.candidates["conv1"].module.weight)] == ["conv1"]


def test_producers_and_users_come_in_the_order_of_the_graph() -> None:
    view = GraphView(trace(Residual()))
    add = next(n for n in view.digraph if n.target is operator.add)
    assert [node.name for node in view.producers(add)] == ["bn2", "shortcut_bn"]
    assert [node.name for node in view.users(node_of(view.graph_module, "x"))] == [
        "conv1",
        "shortcut_conv",
    ]
    assert list(view.digraph) == list(view.graph_module.graph.nodes)


def test_module_of_a_node_that_calls_none_is_none() -> None:
    gm = trace(Residual())
    view = GraphView(gm)
    assert view.module_of(node_of(gm, "shortcut_conv")) is gm.get_submodule("shortcut.conv")
    assert view.module_of(node_of(gm, "add")) is None


def test_the_feature_map_of_a_conv_with_masks_is_its_first_item() -> None:
    gm = prepare(conv_bn())
    conv, view = node_of(gm, "conv"), GraphView(gm)
    assert view.feature_map(conv).args == (conv, 0)
    assert [is_item(view.feature_map(conv), index) for index in (0, 1)] == [True, False]
    assert not is_item(conv, 0)


def test_the_feature_map_of_a_conv_that_emits_no_masks_is_its_node() -> None:
    for gm in trace(conv_bn()), prepare(conv_bn(kernel_size=1)):
        conv = node_of(gm, "conv")
        assert GraphView(gm).feature_map(conv) is conv


@pytest.mark.parametrize("model", [Model, KeywordCall])
def test_the_input_of_a_layer_is_found_by_position_and_by_keyword(model: type[nn.Module]) -> None:
    gm = trace(model())
    assert input_of(node_of(gm, "conv1")) is node_of(gm, "x")
    assert input_of(node_of(gm, "bn1")) is node_of(gm, "conv1")


def test_a_view_edits_nothing() -> None:
    gm = prepare(Residual())
    before = gm.code, list(gm.graph.nodes), list(gm.state_dict())
    view = GraphView(gm)
    _ = view.digraph, view.calls, view.owners, view.candidates
    assert before == (gm.code, list(gm.graph.nodes), list(gm.state_dict()))
