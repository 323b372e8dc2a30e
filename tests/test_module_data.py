"""Layers of torch.nn as plain data: built anew they are the same, and what cannot be is refused."""

import json

import pytest
import torch
from layers import LAYERS
from torch import nn

from spre_fx import FileError
from spre_fx.module_data import module_data, new_module

OTHERS = [
    nn.ConvTranspose2d(8, 4, 3, 2, 1, 1),
    nn.BatchNorm2d(4, eps=1e-3, momentum=None),
    nn.BatchNorm2d(4, affine=False),
    nn.BatchNorm1d(4, track_running_stats=False),
    nn.SyncBatchNorm(4),
    nn.InstanceNorm2d(4, affine=True),
    nn.LayerNorm((4, 4), bias=False),
    nn.GroupNorm(2, 4, affine=False),
    nn.RMSNorm(4),
    nn.LocalResponseNorm(3),
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.Hardtanh(0, 6),
    nn.GELU("tanh"),
    nn.PReLU(3),
    nn.LeakyReLU(0.2),
    nn.Softmax(1),
    nn.Threshold(0.1, float("inf")),
    nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    nn.AvgPool2d((2, 3), count_include_pad=False),
    nn.AdaptiveAvgPool2d((1, None)),
    nn.Dropout(0.3),
    nn.Flatten(1),
    nn.Unflatten(1, (2, 3)),
    nn.Identity(),
    nn.ZeroPad2d((1, 2, 3, 4)),
    nn.ConstantPad1d(2, 0.5),
    nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
    nn.PixelShuffle(2),
    nn.ChannelShuffle(2),
    nn.Embedding(5, 3, padding_idx=1),
    nn.MultiheadAttention(8, 2, batch_first=True),
    nn.MultiheadAttention(8, 2, bias=False, add_bias_kv=True, kdim=3, vdim=5),
]


def built(data: object) -> nn.Module:
    return new_module(json.loads(json.dumps(data)))


@pytest.mark.parametrize("layer", [make() for make in LAYERS.values()] + OTHERS, ids=repr)
def test_a_layer_built_anew_is_the_same(layer):
    data = module_data(layer)
    new = built(data)
    assert type(new) is type(layer)
    assert repr(new) == repr(layer)
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (new, layer)]
    assert shapes[0] == shapes[1]
    assert module_data(new) == data
    assert all(tensor.is_meta for tensor in new.state_dict().values())


def test_options_that_change_nothing_are_left_out():
    assert module_data(nn.BatchNorm2d(4, affine=False)) == {
        "type": "BatchNorm2d",
        "options": {"num_features": 4, "affine": False},
    }
    assert module_data(nn.ReLU()) == {"type": "ReLU", "options": {}}


class Odd(nn.Conv2d):
    pass


def with_forward() -> nn.Module:
    layer = nn.Conv2d(8, 8, 3)
    layer.forward = lambda x: x
    return layer


def with_another_weight() -> nn.Module:
    layer = nn.Conv2d(8, 8, 3)
    layer.weight = nn.Parameter(torch.ones(8, 8, 5, 5))
    return layer


def with_another_part() -> nn.Module:
    layer = nn.MultiheadAttention(8, 2)
    layer.out_proj = nn.Linear(8, 8)
    return layer


def with_another_option() -> nn.Module:
    layer = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
    layer._reversed_padding_repeated_twice = [0, 0, 0, 0]
    return layer


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Odd(8, 8, 3), r"a test_module_data\.Odd"),
        (lambda: nn.LSTM(3, 4), r"a torch\.nn\.modules\.rnn\.LSTM"),
        (nn.Sequential, r"a torch\.nn\.modules\.container\.Sequential"),
        (with_forward, r"a Conv2d whose forward does not follow from its options"),
        (with_another_weight, r"a Conv2d whose set of tensors does not follow"),
        (with_another_part, r"a MultiheadAttention whose set of modules inside does not follow"),
        (with_another_option, r"a Conv2d whose _reversed_padding_repeated_twice does not follow"),
    ],
)
def test_what_options_do_not_tell_is_refused(make, words):
    with pytest.raises(FileError, match=words):
        module_data(make())


def test_what_may_not_be_built():
    with pytest.raises(FileError, match=r"a layer 'Sequential', which is not known"):
        new_module({"type": "Sequential", "options": {}})
    with pytest.raises(
        FileError, match=r"Linear with unknown options \['device', 'depth'\]|\['dep"
    ):
        new_module({"type": "Linear", "options": {"depth": 3, "device": "cpu"}})


def test_a_huge_layer_takes_no_memory():
    options = {"in_features": 10**9, "out_features": 10**9}
    assert new_module({"type": "Linear", "options": options}).weight.is_meta
