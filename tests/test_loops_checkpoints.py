"""Checkpoints: what loads, and what is refused with the difference named."""

import copy
import io
from collections import OrderedDict

import pytest
import torch
from loops import OF_LAYERS, RECIPES, batch, net, prepared, sgd, train
from models import assert_same

from spre_fx import ASP, SRSTE, EveryK

NEXT = "Prepare the model as the one that was saved."


def saved(state, weights_only=True):
    """As torch.save and torch.load leave it."""
    file = io.BytesIO()
    torch.save({"model": state}, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)["model"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_checkpoint_loads_strictly_and_comes_out_the_same(recipe):
    model, other = prepared(recipe), prepared(recipe, seed=1)
    train(model, sgd(model), range(3), recipe)
    other.load_state_dict(saved(model.state_dict()))
    assert_same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("transfer", [saved, copy.deepcopy, lambda s: saved(s, False), lambda s: s])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("of", "into", "words"),
    [
        ({"pattern": "1:8"}, {"pattern": "2:4"}, ("pattern 2:4", "pattern 1:8")),
        ({"method": "asp"}, {"schedule": EveryK(2)}, ("method SRSTE", "method ASP")),
        (
            {"pattern": "2:4", "method": ASP()},
            {"pattern": "1:4", "schedule": EveryK(2)},
            ("pattern 1:4 and method SRSTE", "pattern 2:4 and method ASP"),
        ),
    ],
)
def test_another_pattern_or_method_is_refused_once(transfer, strict, of, into, words):
    state = transfer(prepared(**of).state_dict())
    model = prepared(seed=1, **into)
    before = model.get_submodule("3").weight.detach().clone()
    with pytest.raises(RuntimeError) as refusal:
        model.load_state_dict(state, strict=strict)
    message = "0: expected a checkpoint of {}, found one of {}. ".format(*words) + NEXT
    assert str(refusal.value).split("\n\t")[1:] == [message]
    assert torch.equal(model.get_submodule("3").weight, before)


def test_options_of_a_method_may_differ():
    model = prepared(method=SRSTE(decay=0.1))
    model.load_state_dict(prepared(seed=1).state_dict())


@pytest.mark.parametrize("recipe", OF_LAYERS)
def test_a_dense_checkpoint_loads_with_the_new_keys_missing(recipe):
    torch.manual_seed(1)
    dense = net()
    model = prepared(recipe)
    missing, unexpected = model.load_state_dict(saved(dense.state_dict()), strict=False)
    assert unexpected == []
    new = model.state_dict().keys() - dense.state_dict().keys()
    counters = {name for name in new if name.endswith("num_batches_tracked")}
    assert set(missing) == new - counters  # torch makes these up where there are none
    for name, tensor in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_a_dict_of_tensors_alone_is_taken_at_its_word():
    model = prepared(pattern="2:4")
    model.load_state_dict(dict(prepared(pattern="1:8").state_dict()))


def test_a_state_dict_of_a_module_around_it_is_checked_too():
    outer = torch.nn.ModuleDict({"backbone": prepared(pattern="1:8")})
    other = torch.nn.ModuleDict({"backbone": prepared(pattern="2:4")})
    with pytest.raises(RuntimeError, match=r"backbone\.0: expected a checkpoint of pattern 2:4"):
        other.load_state_dict(outer.state_dict())


def test_the_metadata_adds_no_key_and_needs_none():
    model = prepared()
    state = model.state_dict()
    assert state._metadata["3"]["spre_fx"] == {"pattern": "1:4", "method": "SRSTE"}
    assert not [key for key in state if "spre_fx" in key]
    into: dict[str, torch.Tensor] = OrderedDict()
    model._save_to_state_dict(into, "", keep_vars=False)  # a dict without metadata
    model.get_submodule("3")._save_to_state_dict(into, "3.", keep_vars=False)
    assert list(into) == ["3.weight"]


@pytest.mark.parametrize("recipe", ["asp", "gmp", "rigl"])
def test_weights_loaded_after_prepare_decide_the_first_masks(recipe):
    dense = prepared(recipe, seed=1)  # its weights, and the masks that belong to them
    model = prepared(recipe, seed=0)
    weights = {n: p for n, p in dense.state_dict().items() if "mask" not in n}
    model.load_state_dict(weights, strict=False)
    assert torch.equal(model(batch(0)), dense(batch(0)))
    kept = {n: b for n, b in model.state_dict().items() if n.endswith("nm_mask.mask")}
    assert len(kept) == 4
    assert all(torch.equal(mask, dense.state_dict()[name]) for name, mask in kept.items())
