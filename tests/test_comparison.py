"""`diff`: worked out from two graphs, whatever anyone says was done to them."""

import copy
import pickle

import pytest
import torch
from test_api import small_net
from torch import nn
from torchvision.models import resnet18

import spre_fx
from spre_fx import passes, records
from spre_fx.comparison import SiteChange


@pytest.fixture
def models():
    dense = small_net()
    prepared = spre_fx.prepare(dense, "1:8")
    return dense, prepared, spre_fx.finalize(prepared, "dense")


def changes(before: nn.Module, after: nn.Module) -> dict[str, SiteChange]:
    return {change.name: change for change in spre_fx.diff(before, after).sites}


def test_dense_to_prepared(models):
    dense, prepared, _ = models
    rows = changes(dense, prepared)
    assert list(rows) == ["0", "3", "6", "10"]
    assert not rows["0"].changed
    assert rows["3"].before.structure == "Conv2d -> BN"
    assert rows["3"].after.structure == "N:M Conv2d -> BN + SpRe -> BN"
    assert rows["3"].after.parameters == 2 * rows["3"].before.parameters


def test_totals_are_those_of_the_models(models):
    dense, prepared, deployed = models
    difference = spre_fx.diff(dense, prepared)
    assert difference.before.parameters == sum(p.numel() for p in dense.parameters())
    assert difference.after.parameters == sum(p.numel() for p in prepared.parameters())
    assert difference.after.nodes == len(prepared.graph.nodes)
    assert spre_fx.diff(dense, deployed).after.nonzeros == sum(
        int(p.count_nonzero()) for name, p in deployed.named_parameters() if "weight" in name
    )


def test_a_model_does_not_differ_from_itself_or_its_pickle(models):
    for model in models:
        for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            difference = spre_fx.diff(model, other)
            assert difference.nodes == ()
            assert not any(change.changed for change in difference.sites)


def test_a_graph_that_was_not_rewritten_shows_as_unchanged(models):
    dense, _, _ = models
    traced = passes.trace(dense)
    for module in traced.modules():  # a pass that lies: it writes records and does nothing
        records.write(module, {"note": "made sparse"})
    assert not any(change.changed for change in spre_fx.diff(dense, traced).sites)
    assert spre_fx.diff(dense, traced).nodes == ()


def test_a_weight_that_changed_pattern_shows_in_density(models):
    _, _, deployed = models
    tampered = copy.deepcopy(deployed)
    nn.init.ones_(tampered.get_submodule("3").weight)
    change = changes(deployed, tampered)["3"]
    assert change.changed
    assert change.after.density == 1.0


def test_node_table_of_a_site(models):
    dense, prepared, _ = models
    nodes = {change.node: change for change in spre_fx.diff(dense, prepared).nodes}
    assert nodes["_3"].change == "replaced"
    assert nodes["_3"].operation == ("Conv2d", "NMConv2d")
    assert nodes["_4_spre"].operation == ("-", "BatchNorm2d")
    assert nodes["_4_sum"].inputs == ("-", "_4, _4_spre")
    assert nodes["_5"].change == "rewired"
    assert nodes["_5"].inputs == ("_4", "_4_sum")
    assert {change.change for change in nodes.values()} == {"added", "replaced", "rewired"}


def test_residual_sums_are_not_taken_for_branch_sums():
    dense = resnet18(num_classes=8)
    difference = spre_fx.diff(dense, spre_fx.prepare(dense, "2:4"))
    sums = [c for c in difference.nodes if c.operation[1] == "add" and c.change == "added"]
    assert len(sums) == 16
    assert all(change.node.endswith("_sum") for change in sums)


def test_a_layer_in_one_model_only_has_a_row(models):
    dense, _, _ = models
    shorter = copy.deepcopy(dense)[:-1]
    row = changes(dense, shorter)["10"]
    assert row.after is None
    (line,) = [line for line in str(spre_fx.diff(dense, shorter)).split("\n") if "Linear" in line]
    assert line.split() == ["10", "Linear", "-", "8x32", "1", "->", "-", "264", "->", "-"]


def test_text_markdown_and_html_show_the_same(models):
    _, prepared, deployed = models
    difference = spre_fx.diff(prepared, deployed)
    assert str(difference) == difference.text()
    for text in (difference.text(), difference.markdown(), difference.html()):
        assert "N:M Conv2d" in text
        assert "1:8" in text
        assert "9_sum" not in text
    assert "removed" in difference.text(nodes=True)
    assert difference._repr_html_() == difference.html()
    assert difference.html().count("<table>") == 2
    assert difference.markdown().count("|---") >= 10


def test_diff_runs_on_models_of_other_precision_and_leaves_them_alone(models):
    dense, prepared, _ = models
    state = copy.deepcopy(prepared.state_dict())
    str(spre_fx.diff(copy.deepcopy(dense).to(torch.bfloat16), prepared))
    assert all(torch.equal(state[key], value) for key, value in prepared.state_dict().items())
