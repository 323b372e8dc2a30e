"""Autocast, GradScaler, memory formats, dtypes and devices."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from loops import RECIPES, SHAPE, assert_agrees, batch, loss_of, masks, net, prepared, sgd, train
from torch import nn

import spre_fx
from spre_fx import SRSTE, EveryK, methods
from spre_fx.errors import OptionError


@pytest.fixture(autouse=True)
def warned_of_nothing(monkeypatch):
    """Each test is the first of its process to use float16."""
    monkeypatch.setattr(methods, "_warned", [])


@pytest.mark.parametrize("recipe", RECIPES)
def test_bfloat16_autocast_trains_without_a_warning(recipe):
    model = prepared(recipe)
    optimizer = sgd(model)
    for step in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            if recipe == "taylor":
                spre_fx.update_taps(model, lambda: loss_of(model, batch(0)))
            loss = loss_of(model, batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert_agrees(model)


def gradients(model: nn.Module, x: torch.Tensor, scaler, dtype) -> dict[str, torch.Tensor]:
    """Gradients of one step, unscaled where they were scaled."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype):
        loss = loss_of(model, x)
    if scaler is None:
        loss.backward()
    else:
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("schedule", [None, EveryK(2)], ids=repr)
def test_unscaled_gradients_are_those_without_a_scaler(schedule):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    torch.manual_seed(0)
    # Small images: no gradient is lost to float16 at either scale. A large decay is easily seen.
    plain = spre_fx.prepare(net(norms=False), "1:4", method=SRSTE(0.5), schedule=schedule)
    scaled, wrong = copy.deepcopy(plain), copy.deepcopy(plain)
    for layer in scaled.modules():
        if hasattr(layer, "method"):
            layer.method = SRSTE(0.5, scaler=scaler)
    x = batch(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the decay, which is what this is about
        expected = gradients(plain, x, None, torch.float16)
        unaware = gradients(
            wrong, x, torch.amp.GradScaler("cpu", init_scale=2.0**12), torch.float16
        )
    found = gradients(scaled, x, scaler, torch.float16)
    weight = expected["3.weight"]
    removed = ~masks(plain)["3"]
    assert (weight - unaware["3.weight"])[removed].abs().max() > 0.01  # the decay was lost
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-2, atol=2e-4)
    decay = 0.5 * plain.get_submodule("3").weight.detach()[removed]
    torch.testing.assert_close(
        (found["3.weight"] - unaware["3.weight"])[removed], decay, rtol=1e-2, atol=2e-3
    )


def test_in_float64_the_scale_is_divided_away_exactly():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    plain = prepared(method=SRSTE(0.5), dtype=torch.float64)
    scaled = prepared(method=SRSTE(0.5, scaler=scaler), dtype=torch.float64)
    x = batch(0, dtype=torch.float64)
    loss_of(plain, x).backward()
    scaler.scale(loss_of(scaled, x)).backward()
    for ours, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad / 2.0**16, theirs.grad, rtol=1e-10, atol=1e-14)


def test_training_with_a_scaler_follows_its_scale_and_skips_what_overflows():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)
    model = prepared(method=SRSTE(1e-3, scaler=scaler))
    optimizer, scales = sgd(model), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(40):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, batch(step % 3))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
    assert scales[0] < 2.0**40
    assert any(after > before for before, after in itertools.pairwise(scales))
    assert all(p.isfinite().all() for p in model.parameters())
    assert_agrees(model)


def test_float16_autocast_without_the_scaler_warns_once_a_process():
    model = prepared()

    def run():
        with torch.autocast("cpu", torch.float16):
            return [model(batch(step)) for step in range(2)]

    words = r"expected SRSTE\(decay, scaler=your_grad_scaler\)"
    with pytest.warns(UserWarning, match=words) as seen:
        run()
    assert len(seen) == 1


