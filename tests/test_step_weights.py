"""Weights in the order that engine.h asks for, number by number, and batch norms as affine maps."""

import torch
from torch import nn

from spre_fx.step_weights import affine_of, dense_conv_weight, depthwise_weight, padded_bias


def test_dense_weights_stand_in_blocks_of_16_outputs() -> None:
    weight = torch.randn(20, 3, 2, 5)
    packed = dense_conv_weight(weight)
    assert packed.shape == (2, 2, 5, 3, 16)
    assert packed.is_contiguous()
    for output in range(20):
        block = packed[output // 16, :, :, :, output % 16]
        assert torch.equal(block, weight[output].permute(1, 2, 0))
    assert not packed[1, ..., 4:].any()


def test_depthwise_weights_stand_tap_by_tap() -> None:
    weight = torch.randn(20, 1, 2, 3)
    packed = depthwise_weight(weight)
    assert packed.shape == (6, 32)
    assert torch.equal(packed[4, :20], weight[:, 0, 1, 1])
    assert not packed[:, 20:].any()


def test_biases_are_padded_and_float32() -> None:
    bias = padded_bias(torch.ones(17).bfloat16())
    assert (bias.dtype, bias.shape, float(bias.sum())) == (torch.float32, (32,), 17)


def test_a_batch_norm_is_a_scale_and_a_bias() -> None:
    for affine in (True, False):
        norm = nn.BatchNorm2d(20, affine=affine).double().eval()
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.3, 3)
        if affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        scale, bias = affine_of(norm)
        assert (scale.dtype, bias.shape) == (torch.float32, (32,))
        x = torch.randn(2, 20, 3, 3).double()
        y = x * scale[:, None, None] + bias[:20, None, None]
        torch.testing.assert_close(y, norm(x).detach(), rtol=1e-5, atol=1e-5)
