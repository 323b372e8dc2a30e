"""The weights a site multiplies with: read from the graph, refused where it was tampered with."""

import pytest
import torch
from models import Model, chain, conv_bn, node_of, prepare
from torch import nn
from torch.fx import GraphModule

from spre_fx import ASP, EveryK, EveryStep, Freeze, InvariantError, Pattern, Schedule, masks
from spre_fx.passes import DuplicateBranches, FoldBranches, Policy, Site, match_site, trace
from spre_fx.passes.branches import masked_weight, spre_weight
from spre_fx.passes.graph_view import GraphView

P = Pattern(1, 4)


def site_of(graph_module: GraphModule, name: str) -> Site:
    view = GraphView(graph_module)
    site = match_site(view, view.candidates[name])
    assert isinstance(site, Site)
    return site


def test_the_weight_of_a_dense_layer_is_its_own() -> None:
    conv = nn.Conv2d(8, 8, 3)
    assert masked_weight(conv) is conv.weight


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 3), nn.Linear(8, 4), nn.Conv1d(8, 8, 1)])
def test_the_weight_of_a_masked_layer_is_zero_where_its_mask_is(layer: nn.Module) -> None:
    layer = prepare(chain(layer=layer)).layer
    B = masks.nm_mask(layer.weight.detach(), P)
    assert torch.equal(masked_weight(layer), B * layer.weight)
    assert 0 < B.sum() < B.numel()


@pytest.mark.parametrize("schedule", [EveryStep(), EveryK(2), Freeze(at=0)])
def test_weights_of_both_branches_are_those_the_forward_uses(schedule: Schedule) -> None:
    gm = prepare(conv_bn(), method=ASP(), schedule=schedule)
    old = gm.conv.weight.detach().clone()
    nn.init.normal_(gm.conv.weight)
    now = old if schedule.keeps_masks else gm.conv.weight.detach()  # what the masks are made from
    B, taps = masks.nm_mask(now, P), masks.live_taps(now, P)
    seen = []
    gm.conv_spre.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    gm.eval()(torch.randn(2, 8, 6, 6))
    site = site_of(gm, "conv")
    assert torch.equal(masked_weight(gm.conv), B * gm.conv.weight)
    assert torch.equal(spre_weight(site), B * taps * gm.conv_spre.weight)
    assert torch.equal(seen[0], B * taps)


def test_before_the_masks_are_wired_the_branch_is_dense() -> None:
    gm = DuplicateBranches(Policy(P))(trace(conv_bn())).graph_module
    assert torch.equal(spre_weight(site_of(gm, "conv")), gm.conv_spre.weight)


def test_reading_changes_no_mask_and_no_step() -> None:
    gm = prepare(conv_bn(), schedule=EveryK(2))
    nn.init.normal_(gm.conv.weight)
    state = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    masked_weight(gm.conv), spre_weight(site_of(gm, "conv"))
    assert all(torch.equal(state[name], tensor) for name, tensor in gm.state_dict().items())


def test_a_mask_computed_otherwise_is_taken_from_the_graph() -> None:
    gm = prepare(conv_bn())
    spre, mask = node_of(gm, "conv_spre"), node_of(gm, "conv_spre_mask")
    with gm.graph.inserting_before(spre):
        inverse = gm.graph.call_function(torch.logical_not, (mask,))
    spre.args = (spre.args[0], inverse)
    gm.recompile()
    B_spre = masks.nm_mask(gm.conv.weight.detach(), P) * masks.live_taps(gm.conv.weight, P)
    assert torch.equal(spre_weight(site_of(gm, "conv")), ~B_spre * gm.conv_spre.weight)


def mask_of_another_site(gm: GraphModule) -> None:
    spre = node_of(gm, "conv2_spre")
    spre.args = (spre.args[0], node_of(gm, "conv1_spre_mask"))
    gm.graph.eliminate_dead_code()


def no_mask(gm: GraphModule) -> None:
    spre = node_of(gm, "conv2_spre")
    spre.args = spre.args[:1]


def mask_by_a_method(gm: GraphModule) -> None:
    spre = node_of(gm, "conv2_spre")
    with gm.graph.inserting_before(spre):
        mask = gm.graph.call_method("bool", (spre.args[1],))
    spre.args = (spre.args[0], mask)


def first_item_as_mask(gm: GraphModule) -> None:
    spre = node_of(gm, "conv2_spre")
    spre.args = (spre.args[0], node_of(gm, "conv2_y"))


@pytest.mark.parametrize(
    "tamper", [mask_of_another_site, no_mask, mask_by_a_method, first_item_as_mask]
)
def test_a_mask_that_is_not_the_sites_own_is_refused_in_words(tamper: object) -> None:
    gm = prepare(Model())
    tamper(gm)
    gm.recompile()
    with pytest.raises(InvariantError, match=r"^conv[12](_spre)?: expected .*, found "):
        FoldBranches()(gm)
