"""Masks over the steps of a training: when they change, what is counted, what is kept."""

import copy
import itertools
from typing import Any

import pytest
import torch
from layers import CONVS, LAYERS, inputs
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from spre_fx.masks import live_taps, nm_mask
from spre_fx.methods import ASP, SRSTE, MaskMethod
from spre_fx.modules import MaskSchedule, emit_masks, make_nm, new_spre_conv
from spre_fx.patterns import Pattern
from spre_fx.schedules import EveryK, EveryStep, Freeze, Schedule

PATTERN = Pattern(1, 4)
YES, NO = torch.tensor(True), torch.tensor(False)


def conv(keep: bool) -> Any:
    """An N:M conv in float64 that emits its masks."""
    layer: Any = make_nm(CONVS["2d"](dtype=torch.float64), PATTERN, SRSTE(), keep_masks=keep)
    emit_masks(layer)
    return layer


def shake(*layers: Any) -> None:
    """New weights behind autograd's back, the same for all `layers`, so that other masks follow."""
    new = torch.randn_like(layers[0].weight)
    for layer in layers:
        layer.weight.data.copy_(new)


def expected_masks(layer: Any) -> tuple[Tensor, Tensor]:
    """B and the live taps of the weights of this moment."""
    return nm_mask(layer.weight.detach(), PATTERN), live_taps(layer.weight.detach(), PATTERN)


class Stage(nn.Module):
    """A SpRe site without batch norms, as `prepare` wires it."""

    def __init__(self, schedule: Schedule, method: MaskMethod) -> None:
        super().__init__()
        dense = CONVS["2d"](dtype=torch.float64)
        self.schedule, self.spre = MaskSchedule(schedule, SRSTE()), new_spre_conv(dense)
        self.conv: Any = make_nm(dense, PATTERN, method, keep_masks=schedule.keeps_masks)
        emit_masks(self.conv)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, mask, taps = self.conv(x, self.schedule())
        return y + self.spre(x, mask * taps), mask * taps


@pytest.mark.parametrize("training", [True, False])
def test_masks_of_every_step_have_no_state_and_follow_the_weights(training: bool) -> None:
    layer = conv(keep=False).train(training)
    assert layer.state_dict().keys() == {"weight", "bias"}
    for _ in range(3):
        shake(layer)
        for update in (None, NO, YES):
            _, *found = layer(inputs(layer), update)
            assert all(map(torch.equal, found, expected_masks(layer)))


def test_kept_masks_change_in_training_at_update_steps_and_nowhere_else() -> None:
    layer = conv(keep=True)
    assert layer.state_dict().keys() == {"weight", "bias", "nm_mask.mask", "live_taps.mask"}
    old = expected_masks(layer)
    shake(layer)
    new = expected_masks(layer)
    assert not any(map(torch.equal, old, new))
    for training, update in [(True, None), (True, NO), (False, None), (False, NO), (False, YES)]:
        _, *found = layer.train(training)(inputs(layer), update)
        assert all(map(torch.equal, found, old)), (training, update)
    assert all(map(torch.equal, (layer.nm_mask.mask, layer.live_taps.mask), old))
    _, *found = layer.train()(inputs(layer), YES)
    assert all(map(torch.equal, found, new))
    assert all(map(torch.equal, (layer.nm_mask.mask, layer.live_taps.mask), new))


def test_kept_masks_survive_between_two_forwards_and_their_backward() -> None:
    linear = LAYERS["linear no bias"](dtype=torch.float64)
    layer = make_nm(linear, PATTERN, ASP(), keep_masks=True)
    x = torch.randn(4, 8, dtype=torch.float64)
    masks, outputs = [], []
    for _ in range(2):
        shake(layer)
        masks.append(nm_mask(layer.weight.detach(), PATTERN).double())
        outputs.append(layer(x, YES))
    torch.stack(outputs).sum().backward()  # no error of a version counter
    torch.testing.assert_close(
        layer.weight.grad, x.sum(0) * (masks[0] + masks[1]), rtol=1e-12, atol=0
    )


