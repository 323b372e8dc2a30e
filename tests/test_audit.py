"""`audit`: every layer's pattern from its zeros, and whether a prepared model can be finalized."""

import pytest
import torch
from test_api import small_net
from torch import nn

import spre_fx
from spre_fx.audit import audit


def test_a_prepared_model_is_checked_before_and_after_folding():
    found = audit(spre_fx.prepare(small_net(), "2:4"))
    assert found.ok
    assert [(layer.name, layer.stage) for layer in found.layers] == [
        (name, stage) for stage in ("prepared", "deployed") for name in ("3", "6", "10")
    ]
    assert {(layer.pattern, layer.most, layer.density) for layer in found.layers} == {
        ("2:4", 2, 0.5)
    }


def test_a_deployed_layer_with_too_many_non_zeros_is_named():
    deployed = spre_fx.finalize(spre_fx.prepare(small_net(), "2:4"))
    deployed.get_submodule("3").weight.data[0, :4, 0, 0] = 1.0
    found = audit(deployed)
    assert [layer.name for layer in found.layers if not layer.ok] == ["3"]
    assert "1 of 3 layers break their pattern" in str(found)
    assert not found.to_dict()["ok"]


def test_a_last_partial_group_counts_as_one():
    prepared = spre_fx.prepare(nn.Sequential(nn.Linear(6, 2)), "1:4")
    deployed = spre_fx.finalize(prepared)
    deployed.get_submodule("0").weight.data[1, 4:] = 1.0
    (layer,) = audit(deployed).layers
    assert (layer.most, layer.ok) == (2, False)


def test_a_flat_pattern_is_counted_in_its_own_groups():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8))
    prepared = spre_fx.prepare(net, "1:4", depthwise="flat")
    found = audit(prepared)
    assert {(layer.pattern, layer.most, layer.ok) for layer in found.layers} == {
        ("1:4 flat", 1, True)
    }
    deployed = spre_fx.finalize(prepared)
    deployed.get_submodule("0").weight.data[0, 0, 2, 2] = 1.0  # the first of the third group
    deployed.get_submodule("0").weight.data[1, 0, 0, :2] = 1.0  # the next two, of another filter
    (layer,) = audit(deployed).layers
    assert (layer.most, layer.ok) == (3, False)


def test_a_model_that_cannot_be_finalized_fails():
    prepared = spre_fx.prepare(small_net(), "2:4")
    prepared.get_submodule("4").running_var.zero_()
    prepared.get_submodule("4").eps = 0.0
    found = audit(prepared)
    assert not found.ok
    assert "3: expected folded and two-branch outputs to agree" in found.error
    assert "finalize failed" in str(found)


def test_models_without_a_pattern_are_refused():
    with pytest.raises(spre_fx.ModelError, match="found a Sequential without N:M layers"):
        audit(small_net())
    diverged = spre_fx.prepare(small_net(), "2:4")
    diverged.get_submodule("3").weight.data[0] = torch.nan
    with pytest.raises(spre_fx.ModelError, match="expected finite values"):
        audit(diverged)
