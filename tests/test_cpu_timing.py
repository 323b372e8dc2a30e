"""Calls to be timed run what a planned graph runs, into memory of their own."""

import gc

import pytest
import torch
from torch import nn

from spre_fx import cpu_timing, engine
from spre_fx.engine import Kind
from spre_fx.packed_layers import PackedConv2d, PackedLinear

pytestmark = pytest.mark.skipif(engine.load() is None, reason="needs the engine")

CONV = nn.Conv2d(16, 24, 3, stride=2, padding=1)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (CONV, (2, 16, 9, 7)),
        (nn.Conv2d(16, 16, 3, groups=16, bias=False), (2, 16, 9, 7)),
        (PackedConv2d.from_dense(CONV, planar=True), (2, 16, 9, 7)),
        (PackedConv2d.from_dense(nn.Conv2d(16, 24, 3), winograd=2), (2, 16, 9, 7)),
        (PackedLinear.from_dense(nn.Linear(16, 24)), (3, 2, 16)),
    ],
    ids=str,
)
def test_a_call_computes_the_layer(layer, shape, monkeypatch):
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(empty(*a, **k)) or made[-1])
    x = torch.randn(shape)
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    call = cpu_timing.planned_call(layer, x)
    (y,) = (each for each in made if each.dtype == torch.float32)
    monkeypatch.undo()
    y.zero_()
    gc.collect()  # what the engine reads is the call's own
    assert call is not None
    call()
    expected = layer(x).detach()
    if x.ndim == 4:
        y = y.permute(0, 3, 1, 2)
    torch.testing.assert_close(y.reshape(expected.shape), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 16, 3, groups=4),
        nn.Conv2d(16, 16, 3, dilation=2),
        nn.Conv2d(16, 8, 3).double(),
    ],
    ids=str,
)
def test_a_layer_without_a_step_has_no_such_call(layer):
    assert cpu_timing.planned_call(layer, torch.randn(2, 16, 9, 7)) is None
    assert cpu_timing.planned_call(nn.Linear(16, 8), torch.randn(2, 16)) is None


def test_a_linear_layer_of_images_has_no_such_call():
    layer = PackedLinear.from_dense(nn.Linear(16, 8))
    assert cpu_timing.planned_call(layer, torch.randn(2, 5, 3, 16)) is None
    assert cpu_timing.planned_call(layer, torch.randn(2, 3, 16)) is not None


def test_an_engine_without_a_kernel_has_no_such_call(monkeypatch):
    monkeypatch.setattr(engine.Engine, "takes", lambda _, step: step.kind != Kind.WINOGRAD_CONV)
    x = torch.randn(1, 16, 5, 5)
    layer = PackedConv2d.from_dense(nn.Conv2d(16, 8, 3), winograd=4)
    assert cpu_timing.planned_call(layer, x) is None
