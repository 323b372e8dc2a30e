"""Weights of dense layers and batch norms as the steps of the engine read them (`engine.h`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LANES = 16


def dense_conv_weight(weight: Tensor) -> Tensor:
    """`(C_out, C_in, kH, kW)` to `(ceil(C_out / 16), kH, kW, C_in, 16)`, with zeros."""
    weight = F.pad(weight.detach(), (0, 0, 0, 0, 0, 0, 0, -len(weight) % _LANES))
    blocks: Tensor = weight.unflatten(0, (-1, _LANES))
    return blocks.permute(0, 3, 4, 2, 1).contiguous()


def depthwise_weight(weight: Tensor) -> Tensor:
    """`(C, 1, kH, kW)` to `(kH * kW, ceil(C / 16) * 16)`, with zeros."""
    weight = F.pad(weight.detach().flatten(1), (0, 0, 0, -len(weight) % _LANES))
    return weight.t().contiguous()


def padded_bias(bias: Tensor) -> Tensor:
    """`(C,)` to `(ceil(C / 16) * 16,)` in float32, with zeros."""
    return F.pad(bias.detach().float(), (0, -len(bias) % _LANES))


def affine_of(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The scale `(C,)` and bias, padded, of a batch norm with its running statistics, float32."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = (variance.detach().double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    bias = -mean.detach().double() * scale
    if norm.bias is not None:
        bias = bias + norm.bias.detach().double()
    return scale.to(torch.float32), padded_bias(bias)