def test_kept_masks_and_steps_stay_what_they_are_when_the_model_changes_type() -> None:
    stage = Stage(EveryK(2), SRSTE()).half()
    dtypes = {name: tensor.dtype for name, tensor in stage.state_dict().items()}
    assert dtypes["conv.nm_mask.mask"] is dtypes["conv.live_taps.mask"] is torch.bool
    assert dtypes["schedule.step"] is torch.int64


@pytest.mark.parametrize("schedule", [EveryStep(), EveryK(3), Freeze(2), Freeze(0)], ids=repr)
def test_the_schedule_counts_training_forwards_only(schedule: Schedule) -> None:
    module, answers = MaskSchedule(schedule, SRSTE()), []
    for _ in range(7):
        assert not module.eval()()
        answers.append(module.train()())
    with torch.no_grad():
        module()
    updates = [schedule.is_update(torch.tensor(i)).item() for i in range(7)]
    assert [a.item() for a in answers] == [True, *updates[1:]]  # the first one always
    assert module.step.item() == module.own_step.item() == 8
    assert list(module.state_dict()) == ["step", "own_step"]
    assert module.extra_repr() == repr(schedule)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_no_step_twice_and_sees_the_same_masks(reentrant: bool) -> None:
    plain = Stage(EveryK(2), SRSTE(0.1))
    stage, seen = copy.deepcopy(plain), []
    stage.conv.nm_mask.register_forward_hook(lambda module, inputs, mask: seen.append(mask))
    for step in range(4):
        shake(plain.conv, stage.conv)
        x, gradients, seen[:] = inputs(plain.conv).requires_grad_(), [], []
        for run in (plain, lambda x: checkpoint(stage, x, use_reentrant=reentrant)):
            run(x)[0].square().sum().backward()
            gradients.append(x.grad)
            x.grad = None
        assert len(seen) == 2
        assert torch.equal(*seen)
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(stage.conv.weight.grad, plain.conv.weight.grad)
        assert stage.schedule.step == plain.schedule.step == step + 1


def test_a_run_goes_on_from_its_state_dict() -> None:
    stage, x = Stage(EveryK(3), ASP()), torch.randn(2, 8, 9, 9, dtype=torch.float64)
    for _ in range(2):
        stage(x)
        shake(stage.conv)
    other = Stage(EveryK(3), ASP())
    other.load_state_dict(stage.state_dict())
    for _ in range(3):
        shake(stage.conv, other.conv)
        assert all(map(torch.equal, stage(x), other(x)))


@pytest.mark.parametrize("schedule", [EveryStep(), EveryK(2), Freeze(0)], ids=repr)
def test_compiled_once_a_site_computes_what_it_does_uncompiled(schedule: Schedule) -> None:
    torch._dynamo.reset()
    plain = Stage(schedule, SRSTE(0.1))
    stage, counter = copy.deepcopy(plain), CompileCounterWithBackend("aot_eager")
    compiled, masks = torch.compile(stage, backend=counter, fullgraph=True), []
    for _ in range(5):
        shake(plain.conv, stage.conv)
        x = inputs(plain.conv)
        (expected, mask), (found, compiled_mask) = plain(x), compiled(x)
        expected.square().sum().backward()
        found.square().sum().backward()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(compiled_mask, mask)
        torch.testing.assert_close(stage.conv.weight.grad, plain.conv.weight.grad)
        torch.testing.assert_close(stage.spre.weight.grad, plain.spre.weight.grad)
        masks.append(mask)
    assert counter.frame_count == 1
    assert stage.schedule.step.item() == 5
    changes = [not torch.equal(*pair) for pair in itertools.pairwise(masks)]
    assert changes == [schedule.is_update(torch.tensor(i)).item() for i in range(1, 5)]


@pytest.mark.parametrize("update", [False, True])
def test_updates_change_the_mask_and_return_another_tensor(update: bool) -> None:
    operator = torch.ops.spre_fx.update_mask.default
    mask, new = torch.rand(2, 4, 6, 3, 3) < 0.5
    torch.library.opcheck(operator, (mask, new, torch.tensor(update)))
    before, version = mask.clone(), mask._version
    found = operator(mask, new, torch.tensor(update))
    assert torch.equal(mask, new if update else before)
    assert torch.equal(found, mask)
    assert found.data_ptr() != mask.data_ptr()
    assert mask._version > version
