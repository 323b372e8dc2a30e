"""Alignment: which node of one graph is which of another, from the two graphs alone."""

import copy
import operator
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import (
    MODELS,
    Model,
    Residual,
    SharedConv,
    TwoHeads,
    conv_bn,
    kinds,
    model_of,
    prepare,
)
from torch import Tensor
from torch.fx import GraphModule, Node, symbolic_trace

from spre_fx import EveryK
from spre_fx.passes import deployment_pipeline, trace
from spre_fx.passes.alignment import align
from spre_fx.passes.graph_view import GraphView


def deploy(prepared: GraphModule) -> GraphModule:
    return deployment_pipeline()(prepared)[0]


def nodes(before: GraphModule, after: GraphModule) -> dict[Node, Node]:
    aligned = align(GraphView(before), GraphView(after))
    assert list(aligned.values()) == list(dict.fromkeys(aligned.values()))  # one to one
    assert set(aligned) <= set(before.graph.nodes)
    assert set(aligned.values()) <= set(after.graph.nodes)
    return aligned


def names(before: GraphModule, after: GraphModule) -> dict[str, str]:
    return {old.name: new.name for old, new in nodes(before, after).items()}


def position(graph_module: GraphModule) -> dict[Node, int]:
    return {node: index for index, node in enumerate(graph_module.graph.nodes)}


@pytest.mark.parametrize("name", [name for name in MODELS if "Parametrised" not in name])
def test_a_graph_aligns_with_itself_and_with_its_copies(name: str) -> None:
    # torch refuses to pickle what is parametrised.
    for gm in trace(MODELS[name]()), prepare(MODELS[name]()):
        for other in gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)):
            ours, theirs = position(gm), position(other)
            used = [node for node in ours if node.users or node.op in ("output", "call_module")]
            found = {ours[old]: theirs[new] for old, new in nodes(gm, other).items()}
            assert found.items() >= {ours[node]: ours[node] for node in used}.items()


def test_names_play_no_part() -> None:
    gm = prepare(Residual())
    other = pickle.loads(pickle.dumps(gm))
    assert [node.name for node in gm.graph.nodes] != [node.name for node in other.graph.nodes]
    for index, node in enumerate(other.graph.nodes):
        node.name = f"node_{index}"
    assert len(nodes(gm, other)) == len(gm.graph.nodes)


@pytest.mark.parametrize("schedule", [None, EveryK(2)])
def test_after_prepare_everything_is_there_and_the_sums_are_new(schedule: EveryK | None) -> None:
    before, after = trace(Residual()), prepare(Residual(), schedule=schedule)
    aligned = names(before, after)
    assert aligned == {node.name: node.name for node in before.graph.nodes}
    assert not [name for name in aligned.values() if "spre" in name or "sum" in name]


def test_after_finalize_what_was_folded_has_no_counterpart() -> None:
    before = prepare(Residual(), schedule=EveryK(2))
    after = deploy(before)
    aligned = names(before, after)
    assert aligned == {
        name: name
        for name in (
            *("x", "conv1", "relu", "conv2", "shortcut_conv", "add", "relu_1"),
            *("adaptive_avg_pool2d", "flatten", "fc", "output"),
        )
    }


def test_residual_sums_align_with_residual_sums() -> None:
    class TwoBlocks(Model):
        """Sums of what convs make, of what sums make, and of the very kind the pass adds."""

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn1(self.conv1(x)) + x
            z = x + self.bn2(self.conv2(y))
            return (y + z).relu() + z

    dense = trace(TwoBlocks())
    prepared = prepare(TwoBlocks())
    for before, after in (
        (dense, prepared),
        (prepared, deploy(prepared)),
        (dense, deploy(prepared)),
        (deploy(prepared), dense),
        (prepared, pickle.loads(pickle.dumps(prepared))),
    ):
        aligned = nodes(before, after)
        assert len(sums(before)) == 4
        assert [aligned[node] for node in sums(before)] == sums(after)


def sums(graph_module: GraphModule) -> list[Node]:
    """The sums of the model's own, which no SpRe branch goes into."""
    return [
        node
        for node in graph_module.graph.nodes
        if node.target is operator.add
        and not any(str(value.target).endswith("_spre") for value in node.all_input_nodes)
    ]


def test_functional_graphs_align_from_their_outputs() -> None:
    def forward(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(torch.conv2d(x, w))
        return y.exp(), (y * 2).sum()

    before = symbolic_trace(forward)
    for after in before, copy.deepcopy(before), pickle.loads(pickle.dumps(before)):
        assert len(nodes(before, after)) == len(before.graph.nodes)


def test_another_operation_at_the_same_place_does_not_align() -> None:
    before, after = symbolic_trace(lambda x: (x + 1).exp()), symbolic_trace(lambda x: (x * 1).exp())
    assert names(before, after) == {"x": "x", "output": "output", "exp": "exp"}


def test_values_computed_twice_align_one_to_one_with_a_value_computed_once() -> None:
    def once(model: Model, x: Tensor) -> Tensor:
        y = x.exp()
        return model.conv1(y) + model.conv2(y)

    twice = model_of("Twice", lambda m, x: m.conv1(x.exp()) + m.conv2(x.exp()))
    before, after = trace(twice()), trace(model_of("Once", once)())
    assert list(names(before, after).values()).count("exp") == 1
    assert len(nodes(after, before)) == len(after.graph.nodes)


def test_parameters_align_by_name_whatever_uses_them() -> None:
    def using(operation: Callable[[Tensor, Tensor], Tensor]) -> GraphModule:
        return trace(model_of("Using", lambda m, x: operation(x, m.conv1.weight))())

    aligned = names(using(torch.add), using(torch.mul))
    assert aligned == {"x": "x", "conv1_weight": "conv1_weight", "output": "output"}


def test_what_is_in_one_graph_only_has_no_counterpart() -> None:
    before, after = trace(TwoHeads()), trace(conv_bn())
    assert set(names(before, after)) == {"output"}


def test_calls_of_a_shared_module_align_in_their_order() -> None:
    before, after = trace(SharedConv()), prepare(SharedConv())
    assert kinds(after).count("NMConv2d") == 2
    aligned = names(before, after)
    assert (aligned["conv1"], aligned["conv1_1"]) == ("conv1", "conv1_1")


def test_alignment_works_both_ways() -> None:
    before, after = trace(Residual()), prepare(Residual())
    forth, back = nodes(before, after), nodes(after, before)
    assert back == {new: old for old, new in forth.items()}
