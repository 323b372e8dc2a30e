"""`prepare` and `finalize` as a user calls them: what they promise and what they refuse."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import spre_fx
from spre_fx.passes import match_site
from spre_fx.passes.branches import spre_weight
from spre_fx.passes.graph_view import GraphView


def small_net(channels: int = 16) -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 1),
        nn.BatchNorm2d(2 * channels),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, 8),
    )
    return randomise_batch_norms(net)


def randomise_batch_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def train(model: nn.Module, x: torch.Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 9, 9)


METHODS = [
    {"method": "sr-ste"},
    {"method": "asp"},
    {"method": spre_fx.SRSTE(decay=1e-3), "schedule": spre_fx.EveryK(2)},
    {"method": "sr-ste", "schedule": spre_fx.Freeze(at=2)},
    {"method": "sr-ste", "branch": None},
    {"method": "sr-ste", "branch": "same"},
    {"method": "asp", "branch": "inverse"},
    {"branch": "random", "criterion": "change"},
    {"branch": spre_fx.SpRe(hysteresis=0.5, straight_through=True), "criterion": "running-mean"},
]


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "1:8", "3:5"])
def test_finalized_equals_prepared_in_evaluation(options, pattern, images):
    images = images.double()
    prepared = spre_fx.prepare(small_net().double(), pattern, **options)
    train(prepared, images)
    deployed = spre_fx.finalize(prepared)
    assert not deployed.training
    with torch.no_grad():
        expected = prepared.eval()(images)
        torch.testing.assert_close(deployed(images), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("schedule", [None, spre_fx.EveryK(2)], ids=repr)
def test_the_ablations_of_fig_5_are_wired_in_the_graph(schedule, images):
    masks = {}
    for branch in ("spre", "same", "inverse"):
        torch.manual_seed(0)
        prepared = spre_fx.prepare(small_net(), "1:4", branch=branch, schedule=schedule)
        train(prepared, images)
        (conv,) = (node for node in prepared.graph.nodes if node.target == "3_spre")
        mask = conv.args[1]
        masks[branch] = mask.name, [argument.name for argument in mask.all_input_nodes]
        view = GraphView(prepared)
        site = match_site(view, view.candidates["3"])
        layer = prepared.get_submodule("3")
        nm, live = layer.masked_weight()[1], layer.live_taps(layer.weight, None)
        expected = {"spre": nm & live, "same": nm, "inverse": nm & ~live}[branch]
        assert torch.equal(spre_weight(site) != 0, expected)
    assert masks == {
        "spre": ("_3_spre_mask", ["_3_nm_mask", "_3_live_taps"]),
        "same": ("_3_nm_mask", ["_3"]),
        "inverse": ("_3_spre_mask", ["_3_nm_mask", "_3_dead_taps"]),
    }


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "1:8", "3:5"])
def test_both_branches_and_what_they_fold_into_lie_within_b(pattern, options, images):
    prepared = spre_fx.prepare(small_net(), pattern, **options)
    train(prepared, images)
    conv = prepared.eval().get_submodule("3")
    with torch.no_grad():
        nm_mask = conv.masked_weight()[1].bool()
        merged = spre_fx.finalize(prepared).get_submodule("3").weight
    assert not merged[~nm_mask].any()
    assert merged[nm_mask].all()
    masks = []
    if "3_spre" in dict(prepared.named_modules()):
        hook = prepared.get_submodule("3_spre").register_forward_pre_hook(
            lambda _, arguments: masks.append(arguments[1].bool())
        )
        prepared(images)
        hook.remove()
    assert len(masks) == (options.get("branch", "spre") is not None)
    assert not any(mask[~nm_mask].any() for mask in masks)


def test_deployed_layers_are_ordinary_and_obey_the_pattern(images):
    prepared = spre_fx.prepare(small_net(), "1:8")
    train(prepared, images)
    deployed = spre_fx.finalize(prepared, "dense")
    kinds = {type(module) for module in deployed.modules() if list(module.parameters(False))}
    assert kinds == {nn.Conv2d, nn.Linear}
    for name in ("3", "6", "10"):
        weight = deployed.get_submodule(name).weight
        groups = weight.reshape(weight.shape[0], -1, 8, weight[0, 0].numel())
        assert (groups != 0).sum(2).max() == 1


def test_neither_call_touches_the_model_it_is_given(images):
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    prepared = spre_fx.prepare(model, "1:8", schedule=spre_fx.EveryK(2))
    train(prepared, images)
    code, trained = prepared.code, copy.deepcopy(prepared.state_dict())
    spre_fx.finalize(prepared)
    assert model.training
    assert prepared.training
    assert prepared.code == code
    for state, copied in ((model.state_dict(), before), (prepared.state_dict(), trained)):
        assert state.keys() == copied.keys()
        assert all(torch.equal(state[key], copied[key]) for key in copied)


def test_a_dense_checkpoint_loads_with_only_spre_keys_missing():
    dense = resnet18(num_classes=10)
    prepared = spre_fx.prepare(resnet18(num_classes=10), "1:16")
    missing, unexpected = prepared.load_state_dict(dense.state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all("_spre." in key for key in missing)
    assert torch.equal(prepared.state_dict()["layer1.0.conv1.weight"], dense.layer1[0].conv1.weight)


def test_plain_nm_on_weights_that_obey_the_pattern_is_the_dense_model(images):
    model = small_net()
    with torch.no_grad():
        for index in (3, 6, 10):
            weight = model[index].weight
            weight[:, torch.arange(weight.shape[1]) % 4 >= 2] = 0
    prepared = spre_fx.prepare(model, "2:4", branch=None)
    for mode in (True, False):
        assert torch.equal(prepared.train(mode)(images), model.train(mode)(images))


def test_asp_starts_from_what_nm_alone_computes(images):
    model = small_net()
    plain = spre_fx.prepare(model, "2:4", method="asp", branch=None)
    branched = spre_fx.prepare(model, "2:4", method="asp")
    for mode in (True, False):
        assert torch.equal(branched.train(mode)(images), plain.train(mode)(images))


def test_asp_masks_stay_those_of_the_weights_it_was_given(images):
    model = small_net()
    prepared = spre_fx.prepare(model, "2:4", method="asp")
    mask = spre_fx.masks.nm_mask(model[3].weight.detach(), spre_fx.Pattern(2, 4))
    train(prepared, images, steps=5)
    assert torch.equal(prepared.state_dict()["3.nm_mask.mask"], mask)


def test_spre_gamma_can_be_set():
    prepared = spre_fx.prepare(small_net(), "2:4", spre_gamma=0.25)
    assert torch.equal(prepared.get_submodule("4_spre").weight, torch.full((16,), 0.25))


def test_evaluation_never_changes_a_mask_or_the_step(images):
    prepared = spre_fx.prepare(small_net(), "2:4", schedule=spre_fx.EveryK(3))
    train(prepared, images, steps=2)
    before = copy.deepcopy(prepared.state_dict())
    prepared.eval()(images)
    after = prepared.state_dict()
    assert before["mask_schedule.step"] == 2
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_overrides_and_exclusions_reach_their_layers():
    prepared = spre_fx.prepare(
        small_net(), "1:8", exclude=[nn.Linear], overrides={"*": "2:4", "6": None}
    )
    patterns = {site.name: site.pattern for site in spre_fx.sites(prepared)}
    assert patterns == {"0": None, "3": "2:4", "6": None, "10": None}


def test_prepared_and_deployed_models_pickle(images):
    prepared = spre_fx.prepare(small_net(), "1:8", schedule=spre_fx.EveryK(2))
    train(prepared, images)
    for model in (prepared.eval(), spre_fx.finalize(prepared)):
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(again(images), model(images))
        assert spre_fx.sites(again) == spre_fx.sites(model)
    resumed = pickle.loads(pickle.dumps(prepared))
    assert torch.equal(spre_fx.finalize(resumed)(images), spre_fx.finalize(prepared)(images))


def test_a_module_excluded_by_name_need_not_be_traceable(images):
    class Branchy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    model = nn.Sequential(small_net()[:6], Branchy())
    prepared = spre_fx.prepare(model, "2:4", exclude="1")
    reasons = {site.name: site.reason for site in spre_fx.sites(prepared)}
    assert reasons["1.conv"] == "excluded"
    train(prepared, images)
    prepared.eval()
    torch.testing.assert_close(spre_fx.finalize(prepared)(images), prepared(images))


def nan_net() -> nn.Module:
    model = small_net()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = float("nan")
    return model


def infinite_variance() -> nn.Module:
    model = small_net()
    model[4].running_var[1] = float("inf")
    return model


REFUSED = [
    (small_net, {"pattern": "dense"}, spre_fx.PatternError, "'dense' is not an N:M pattern"),
    (small_net, {"pattern": "4:4"}, spre_fx.PatternError, "4:4 is not .* 1 <= N < M"),
    (small_net, {"pattern": "4:2"}, spre_fx.PatternError, "4:2 is not"),
    (small_net, {"overrides": {"3": "8:4"}}, spre_fx.PatternError, "8:4 is not"),
    (small_net, {"method": "magic"}, spre_fx.OptionError, r"'magic': expected one of \['sr-ste'"),
    (
        small_net,
        {"branch": "both"},
        spre_fx.OptionError,
        r"'both': expected one of \['auto', 'spre', 'same'",
    ),
    (small_net, {"exclude": "layer9.*"}, spre_fx.OptionError, r"'layer9\.\*' matches no conv"),
    (small_net, {"exclude": [nn.Conv3d]}, spre_fx.OptionError, "'Conv3d' matches no conv"),
    (small_net, {"overrides": {"nope": None}}, spre_fx.OptionError, "overrides: 'nope' matches"),
    (lambda: small_net(4), {"pattern": "1:16"}, spre_fx.ModelError, "found 4 fewer input channels"),
    (nn.ReLU, {}, spre_fx.ModelError, "nothing to sparsify: .* no conv or linear at all"),
    (nan_net, {}, spre_fx.ModelError, r"3\.weight: expected finite values, found 1 NaN"),
    (infinite_variance, {}, spre_fx.ModelError, r"4\.running_var: .* 1 infinite"),
    (lambda: small_net().to("meta"), {}, spre_fx.ModelError, r"0\.weight: .* meta device"),
    (lambda: nn.LazyConv2d(8, 3), {}, spre_fx.ModelError, "uninitialised LazyConv2d"),
    (lambda: torch.jit.script, {}, spre_fx.ModelError, "expected an nn.Module, found function"),
]


@pytest.mark.parametrize(("build", "options", "error", "words"), REFUSED)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_prepare_refuses(build, options, error, words):
    with pytest.raises(error, match=words):
        spre_fx.prepare(build(), **{"pattern": "2:4"} | options)


def test_a_refused_model_is_left_as_it_was():
    model = nan_net()
    before = pickle.dumps(model)
    with pytest.raises(spre_fx.ModelError):
        spre_fx.prepare(model)
    assert pickle.dumps(model) == before


def test_preparing_twice_is_refused():
    with pytest.raises(spre_fx.ModelError, match="`prepare` has prepared"):
        spre_fx.prepare(spre_fx.prepare(small_net(), "2:4"), "2:4")


@pytest.mark.parametrize("model", [small_net(), torch.fx.symbolic_trace(small_net())])
def test_finalizing_what_was_never_prepared_is_refused(model):
    with pytest.raises(spre_fx.ModelError, match="without N:M layers in training"):
        spre_fx.finalize(model)


def test_finalizing_twice_is_refused():
    deployed = spre_fx.finalize(spre_fx.prepare(small_net(), "2:4"))
    with pytest.raises(spre_fx.ModelError, match="a deployed model is final"):
        spre_fx.finalize(deployed)


def test_finalize_refuses_an_unknown_backend():
    with pytest.raises(spre_fx.OptionError, match="backend='tpu': expected one of 'auto', 'cpu'"):
        spre_fx.finalize(spre_fx.prepare(small_net(), "2:4"), backend="tpu")


def test_finalize_refuses_diverged_weights():
    prepared = spre_fx.prepare(small_net(), "2:4")
    with torch.no_grad():
        prepared.get_submodule("3_spre").weight.fill_(float("inf"))
    with pytest.raises(spre_fx.ModelError, match=r"3_spre\.weight: .* 2304 infinite"):
        spre_fx.finalize(prepared)


def test_finalize_refuses_a_site_whose_fold_cannot_be_exact():
    prepared = spre_fx.prepare(small_net(), "2:4")
    bn = prepared.get_submodule("4")
    bn.eps, bn.running_var = 0.0, torch.zeros_like(bn.running_var)
    with pytest.raises(spre_fx.VerificationError, match=r"^3: .*running variances"):
        spre_fx.finalize(prepared)
