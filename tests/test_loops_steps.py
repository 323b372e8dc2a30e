"""Accumulation, clipping, activation checkpointing, several models: what people put in a step."""

import copy

import pytest
import torch
from loops import (
    RECIPES,
    assert_agrees,
    batch,
    loss_of,
    masks,
    net,
    prepared,
    quick,
    sgd,
    train,
)
from models import assert_same
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import spre_fx
from spre_fx import SRSTE, EveryK

F64 = {"dtype": torch.float64}


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("k", [2, 4])
def test_k_micro_batches_with_a_kth_of_the_decay_are_one_big_batch(k):
    big = prepared(norms=False, method=SRSTE(0.5), **F64)
    small = prepared(norms=False, method=SRSTE(0.5 / k), **F64)
    uncorrected = prepared(norms=False, method=SRSTE(0.5), **F64)
    x = batch(0, dtype=torch.float64)
    loss_of(big, x).backward()
    for part in x.chunk(k):
        for each in (small, uncorrected):
            (loss_of(each, part) / k).backward()
    for ours, theirs in zip(gradients(small), gradients(big), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    weight = big.get_submodule("3").weight.detach()
    excess = uncorrected.get_submodule("3").weight.grad - big.get_submodule("3").weight.grad
    expected = (k - 1) * 0.5 * weight * ~masks(big)["3"]
    torch.testing.assert_close(excess, expected, rtol=1e-10, atol=1e-12)


def test_each_micro_batch_is_a_step_of_the_schedule():
    model = prepared(schedule=EveryK(4))
    for _ in range(3):
        loss_of(model, batch(0)).backward()
    assert model.get_buffer("mask_schedule.step") == 3


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])
@pytest.mark.parametrize("recipe", quick("sr-ste", "lbc", "rigl"))
def test_clipped_gradients(recipe, clip):
    model = prepared(recipe, **F64)
    optimizer = sgd(model)
    for step in range(4):
        if recipe == "taylor":
            spre_fx.update_taps(model, lambda: loss_of(model, batch(0, **F64)))
        optimizer.zero_grad()
        (1e6 * loss_of(model, batch(step, **F64))).backward()
        clip(model.parameters(), 1e-3)
        assert max(gradient.abs().max() for gradient in gradients(model)) <= 1e-3
        optimizer.step()
    assert_agrees(model)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_activation_checkpointing_of_the_whole_changes_nothing(recipe, reentrant):
    plain, model = prepared(recipe, **F64), prepared(recipe, **F64)
    for each in (plain, model):  # their statistics are counted twice under checkpointing
        for norm in each.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 0.0
    optimizers = {each: sgd(each) for each in (plain, model)}
    for step in range(7):
        x = batch(step, **F64).requires_grad_()
        for each, optimizer in optimizers.items():
            if recipe == "taylor":
                spre_fx.update_taps(each, lambda each=each, x=x: loss_of(each, x))
            optimizer.zero_grad()
            run = each
            if each is model:
                run = lambda x: checkpoint(model, x, use_reentrant=reentrant)  # noqa: E731
            loss_of(run, x).backward()
            optimizer.step()
    state = {n: t for n, t in model.state_dict().items() if "num_batches" not in n}
    assert_same(state, {n: t for n, t in plain.state_dict().items() if n in state})
    assert_agrees(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_of_a_part_that_is_prepared(reentrant):
    torch.manual_seed(0)
    inner = spre_fx.prepare(net().double(), "1:4", schedule=EveryK(2))
    outer = nn.Sequential(nn.Conv2d(8, 8, 1).double(), inner)
    plain = copy.deepcopy(outer)
    x = batch(0, **F64).requires_grad_()
    for _ in range(3):
        checkpoint_sequential(outer, 2, x, use_reentrant=reentrant).sum().backward()
        plain(x).sum().backward()
    for ours, theirs in zip(gradients(outer), gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert outer.get_buffer("1.mask_schedule.step") == 3


def test_two_models_and_two_optimizers_do_not_meet():
    alone = {}
    for recipe in RECIPES:
        model = prepared(recipe)
        train(model, sgd(model), range(4), recipe)
        alone[recipe] = model.state_dict()
    models = {recipe: prepared(recipe) for recipe in RECIPES}
    optimizers = {recipe: sgd(model) for recipe, model in models.items()}
    for step in range(4):
        for recipe, model in models.items():
            train(model, optimizers[recipe], range(step, step + 1), recipe)
    for recipe, model in models.items():
        assert_same(model.state_dict(), alone[recipe])


@pytest.mark.parametrize("recipe", quick("sr-ste every 3", "lbc"))
def test_one_optimizer_for_two_models(recipe):
    first, second = prepared(recipe, **F64), prepared(recipe, seed=1, **F64)
    optimizer = torch.optim.AdamW([*first.parameters(), *second.parameters()], lr=1e-2)
    for step in range(3):
        x = batch(step, **F64)
        optimizer.zero_grad()
        (loss_of(first, x) + loss_of(second, x)).backward()
        optimizer.step()
    assert_agrees(first)
    assert_agrees(second)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("convert_first", [True, False])
def test_sync_batch_norm_before_and_after_prepare(recipe, convert_first):
    torch.manual_seed(0)
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    dense = net().double()
    if convert_first:
        dense = convert(dense)
    model = spre_fx.prepare(dense, "1:4", **RECIPES[recipe])
    if not convert_first:
        model = convert(model)
    norms = {n: type(m) for n, m in model.named_modules() if "BatchNorm" in type(m).__name__}
    assert set(norms.values()) == {nn.SyncBatchNorm}
    assert len(norms) == (3 if recipe in ("gmp", "rigl", "granet") else 5)
    plain = prepared(recipe, **F64)
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        train(each, sgd(each), range(4), recipe)
    assert_same(model.state_dict(), plain.state_dict())
    assert_agrees(model)
