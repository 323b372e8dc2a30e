"""`cost`: hand-computed counts, and the figures of Table 9 that a rule gives."""

import copy
import json
from fractions import Fraction

import pytest
import torch
from test_api import small_net
from torch import nn
from torchvision.models import mobilenet_v2, resnet50

import spre_fx
from spre_fx.cost_report import Amount, SiteCost, times


def one_conv(conv: nn.Module, features: int | None = None) -> nn.Module:
    norms = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
    return nn.Sequential(conv, norms[type(conv)](conv.out_channels), nn.ReLU())


def only(model: nn.Module, *shape: int) -> SiteCost:
    (site,) = spre_fx.cost(model, torch.empty(shape)).sites
    return site


def test_a_dense_conv_by_hand():
    site = only(nn.Sequential(nn.Conv2d(8, 4, 3, stride=2, padding=1)), 2, 8, 6, 6)
    weights, positions = 4 * 8 * 9, 2 * 3 * 3
    assert site.parameters == Amount(weights, weights, weights, weights)
    flops = 2 * weights * positions
    assert site.flops == Amount(3 * flops, 3 * flops, flops, flops)


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv1d(16, 8, 3), (2, 16, 9)),
        (nn.Conv2d(16, 8, 3), (2, 16, 9, 9)),
        (nn.Conv2d(16, 8, 3, groups=2), (2, 16, 9, 9)),
        (nn.Conv3d(16, 8, 3), (2, 16, 9, 9, 9)),
    ],
    ids=str,
)
def test_a_spre_site_by_hand(conv, shape):
    prepared = spre_fx.prepare(one_conv(conv), "2:8")
    site = only(prepared, *shape)
    weights, taps = conv.weight.numel(), conv.weight[0, 0].numel()
    positions = 2 * 7 ** (len(shape) - 2)
    layer = prepared.get_submodule("0")
    live = int(spre_fx.masks.live_taps(layer.weight.detach(), spre_fx.Pattern(2, 8)).sum())
    assert site.live_taps == (live, taps)
    assert site.parameters.train == weights + weights * live // taps
    assert site.parameters.test == weights // 4
    kept_by_spre = weights // 4 * live // taps
    assert site.flops.train == 2 * positions * (weights // 4 + 2 * weights + 3 * kept_by_spre)
    assert site.flops.test == 2 * positions * weights // 4


def test_linear_transposed_and_functional_layers_by_hand():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 6, 2, stride=2)
            self.head = nn.Linear(6, 8)
            self.kernel = nn.Parameter(torch.randn(5, 8))

        def forward(self, x):
            x = self.head(self.up(x).flatten(2).transpose(1, 2))
            return nn.functional.linear(self.head(x[..., :6]), self.kernel)

    cost = spre_fx.cost(Mixed(), torch.empty(2, 4, 3, 3))
    up, head, functional = cost.sites
    assert up.flops.dense_test == 2 * (4 * 6 * 2 * 2) * (2 * 3 * 3)
    assert (head.calls, head.flops.dense_test) == (2, 2 * 2 * 48 * (2 * 36))
    assert functional.weight_shape == (5, 8)
    assert functional.flops.dense_test == 2 * 40 * (2 * 36)
    assert cost.model.flops.dense_test == sum(site.flops.dense_test for site in cost.sites)


def test_plain_and_deployed_models():
    image = torch.empty(2, 3, 9, 9)
    plain = spre_fx.cost(spre_fx.prepare(small_net(), "2:4", branch=None), image)
    assert plain.sparse.flops.train_ratio == (Fraction(1, 2) + 2) / 3
    assert plain.sparse.flops.test_ratio == plain.sparse.parameters.test_ratio == Fraction(1, 2)
    assert plain.sparse.parameters.train_ratio == 1
    assert plain.model.flops.test_ratio > plain.sparse.flops.test_ratio  # the stem is dense
    prepared = spre_fx.prepare(small_net(), "2:4")
    deployed = spre_fx.cost(spre_fx.finalize(prepared), image)
    assert deployed.sparse.flops.test == spre_fx.cost(prepared, image).sparse.flops.test
    assert deployed.sparse.flops.train is None
    assert deployed.sparse.flops.train_ratio is None


def test_depthwise_layers_stay_dense():
    cost = spre_fx.cost(spre_fx.prepare(mobilenet_v2(), "2:4"), torch.empty(1, 3, 32, 32))
    depthwise = next(s for s in cost.sites if s.weight_shape == (32, 1, 3, 3))
    assert (depthwise.pattern, depthwise.flops.train_ratio) == (None, 1)
    assert depthwise.flops.dense_test == 2 * 32 * 9 * 16 * 16


def test_what_only_training_runs_costs_nothing_at_test():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.auxiliary = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return (self.main(x), self.auxiliary(x)) if self.training else self.main(x)

    main, auxiliary = spre_fx.cost(Auxiliary(), torch.empty(2, 8)).sites
    assert main.flops.dense_test > 0
    assert (auxiliary.flops.dense_train, auxiliary.flops.test) == (main.flops.dense_train, 0)
    assert auxiliary.flops.test_ratio is None


# Table 9: FLOPs in training and at test, parameters in training and at test.
@pytest.mark.parametrize(
    ("pattern", "printed"),
    [
        ("2:4", ["0.83x", "0.50x", "1.00x", "0.50x"]),
        # The paper prints 0.74.
        pytest.param("1:4", ["0.75x", "0.25x", "1.00x", "0.25x"], marks=pytest.mark.slow),
        pytest.param("1:8", ["0.71x", "0.13x", "1.00x", "0.13x"], marks=pytest.mark.slow),
        ("1:16", ["0.69x", "0.06x", "1.00x", "0.06x"]),
    ],
)
def test_table_9_of_sr_ste_on_resnet_50(pattern, printed):
    prepared = spre_fx.prepare(resnet50(), pattern, branch=None)
    total = spre_fx.cost(prepared, torch.empty(1, 3, 224, 224)).sparse
    amounts = (total.flops, total.parameters)
    assert [times(r) for a in amounts for r in (a.train_ratio, a.test_ratio)] == printed
    assert total.parameters.dense_train == 25_502_912 - 64 * 3 * 7 * 7  # all but the stem


def test_the_model_is_not_touched():
    prepared = spre_fx.prepare(small_net(), "2:4", schedule=spre_fx.EveryK(2)).train()
    before = copy.deepcopy(prepared.state_dict())
    spre_fx.cost(prepared, torch.randn(2, 3, 9, 9))
    after = prepared.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert prepared.training
    assert not any(module._forward_hooks for module in prepared.modules())


def test_it_prints_and_is_json():
    cost = spre_fx.cost(spre_fx.prepare(small_net(), "1:8"), torch.empty(2, 3, 9, 9))
    assert "all convs and linears" in str(cost)
    data = json.loads(json.dumps(cost.to_dict()))
    assert data["sparse"]["flops"]["test_ratio"] == 0.125
    assert data["sites"][1]["weight_shape"] == [16, 16, 3, 3]


def test_a_wrong_input_is_named():
    with pytest.raises(spre_fx.ModelError, match=r"found for \(\(2, 5, 9, 9\),\)"):
        spre_fx.cost(small_net(), torch.empty(2, 5, 9, 9))
