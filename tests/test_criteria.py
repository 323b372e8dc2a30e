"""Criteria for B^U: scores against their definitions, and what `update_taps` leaves alone."""

import copy

import pytest
import torch
from test_api import small_net, train
from torch import Tensor, nn

import spre_fx
from spre_fx.criteria import SNIP, CriterionTaps, GraSP, Taylor, _scores
from spre_fx.modules import NMLayer


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 4, (1, 3), bias=False, dtype=torch.float64),
        nn.BatchNorm2d(4, dtype=torch.float64),
        nn.Tanh(),
    )


def loss_of(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).cos().mean()


def prepared_net(criterion, **options) -> tuple[nn.Module, NMLayer, Tensor]:
    """Prepared by criterion, its one conv, and images."""
    prepared = spre_fx.prepare(net(), "2:4", criterion=criterion, **options)
    return prepared, prepared.get_submodule("0"), torch.randn(3, 4, 2, 5, dtype=torch.float64)


def scores(prepared: nn.Module, criterion, loss, batches: int = 1) -> Tensor:
    found = _scores({"0": prepared.get_submodule("0")}, criterion, loss, batches)["0"]
    return criterion.total(found)


def plain(prepared: nn.Module, images: Tensor, dense: bool) -> tuple[Tensor, Tensor]:
    """The loss as a function of a leaf in the place of B * W, computed without our modules."""
    conv, bn, spre, bn_spre = (prepared.get_submodule(n) for n in ("0", "1", "0_spre", "1_spre"))
    weight, mask = conv.masked_weight()
    leaf = (conv.weight if dense else weight).detach().clone().requires_grad_()
    taps = conv.live_taps.mask
    y = copy.deepcopy(bn)(nn.functional.conv2d(images, leaf))
    y = y + copy.deepcopy(bn_spre)(nn.functional.conv2d(images, spre.weight * (mask * taps)))
    return y.tanh().cos().mean(), leaf


def test_taylor_is_the_mean_magnitude_of_weight_times_gradient():
    prepared, conv, images = prepared_net("taylor")
    loss, leaf = plain(prepared, images, dense=False)
    (gradient,) = torch.autograd.grad(loss, leaf)
    found = scores(prepared, Taylor(), lambda: loss_of(prepared, images))
    torch.testing.assert_close(found, (conv.weight * gradient).abs(), rtol=1e-9, atol=1e-15)


def test_snip_takes_the_magnitude_after_summing_batches():
    prepared, conv, images = prepared_net("snip")
    expected, batches = 0.0, [images, images.flip(-1) * 2]
    for batch in batches:
        loss, leaf = plain(prepared, batch, dense=True)
        expected = expected + conv.weight * torch.autograd.grad(loss, leaf)[0]
    draw = iter(batches)
    found = scores(prepared, SNIP(), lambda: loss_of(prepared, next(draw)), batches=2)
    torch.testing.assert_close(found, expected.abs(), rtol=1e-9, atol=1e-15)


def test_grasp_is_weight_times_hessian_times_gradient():
    prepared, conv, images = prepared_net("grasp")
    loss, leaf = plain(prepared, images, dense=True)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    rows = [torch.autograd.grad(g, leaf, retain_graph=True)[0] for g in gradient.flatten()]
    hessian = torch.stack([row.flatten() for row in rows])
    product = (hessian @ gradient.detach().flatten()).view_as(leaf)
    found = scores(prepared, GraSP(), lambda: loss_of(prepared, images))
    torch.testing.assert_close(found, conv.weight * product, rtol=1e-8, atol=1e-15)


@pytest.mark.parametrize("criterion", [Taylor(), SNIP(), GraSP()], ids=str)
def test_scores_do_not_depend_on_how_training_computes(criterion):
    found = []
    for compute in ("auto", "dense"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.Tanh()).double()
        options = {"method": "asp", "criterion": criterion, "compute": compute}
        prepared = spre_fx.prepare(model, "1:4", **options)
        images = torch.randn(16, 32, 6, 6, dtype=torch.float64)
        marked = prepared.get_submodule("0").sparse
        found.append(scores(prepared, criterion, lambda: loss_of(prepared, images)))  # noqa: B023
        assert prepared.get_submodule("0").sparse is marked
        assert (marked is None) is (compute == "dense")
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-15)


