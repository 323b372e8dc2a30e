"""The unstructured baselines in a graph: wiring, gradients, resuming, finalizing, pictures."""

import copy
import pickle

import pytest
import torch
from test_api import small_net, train
from torch import nn

import spre_fx
from spre_fx import CubicRamp, EveryK, Freeze, GraNet, State

RAMP = CubicRamp(1, 5, every=2)
METHODS = [
    {"method": "gmp", "schedule": RAMP},
    {"method": "rigl", "schedule": Freeze(6, EveryK(2))},
    {"method": "granet", "schedule": RAMP},
    {"method": GraNet(sparsity=0.9, until=7, constraint="spatial"), "schedule": RAMP},
    {"method": GraNet(initial_sparsity=0.4, constraint="equal"), "schedule": RAMP},
]


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("steps", [0, 3, 8])
def test_finalize_at_any_moment(options, steps):
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    prepared = spre_fx.prepare(small_net().double(), "1:4", **options)
    train(prepared, images, steps)
    deployed = spre_fx.finalize(prepared)
    with torch.no_grad():
        expected = prepared.eval()(images)
        torch.testing.assert_close(deployed(images), expected, rtol=1e-10, atol=1e-12)
    assert not any("mask_schedule" in str(node.target) for node in deployed.graph.nodes)
    mask = prepared.get_submodule("3").nm_mask.mask
    assert deployed.get_submodule("3").weight[~mask].eq(0).all()


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_the_sparsity_aimed_at_is_reached(options):
    prepared = spre_fx.prepare(small_net(), "1:4", **options)
    train(prepared, torch.randn(2, 3, 9, 9), 8)
    masks = [prepared.get_submodule(name).nm_mask.mask for name in ("3", "6", "10")]
    size, ones = sum(m.numel() for m in masks), sum(int(m.sum()) for m in masks)
    density = 0.1 if getattr(options["method"], "sparsity", None) else 0.25
    assert ones / size == pytest.approx(density, abs=0.01)


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("interrupted", [3, 4])
def test_resuming_is_as_if_never_interrupted(options, interrupted):
    images = torch.randn(2, 3, 9, 9)
    prepared = spre_fx.prepare(small_net(), "1:4", **options)
    train(prepared, images, interrupted)
    resumed = spre_fx.prepare(small_net(), "1:4", **options)
    resumed.load_state_dict(copy.deepcopy(prepared.state_dict()))
    pickled = pickle.loads(pickle.dumps(prepared))
    for model in (prepared, resumed, pickled):
        train(model, images, 5)
    for model in (resumed, pickled):
        state = model.state_dict()
        assert all(torch.equal(v, state[key]) for key, v in prepared.state_dict().items())


def test_the_gradient_taken_note_of_is_the_dense_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, dtype=torch.float64))
    prepared = spre_fx.prepare(model, "1:4", method="rigl", schedule=Freeze(9, EveryK(2)))
    conv = prepared.get_submodule("0")
    images = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    leaf = (conv.weight * conv.nm_mask.mask).detach().requires_grad_()
    nn.functional.conv2d(images, leaf, conv.bias).cos().sum().backward()
    prepared(images).cos().sum().backward()
    assert conv.dense_gradient.sum.eq(0).all()  # step 0: the next is no update
    conv.weight.grad = None
    prepared(images).cos().sum().backward()  # step 1: the next one is
    torch.testing.assert_close(conv.dense_gradient.sum, leaf.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(conv.weight.grad, leaf.grad * conv.nm_mask.mask)


def test_two_calls_of_one_layer_share_a_mask_and_add_their_gradients():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(self.linear(x))

    prepared = spre_fx.prepare(Twice(), "1:4", method="rigl", schedule=Freeze(9, EveryK(1)))
    train(prepared, torch.randn(2, 8), 4)
    assert prepared.get_submodule("linear").nm_mask.mask.sum() == 16
    torch.testing.assert_close(
        spre_fx.finalize(prepared)(torch.ones(1, 8)), prepared.eval()(torch.ones(1, 8))
    )


def test_evaluation_changes_nothing():
    prepared = spre_fx.prepare(small_net(), "1:4", method="granet", schedule=RAMP)
    train(prepared, torch.randn(2, 3, 9, 9), 3)
    before = copy.deepcopy(prepared.state_dict())
    prepared.eval()(torch.randn(2, 3, 9, 9))
    assert all(torch.equal(before[key], value) for key, value in prepared.state_dict().items())
    assert before["mask_schedule.step"] == 3


def test_sites_and_diff_say_unstructured():
    prepared = spre_fx.prepare(small_net(), "1:4", method="gmp", schedule=RAMP)
    train(prepared, torch.randn(2, 3, 9, 9), 7)
    deployed = spre_fx.finalize(prepared)
    site = {site.name: site for site in spre_fx.sites(prepared)}["3"]
    assert (site.state, site.structure) == (State.UNSTRUCTURED, "unstructured Conv2d -> BN")
    assert (site.pattern, site.live_taps, site.density) == (None, None, 0.25)
    site = {site.name: site for site in spre_fx.sites(deployed)}["3"]
    assert (site.state, site.structure) == (State.DEPLOYED_UNSTRUCTURED, "unstructured Conv2d")
    assert "unstructured Conv2d -> BN" in str(spre_fx.diff(prepared, deployed))


def test_the_masks_are_edges_of_the_graph():
    prepared = spre_fx.prepare(small_net(), "1:4", method="gmp", schedule=RAMP)
    (conv,) = (node for node in prepared.graph.nodes if node.target == "3")
    assert conv.args[1].args[0].target == "mask_schedule"
    assert not any("_spre" in name for name, _ in prepared.named_modules())


def test_the_picture_is_of_the_actual_mask():
    pytest.importorskip("matplotlib")
    method = GraNet(constraint="spatial")
    prepared = spre_fx.prepare(small_net(), "1:4", method=method, schedule=RAMP)
    train(prepared, torch.randn(2, 3, 9, 9), 7)
    (panel, *_) = spre_fx.plot_spatial_sparsity(prepared).axes
    (image,) = panel.images
    assert (image.get_array() == 0.75).all()


@pytest.mark.parametrize("branch", ["spre", "same", "inverse"])
def test_a_branch_is_refused(branch):
    with pytest.raises(spre_fx.OptionError, match="expected None with RigL, whose masks are unst"):
        spre_fx.prepare(
            small_net(), "1:4", method="rigl", branch=branch, schedule=Freeze(6, EveryK(2))
        )


def test_it_compiles_with_one_graph_break():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8))
    prepared = spre_fx.prepare(model, "1:4", method="rigl", schedule=Freeze(6, EveryK(2)))
    eager = copy.deepcopy(prepared)
    images = torch.randn(2, 8, 5, 5)
    torch._dynamo.reset()
    compiled = torch.compile(prepared, backend="aot_eager")
    for _ in range(5):
        train(compiled, images, 1)
        train(eager, images, 1)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(prepared.state_dict()[key], value)
