"""torch.compile of the whole training graph: the losses of eager mode, and one compilation."""

import copy
import itertools
import warnings

import pytest
import torch
from loops import OF_LAYERS, assert_agrees, batch, loss_of, masks, prepared, quick, sgd
from torch._dynamo.testing import CompileCounterWithBackend

from spre_fx import SRSTE, methods
from spre_fx.modules import NMLayer

RECIPES = [name for name in OF_LAYERS if name != "taylor"]  # update_taps is not for compilers
STEPS = 8


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(methods, "_warned", [])


def both(recipe: str, backend: str) -> list[bool]:
    """Train compiled and not; whether the masks changed at each step, and nothing recompiled."""
    plain = prepared(recipe)
    model, counter = copy.deepcopy(plain), CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizers, seen = {plain: sgd(plain), model: sgd(model)}, []
    for step in range(STEPS):
        x, losses = batch(step), []
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            for run, own in ((plain, plain), (compiled, model)):
                optimizers[own].zero_grad()
                loss = loss_of(run, x)
                loss.backward()
                optimizers[own].step()
                losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        seen.append(torch.cat([m.flatten() for m in state(model)]))
        assert torch.equal(seen[-1], torch.cat([m.flatten() for m in state(plain)]))
    assert counter.frame_count == 1
    assert_agrees(model)
    return [not torch.equal(*pair) for pair in itertools.pairwise(seen)]


def state(model: torch.nn.Module) -> list[torch.Tensor]:
    """Kept masks, or what stands for them."""
    kept = [b for n, b in model.named_buffers() if n.endswith(("nm_mask.mask", "removed"))]
    return kept or list(masks(model).values())


@pytest.mark.parametrize("recipe", quick("sr-ste every 3", "lbc", of=RECIPES))
def test_compiled_once_it_trains_as_uncompiled(recipe):
    changed = both(recipe, "aot_eager")
    assert any(changed) is (recipe != "asp")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_once_by_inductor_it_trains_as_uncompiled(recipe):
    both(recipe, "inductor")


@pytest.mark.parametrize("recipe", quick("sr-ste every 3", of=("sr-ste every 3", "lbc")))
def test_a_compiled_training_goes_on_from_a_checkpoint_without_compiling_again(recipe):
    model, counter = prepared(recipe), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    loss_of(compiled, batch(0)).backward()
    saved = copy.deepcopy(model.state_dict())
    loss_of(compiled, batch(1)).backward()
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(saved)
    loss_of(compiled, batch(1)).backward()
    assert all(torch.equal(after[name], tensor) for name, tensor in model.state_dict().items())
    assert counter.frame_count == 1


def test_a_compiled_model_says_when_its_masks_are_of_another_rank():
    model = prepared("asp")
    model.get_buffer("mask_schedule.step").fill_(3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception) as failure:  # noqa: PT011  # torch.fx reports on it, compiled
        compiled(batch(0))
    causes, error = [], failure.value
    while error is not None:
        causes, error = [*causes, str(error)], error.__context__
    assert "expected masks of the same step on every rank" in causes[-1]


def test_a_scale_that_changes_compiles_nothing_again():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    method = SRSTE(0.5, scaler=scaler)
    plain, counter = prepared(method=method), CompileCounterWithBackend("aot_eager")
    model = copy.deepcopy(plain)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            for run, own in ((plain, plain), (compiled, model)):
                own.zero_grad()
                with torch.autocast("cpu", torch.float16):
                    loss = loss_of(run, batch(0))
                scaler.scale(loss).backward()
            for name, layer in model.named_modules():
                if isinstance(layer, NMLayer):
                    expected = plain.get_submodule(name).weight.grad
                    close = {"rtol": 1e-2, "atol": 1e-2 * float(expected.abs().max())}
                    torch.testing.assert_close(layer.weight.grad, expected, **close)
            scaler.update(2.0 ** (10 - step))
    assert counter.frame_count <= 2  # the scaler makes its scale with the first loss


def test_compiling_for_float16_without_a_scaler_warns():
    compiled = torch.compile(prepared(), backend="eager", fullgraph=True)

    def run():
        with torch.autocast("cpu", torch.float16):
            return [compiled(batch(step)) for step in range(2)]

    with pytest.warns(UserWarning, match="under float16 autocast") as seen:
        run()
    assert len(seen) == 1
