"""Averaged copies, deep copies, and whole models through torch.save."""

import copy
import subprocess
import sys

import pytest
import torch
from loops import (
    FEW,
    OF_LAYERS,
    RECIPES,
    assert_agrees,
    batch,
    loss_of,
    masks,
    prepared,
    quick,
    sgd,
    train,
)
from models import assert_same
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

import spre_fx
from spre_fx import EveryK
from spre_fx import masks as pure
from spre_fx.patterns import Pattern

AVERAGES = {
    "swa": {},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.8)},
    "ema one by one": {"avg_fn": get_ema_avg_fn(0.8)},
}
F64 = {"dtype": torch.float64}


def averaged(recipe: str, use_buffers: bool, **average) -> tuple[torch.nn.Module, AveragedModel]:
    """A model trained for ten steps, and the average of it over them."""
    model = prepared(recipe, **F64)
    average = AveragedModel(model, use_buffers=use_buffers, **average)
    optimizer = sgd(model)
    for step in range(10):
        train(model, optimizer, range(step, step + 1), recipe)
        average.update_parameters(model)
    return model, average


@pytest.mark.parametrize("average", quick("ema", of=AVERAGES))
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_average_without_buffers_has_the_masks_of_the_model(recipe, average):
    model, copied = averaged(recipe, use_buffers=False, **AVERAGES[average])
    ours, theirs = masks(copied.module), masks(model)
    assert ours.keys() == theirs.keys()
    if recipe == "lbc":  # made of scores, which are averaged
        ours, theirs = {}, {}
    if recipe in ("sr-ste", "steady taps"):  # made of weights, which are averaged
        theirs = {
            name: pure.nm_mask(copied.module.get_submodule(name).weight.detach(), Pattern(1, 4))
            for name in theirs
        }
    assert_same(ours, theirs)
    update_bn([batch(0, **F64)], copied)
    assert_obeys(recipe, copied.module)


@pytest.mark.parametrize("average", quick("ema", of=("ema", "ema one by one")))
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_average_of_buffers_too_still_obeys_the_pattern(recipe, average):
    _, copied = averaged(recipe, use_buffers=True, **AVERAGES[average])
    if recipe == "sr-ste every 3":  # the average keeps what any of the masks kept
        kept = copied.module.get_submodule("3").nm_mask.mask
        assert not pure.obeys(kept, Pattern(1, 4))
    assert_obeys(recipe, copied.module)


def test_plain_averages_of_bool_buffers_are_refused_by_torch():
    averaged("sr-ste", use_buffers=True)
    with pytest.raises(NotImplementedError, match="bool tensor"):
        averaged("sr-ste every 3", use_buffers=True)


def assert_obeys(recipe: str, model: torch.nn.Module) -> None:
    deployed = assert_agrees(model)
    if recipe in OF_LAYERS:
        for name, mask in masks(model).items():
            assert pure.obeys(mask, Pattern(1, 4))
            assert pure.obeys(deployed.get_submodule(name).weight, Pattern(1, 4))


def test_holding_a_kept_mask_to_its_pattern_changes_no_mask_that_was_made_here():
    model = prepared("asp", **F64).eval()
    layer = model.get_submodule("3")
    with torch.no_grad():
        layer.weight.zero_()  # a kept weight that is 0 is still kept
    assert torch.equal(layer.masked_weight()[1], layer.nm_mask.mask)
    assert layer.nm_mask.mask.sum() == layer.weight.numel() / 4


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_deep_copy_in_the_middle_of_training_goes_its_own_way_and_the_same(recipe):
    model = prepared(recipe)
    optimizer = sgd(model)
    train(model, optimizer, range(5), recipe)
    twin = copy.deepcopy(model)
    other = sgd(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = copy.deepcopy(twin.state_dict())
    train(model, optimizer, range(5, 10), recipe)
    assert_same(twin.state_dict(), before)
    train(twin, other, range(5, 10), recipe)
    assert_same(twin.state_dict(), model.state_dict())


FRESH = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
from loops import assert_agrees, sgd, train
for recipe in {recipes!r}:
    model = torch.load({directory!r} + f"/{{recipe}}.pt", weights_only=False)
    train(model, sgd(model), range(4, 8), recipe)
    torch.save(model.state_dict(), {directory!r} + f"/{{recipe}}.state")
    assert_agrees(model)
"""


@pytest.mark.parametrize(
    "recipes",
    [
        pytest.param(FEW, id="few"),
        pytest.param(tuple(RECIPES), marks=pytest.mark.slow, id="all"),
    ],
)
def test_a_whole_model_is_saved_and_goes_on_in_a_fresh_process(recipes, tmp_path):
    expected = {}
    for recipe in recipes:
        model = prepared(recipe)
        train(model, sgd(model), range(4), recipe)
        torch.save(model, tmp_path / f"{recipe}.pt")
        train(model, sgd(model), range(4, 8), recipe)
        expected[recipe] = model.state_dict()
    here = str(next(p for p in sys.path if p.endswith("tests")))
    code = FRESH.format(here=here, directory=str(tmp_path), recipes=recipes)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for recipe in recipes:
        assert_same(torch.load(tmp_path / f"{recipe}.state"), expected[recipe])


def test_a_copy_with_a_scaler_is_averaged_like_any_other():
    scaler = torch.amp.GradScaler("cpu")
    model = prepared(method=spre_fx.SRSTE(scaler=scaler), schedule=EveryK(2))
    loss_of(model, batch(0)).backward()
    average = AveragedModel(model)
    assert average.module.get_submodule("3").method.scaler is scaler