def test_taps_are_those_where_the_best_scores_are_by_hand():
    taps = CriterionTaps(torch.ones(3, dtype=torch.bool), spre_fx.Pattern(1, 2), Taylor(), None)
    taps.set(torch.tensor([[[3.0, 0.0, 1.0], [3.0, 0.0, -5.0]]]))  # keeps 3 of 6: 3, 3, 1
    assert taps.mask.tolist() == [True, False, False]


@pytest.mark.parametrize("options", [{}, {"method": "asp"}, {"branch": "inverse"}], ids=str)
@pytest.mark.parametrize("criterion", ["taylor", "snip", "grasp"])
def test_only_taps_change(criterion, options):
    prepared, conv, images = prepared_net(criterion, **options)
    conv.live_taps.mask.logical_not_()
    before = copy.deepcopy(prepared.state_dict())
    method, mode = conv.method, prepared.training
    assert spre_fx.update_taps(prepared, lambda: loss_of(prepared, images))
    changed = {k for k, v in prepared.state_dict().items() if not torch.equal(v, before[k])}
    assert changed <= {"0.live_taps.mask", "0.live_taps.taken"}
    assert "0.live_taps.taken" in changed
    assert (conv.method, prepared.training) == (method, mode)
    assert all(p.grad is None for p in prepared.parameters())


def test_updates_come_at_the_first_call_and_when_the_schedule_says_so():
    def updates(**options) -> list[bool]:
        prepared, _, images = prepared_net(**options)
        done = []
        for _ in range(5):
            done.append(spre_fx.update_taps(prepared, lambda: loss_of(prepared, images)))
            train(prepared, images, 1)
        return done

    assert updates(criterion="taylor") == [True] * 5
    assert updates(criterion="taylor", schedule=spre_fx.EveryK(2)) == [True, False] * 2 + [True]
    assert updates(criterion="taylor", method="asp") == [True] + [False] * 4
    assert updates(criterion="snip") == [True] + [False] * 4


@pytest.mark.parametrize("criterion", ["taylor", "snip", "grasp"])
def test_resuming_and_finalizing(criterion):
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64)

    def run(model: nn.Module, steps: int) -> None:
        for _ in range(steps):
            spre_fx.update_taps(model, lambda: model(images).square().mean())
            train(model, images, 1)

    prepared, resumed = (
        spre_fx.prepare(
            small_net().double(), "1:4", criterion=criterion, schedule=spre_fx.EveryK(2)
        )
        for _ in range(2)
    )
    run(prepared, 3)
    resumed.load_state_dict(copy.deepcopy(prepared.state_dict()))
    run(prepared, 3)
    run(resumed, 3)
    state = resumed.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in prepared.state_dict().items())
    deployed = spre_fx.finalize(prepared)
    with torch.no_grad():
        expected = prepared.eval()(images)
        torch.testing.assert_close(deployed(images), expected, rtol=1e-10, atol=1e-12)


def test_it_refuses_what_makes_no_sense():
    prepared, _, images = prepared_net("taylor")
    with pytest.raises(spre_fx.OptionError, match="batches=0"):
        spre_fx.update_taps(prepared, lambda: loss_of(prepared, images), batches=0)
    with pytest.raises(spre_fx.OptionError, match="expected `loss` to return a scalar"):
        spre_fx.update_taps(prepared, lambda: prepared(images))
    with pytest.raises(spre_fx.ModelError, match="Taps by magnitude update themselves"):
        spre_fx.update_taps(spre_fx.prepare(net(), "2:4"), lambda: torch.zeros(()))


@pytest.mark.parametrize("branch", [None, "same"])
def test_a_criterion_needs_taps_to_choose(branch):
    with pytest.raises(spre_fx.OptionError, match="which has no taps to choose"):
        spre_fx.prepare(net(), "2:4", criterion="snip", branch=branch)
    with pytest.raises(spre_fx.OptionError, match=r"'best': expected one of \['magnitude', 'run"):
        spre_fx.prepare(net(), "2:4", criterion="best")
