"""What DistributedDataParallel is told, and where that survives."""

import copy
import pickle

import pytest
import torch
from loops import OF_LAYERS, RECIPES, net, prepared
from torch import nn

from spre_fx.ranks import is_shard, keep_masks_from_ddp, whole

TOLD = "_ddp_params_and_buffers_to_ignore"


@pytest.mark.parametrize("recipe", RECIPES)
def test_ddp_is_told_of_every_buffer_of_the_size_of_a_weight(recipe):
    model = prepared(recipe)
    told = set(getattr(model, TOLD, ()))
    large = {name for name, buffer in model.named_buffers() if buffer.numel() > 16}
    assert large <= told
    assert (large == set()) is (recipe == "sr-ste")
    statistics = {name for name, _ in model.named_buffers() if "running" in name}
    assert not told & (
        statistics | {"mask_schedule.step"} | {n for n, _ in model.named_parameters()}
    )


@pytest.mark.parametrize("recipe", ["asp", "rigl"])
def test_the_compiled_model_tells_it_the_same_under_its_own_names(recipe):
    model = prepared(recipe)
    compiled = torch.compile(model)
    ours = {name for name, _ in model.named_buffers() if name in getattr(model, TOLD)}
    theirs = {name for name, _ in compiled.named_buffers() if name in getattr(compiled, TOLD)}
    assert theirs == {f"_orig_mod.{name}" for name in ours} != set()


@pytest.mark.parametrize("recipe", OF_LAYERS)
def test_copies_and_pickles_tell_it_too(recipe):
    model = prepared(recipe)
    told = getattr(model, TOLD, None)
    assert getattr(copy.deepcopy(model), TOLD, None) == told
    assert getattr(copy.deepcopy(copy.deepcopy(model)), TOLD, None) == told
    assert getattr(pickle.loads(pickle.dumps(model)), TOLD, None) == told


def test_a_module_around_a_prepared_model_and_what_it_said_before():
    outer = nn.ModuleDict({"backbone": prepared("asp"), "head": nn.Linear(4, 4)})
    setattr(outer, TOLD, ["head.bias"])
    keep_masks_from_ddp(outer)
    assert set(getattr(outer, TOLD)) >= {"head.bias", "backbone.3.nm_mask.mask"}


def test_a_model_without_masks_is_left_alone():
    dense = net()
    keep_masks_from_ddp(dense)
    assert not hasattr(dense, TOLD)


def test_a_plain_tensor_is_whole():
    tensor = torch.zeros(2)
    assert whole(tensor) is tensor
    assert not is_shard(tensor)
