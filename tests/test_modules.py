"""The modules of a training graph: what they compute, and how they are made of plain layers."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from layers import LAYERS, Make, every_conv, every_layer, inputs
from torch import nn

from spre_fx.masks import live_taps, nm_mask
from spre_fx.methods import ASP, SRSTE
from spre_fx.modules import (
    MaskSchedule,
    TrainingFlag,
    TrainingSwitch,
    emit_masks,
    make_nm,
    new_plain,
    new_spre_conv,
)
from spre_fx.patterns import Pattern
from spre_fx.schedules import EveryK

PATTERN = Pattern(1, 4)


def configuration(layer: nn.Module) -> dict[str, object]:
    """All that a conv or linear is told when it is made, but for its tensors."""
    options = {name: getattr(layer, name) for name in layer.__constants__}
    assert len(options) in (2, 9)
    return options | {"bias": layer.bias is not None}


@every_layer
@pytest.mark.parametrize("keep", [False, True])
def test_an_nm_layer_computes_what_the_layer_does_with_masked_weights(
    make: Make, keep: bool
) -> None:
    dense = make(dtype=torch.float64)
    layer = make_nm(copy.deepcopy(dense), PATTERN, SRSTE(), keep_masks=keep)
    with torch.no_grad():
        dense.weight.mul_(nm_mask(dense.weight, PATTERN))
    assert dense.weight.eq(0).double().mean() == 0.75
    x = inputs(dense)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-12, atol=1e-12)


@every_layer
@pytest.mark.parametrize("keep", [False, True])
def test_make_nm_keeps_the_very_module_and_all_that_hangs_on_it(make: Make, keep: bool) -> None:
    layer, calls = make(), []
    layer.register_forward_hook(lambda *_: calls.append("hook"))
    layer.weight.register_hook(lambda gradient: calls.append("gradient hook"))
    layer.requires_grad_(False).weight.requires_grad_()
    layer.eval().note = "mine"
    before, state = dict(layer.named_parameters()), layer.state_dict()
    result = make_nm(layer, PATTERN, ASP(), keep_masks=keep)
    assert result is layer
    assert type(layer).__name__ == "NM" + type(make()).__name__
    assert isinstance(layer, type(make()))
    assert {k: id(p) for k, p in layer.named_parameters()} == {k: id(p) for k, p in before.items()}
    assert [p.requires_grad for p in layer.parameters()] == [True, False][: len(before)]
    assert layer.state_dict().keys() - state.keys() == ({"nm_mask.mask"} if keep else set())
    assert (layer.note, layer.training, layer.nm_mask.training) == ("mine", False, False)
    layer(inputs(layer)).sum().backward()
    assert calls == ["hook", "gradient hook"]
    assert f"pattern=1:4, method={ASP()}" in repr(layer)
    layer.load_state_dict(state, strict=not keep)


@every_conv
def test_emit_masks_returns_output_mask_and_live_taps(make: Make) -> None:
    layer: Any = make_nm(make(dtype=torch.float64), PATTERN, SRSTE(), keep_masks=False)
    x = inputs(layer)
    plain = layer(x)
    emit_masks(layer)
    y, mask, taps = layer(x)
    assert torch.equal(y, plain)
    assert torch.equal(mask, nm_mask(layer.weight.detach(), PATTERN))
    assert torch.equal(taps, live_taps(layer.weight.detach(), PATTERN))
    assert taps.shape == layer.kernel_size


@every_conv
def test_a_spre_conv_is_dense_without_a_mask_and_masked_with_one(make: Make) -> None:
    dense = make(dtype=torch.float64)
    spre = new_spre_conv(dense)
    x = inputs(dense)
    dense.load_state_dict(spre.state_dict())
    assert torch.equal(spre(x), dense(x))
    mask = torch.rand_like(dense.weight) < 0.5
    with torch.no_grad():
        dense.weight.mul_(mask)
    torch.testing.assert_close(spre(x, mask), dense(x), rtol=1e-12, atol=1e-12)


@every_conv
def test_spre_weights_take_the_ordinary_gradient_inside_the_mask_and_none_outside(
    make: Make,
) -> None:
    dense = make(dtype=torch.float64)
    spre = new_spre_conv(dense)
    mask = torch.rand_like(dense.weight) < 0.5
    dense.load_state_dict(spre.state_dict())
    with torch.no_grad():
        dense.weight.mul_(mask)
    x = inputs(dense)
    spre(x, mask).square().sum().backward()
    dense(x).square().sum().backward()
    torch.testing.assert_close(spre.weight.grad, dense.weight.grad * mask, rtol=1e-12, atol=1e-12)
    assert spre.weight.grad[mask].ne(0).any()


def test_a_spre_branch_without_live_taps_is_its_bias() -> None:
    spre = new_spre_conv(nn.Conv2d(8, 6, 3))
    y = spre(torch.randn(2, 8, 5, 5), torch.zeros(6, 8, 3, 3, dtype=torch.bool))
    assert torch.equal(y, spre.bias.view(-1, 1, 1).expand_as(y))


@every_conv
def test_a_new_spre_conv_is_configured_as_the_conv(make: Make) -> None:
    conv = make(dtype=torch.float16)
    spre = new_spre_conv(conv)
    assert type(spre).__name__ == "SpRe" + type(conv).__name__
    assert configuration(spre) == configuration(conv)
    assert {p.dtype for p in spre.parameters()} == {torch.float16}
    assert new_spre_conv(make(device="meta")).weight.device.type == "meta"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
def test_a_new_spre_conv_follows_mode_and_requires_grad(training: bool, trainable: bool) -> None:
    conv = nn.Conv2d(8, 6, 3).train(training)
    conv.weight.requires_grad_(trainable)
    spre = new_spre_conv(conv)
    assert spre.training is training
    assert [p.requires_grad for p in spre.parameters()] == [trainable] * 2


def test_a_new_spre_conv_has_weights_of_its_own_and_none_of_the_hooks() -> None:
    conv = nn.Conv2d(8, 6, 3)
    conv.register_forward_hook(lambda *_: pytest.fail("the hook of the main conv ran"))
    torch.manual_seed(3)
    spre = new_spre_conv(conv)
    torch.manual_seed(3)
    fresh = nn.Conv2d(8, 6, 3)  # the initialiser of the class itself
    assert torch.equal(spre.weight, fresh.weight)
    assert torch.equal(spre.bias, fresh.bias)
    assert not torch.equal(spre.weight, conv.weight)
    assert spre.weight.abs().max() <= 1 / math.sqrt(8 * 9)
    spre(torch.randn(1, 8, 3, 3))


@every_layer
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("flag", [False, True])
def test_a_new_plain_layer_is_configured_as_the_layer(make: Make, masked: bool, flag: bool) -> None:
    dense = make(dtype=torch.bfloat16).train(flag)
    dense.weight.requires_grad_(flag)
    expected, kind = configuration(dense), type(dense)
    layer = make_nm(dense, PATTERN, ASP(), keep_masks=flag) if masked else dense
    weight = torch.randn(dense.weight.shape, dtype=torch.float64)
    bias = torch.randn(len(weight), dtype=torch.float64)
    plain = new_plain(layer, weight, bias)
    assert type(plain) is kind
    assert plain.training is flag
    assert configuration(plain) == expected | {"bias": True}
    assert plain.state_dict().keys() == {"weight", "bias"}
    assert torch.equal(plain.weight, weight)
    assert torch.equal(plain.bias, bias)
    assert [p.requires_grad for p in plain.parameters()] == [flag] * 2
    without = new_plain(layer, weight, None)
    assert without.bias is None
    x, at = inputs(plain), (-1, *[1] * (weight.dim() - 2))
    torch.testing.assert_close(plain(x), without(x) + bias.view(at), rtol=1e-12, atol=1e-12)


@every_conv
def test_a_new_plain_layer_is_made_of_a_spre_conv_too(make: Make) -> None:
    spre = new_spre_conv(make(dtype=torch.float64))
    plain = new_plain(spre, spre.weight.detach(), spre.bias)
    assert type(plain) is type(make())
    assert configuration(plain) == configuration(spre)
    x = inputs(spre)
    assert torch.equal(plain(x), spre(x))


@every_layer
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_nm_layers_survive_copying_and_pickling(make: Make, keep: bool, clone: Any) -> None:
    layer: Any = make_nm(make(dtype=torch.float64), PATTERN, SRSTE(0.1), keep_masks=keep)
    if not isinstance(layer, nn.Linear) and layer.kernel_size != (1, 1):
        emit_masks(layer)
    layer.weight.data.copy_(torch.randn_like(layer.weight))  # a kept mask is not theirs
    twin, x = clone(layer), inputs(layer)
    torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)
    assert (type(twin), twin.pattern, twin.method) == (type(layer), PATTERN, SRSTE(0.1))
    assert twin.weight is not layer.weight
    assert twin.state_dict().keys() == layer.state_dict().keys()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_the_other_modules_survive_copying_and_pickling(clone: Any) -> None:
    schedule = MaskSchedule(EveryK(2), ASP())
    schedule()
    twin = clone(schedule)
    assert [twin().item() for _ in range(3)] == [False, True, False]
    assert schedule.step.item() == 1
    spre, x = new_spre_conv(LAYERS["2d reflect"]()), torch.randn(2, 8, 5, 5)
    assert torch.equal(clone(spre)(x), spre(x))
    assert clone(TrainingFlag().eval())() is False
    assert clone(TrainingSwitch().eval())(1, 2) == 2


def test_the_training_flag_and_switch_follow_the_mode() -> None:
    flag, switch = TrainingFlag(), TrainingSwitch()
    assert (flag.train()(), flag.eval()()) == (True, False)
    assert (switch.train()("aux", "out"), switch.eval()("aux", "out")) == ("aux", "out")
    assert not flag.state_dict()
    assert not switch.state_dict()