@pytest.mark.parametrize(
    "quiet",
    [
        lambda model: torch.no_grad()(model)(batch(0)),
        lambda model: prepared(method=SRSTE(0.0))(batch(0)),
        lambda model: prepared(method=SRSTE(scaler=torch.amp.GradScaler("cpu")))(batch(0)),
        lambda model: prepared("asp")(batch(0)),
    ],
    ids=["no gradient", "no decay", "a scaler", "another method"],
)
def test_what_has_no_decay_to_lose_does_not_warn(quiet):
    with torch.autocast("cpu", torch.float16):
        quiet(prepared())


def test_a_disabled_scaler_scales_nothing():
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert SRSTE(0.5, scaler=scaler)._scaled_decay(torch.device("cpu")) == 0.5


def test_copies_mean_the_same_scaler_and_pickles_none():
    scaler = torch.amp.GradScaler("cpu")
    model = prepared(method=SRSTE(0.5, scaler=scaler))
    twin = copy.deepcopy(model).get_submodule("3").method
    assert twin.scaler is scaler
    assert pickle.loads(pickle.dumps(twin)).scaler is None
    loaded = pickle.loads(pickle.dumps(model)).get_submodule("3").method
    assert loaded.scaler is None
    assert loaded == twin == SRSTE(0.5)


def test_what_is_no_scaler_is_refused():
    with pytest.raises(OptionError) as refusal:
        SRSTE(scaler=65536.0)
    assert str(refusal.value) == (
        "SRSTE(scaler=65536.0): expected the torch.amp.GradScaler of the training loop, or None."
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_channels_last_weights_stay_so_and_compute_the_same(recipe):
    torch.manual_seed(0)
    dense = net().double().to(memory_format=torch.channels_last)
    model = spre_fx.prepare(dense, "1:4", **RECIPES[recipe])
    plain = prepared(recipe, dtype=torch.float64)
    assert_channels_last(model)
    plain.load_state_dict(model.state_dict())
    x = batch(0, dtype=torch.float64)
    for step in range(3):
        for each in (model, plain):
            train(each, torch.optim.SGD(each.parameters(), 0.1), range(step, step + 1), recipe)
    assert_channels_last(model)
    y = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, plain(x), rtol=1e-10, atol=1e-10)
    deployed = assert_agrees(model)
    assert_channels_last(deployed)


def assert_channels_last(model: nn.Module) -> None:
    kernels = {n: p for n, p in model.named_parameters() if p.dim() == 4 and p.shape[-1] > 1}
    assert len(kernels) >= 2
    wrong = [
        n for n, p in kernels.items() if not p.is_contiguous(memory_format=torch.channels_last)
    ]
    assert wrong == []


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_model_changes_its_type_in_the_middle_of_training(recipe, dtype):
    model = prepared(recipe)
    train(model, sgd(model), range(3), recipe)
    before = masks(model)
    model = model.to(dtype)
    if dtype is torch.float64:
        assert all(torch.equal(mask, before[name]) for name, mask in masks(model).items())
        train(model, sgd(model), range(3, 6), recipe)
    else:
        loss_of(model, torch.randn(SHAPE, dtype=dtype)).backward()
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {
        b.dtype for n, b in model.named_buffers() if n.endswith(("nm_mask.mask", "removed"))
    } <= {torch.bool}
    assert_agrees(model)


@pytest.mark.cuda
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_moves_to_another_device_in_the_middle_of_training(recipe):
    model = prepared(recipe)
    train(model, sgd(model), range(3), recipe)
    before = masks(model)
    model = model.cuda()
    assert {t.device.type for t in model.state_dict().values()} == {"cuda"}
    assert all(torch.equal(mask.cpu(), before[name]) for name, mask in masks(model).items())
    loss_of(model, batch(3).cuda()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert_agrees(model.cpu())


@pytest.mark.cuda
def test_float16_on_a_device_waits_for_nothing():
    scaler = torch.amp.GradScaler("cuda")
    model = prepared(method=SRSTE(scaler=scaler)).cuda()
    x = batch(0).cuda()
    for _ in range(2):
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.autocast("cuda", torch.float16):
                loss = loss_of(model, x)
            scaler.scale(loss).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
