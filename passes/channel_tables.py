"""Operations that leave the channels of a value where they are, by kind."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.PReLU, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
BINARY = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.isub),
    *(operator.imul, operator.itruediv, torch.add, torch.sub, torch.mul, torch.div),
    *(torch.maximum, torch.minimum),
    *("add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_"),
}
_ACTIVATIONS = (
    *("relu", "relu6", "sigmoid", "tanh", "silu", "gelu", "elu", "selu", "celu", "leaky_relu"),
    *("hardswish", "hardsigmoid", "hardtanh", "mish", "softplus", "logsigmoid", "rrelu"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"),
)
_SIMPLE = (
    "abs",
    "neg",
    "exp",
    "sqrt",
    "square",
    "clamp",
    "pow",
    "relu",
    "relu_",
    "sigmoid",
    "tanh",
)
ELEMENTWISE: set[Any] = {
    *(getattr(F, name) for name in _ACTIVATIONS),
    *(getattr(torch, name) for name in _SIMPLE),
    *(f"{name}{ending}" for name in _SIMPLE for ending in ("", "_")),
    *("contiguous", "clone", "detach", "float", "double", "half", "bfloat16", "to"),
    *(operator.pow, operator.neg),
}
_POOLS = [
    (f"{kind}_pool{rank}d", rank)
    for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp")
    for rank in (1, 2, 3)
]
# With the number of axes behind the channels that each works on, None for any.
SPATIAL: dict[Any, int | None] = {
    **{getattr(F, name): rank for name, rank in _POOLS},
    **{getattr(torch, name): rank for name, rank in _POOLS if hasattr(torch, name)},
    F.interpolate: None,
}
ELEMENTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Tanh, nn.SiLU, nn.GELU, nn.ELU, nn.SELU, nn.CELU),
    *(nn.LeakyReLU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Mish, nn.Softplus, nn.Identity),
    *(nn.LogSigmoid, nn.RReLU, nn.Softsign, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)
SPATIAL_MODULES = (
    *(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd),
    *(nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd),
    *(nn.modules.pooling._LPPoolNd, nn.Upsample, nn.modules.padding._ConstantPadNd),
    *(nn.modules.padding._ReflectionPadNd, nn.modules.padding._ReplicationPadNd),
)
