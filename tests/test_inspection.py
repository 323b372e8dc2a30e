"""`sites`: one record per conv and linear, of a dense, prepared or deployed model."""

import pytest
import torch
from test_api import small_net
from torch import nn
from torchvision.models import mobilenet_v2

import spre_fx
from spre_fx import State


def by_name(model: nn.Module) -> dict[str, spre_fx.SiteInfo]:
    return {site.name: site for site in spre_fx.sites(model)}


def test_a_dense_model_is_all_dense():
    sites = by_name(small_net())
    assert {site.state for site in sites.values()} == {State.DENSE}
    assert sites["3"].structure == "Conv2d -> BN"
    assert sites["3"].weight_shape == (16, 16, 3, 3)
    assert sites["3"].density == 1.0
    assert sites["3"].parameters == 16 * 16 * 9 + 32
    assert sites["10"].structure == "Linear"


def test_a_prepared_model_tells_what_became_of_each_layer():
    sites = by_name(spre_fx.prepare(small_net(), "1:8"))
    stem, spre, pointwise, linear = (sites[name] for name in ("0", "3", "6", "10"))
    assert (stem.state, stem.reason) == (State.SKIPPED, "fewer input channels than M")
    assert stem.note == "0: C_in/groups=3 is less than M=8"
    assert (spre.state, spre.pattern) == (State.SPRE, "1:8")
    assert spre.structure == "N:M Conv2d -> BN + SpRe -> BN"
    assert spre.density == 1 / 8
    assert spre.parameters == 2 * (16 * 16 * 9 + 32)
    assert (pointwise.state, pointwise.live_taps) == (State.NM, None)
    assert pointwise.note == "6: a 1x1 kernel has one tap, no SpRe branch"
    assert linear.note == "10: a linear layer has no taps, no SpRe branch"


def test_live_taps_and_nonzeros_are_those_of_the_masks():
    prepared = spre_fx.prepare(small_net(), "1:8")
    weight = prepared.get_submodule("3").weight
    live = int(spre_fx.masks.live_taps(weight.detach(), spre_fx.Pattern(1, 8)).sum())
    site = by_name(prepared)["3"]
    assert site.live_taps == (live, 9)
    assert site.nonzeros == 16 * 2 * (9 + live)


def test_a_deployed_model_keeps_names_patterns_and_reasons():
    sites = by_name(spre_fx.finalize(spre_fx.prepare(small_net(), "1:8"), "dense"))
    assert sites["3"].state is State.DEPLOYED
    assert sites["3"].structure == "N:M Conv2d"
    assert (sites["3"].pattern, sites["3"].backend) == ("1:8", "dense")
    assert sites["3"].nonzeros <= 16 * 2 * 9
    assert (sites["0"].state, sites["0"].reason) == (State.SKIPPED, "fewer input channels than M")


def test_depthwise_convs_are_listed_with_their_reason():
    sites = by_name(spre_fx.prepare(mobilenet_v2(num_classes=8), "2:4"))
    depthwise = [site for site in sites.values() if site.reason == "depthwise"]
    assert len(depthwise) == 17
    assert all("groups=" in site.note for site in depthwise)


def test_functional_calls_and_layers_inside_whole_modules_are_listed():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.unused = nn.Linear(8, 8)
            self.head = nn.Linear(8, 8)

        def forward(self, x):
            x = nn.functional.linear(x, self.weight)
            return self.head(self.attention(x, x, x)[0])

    with pytest.warns(UserWarning, match="leaves out: unused"):
        sites = by_name(spre_fx.prepare(Mixed(), "2:4"))
    assert sites["linear"].reason == "functional call"
    assert sites["attention.out_proj"].reason == "inside a module kept whole"
    assert "attention (MultiheadAttention)" in sites["attention.out_proj"].note
    assert sites["head"].state is State.NM
    assert "unused" not in sites
    unused = by_name(Mixed())["unused"]
    assert (unused.state, unused.reason) == (State.SKIPPED, "never called")
    assert unused.note == "unused: is never called in the traced forward"


def test_sites_do_not_edit_the_model():
    model = small_net()
    keys, training = list(model.state_dict()), model.training
    spre_fx.sites(model)
    assert (list(model.state_dict()), model.training) == (keys, training)
