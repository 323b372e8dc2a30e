"""The networks that are measured, and what goes into them: seeded, and alive in every layer."""

from __future__ import annotations

import copy

import torch
import torchvision
from torch import Tensor, nn

import spre_fx

MODELS = ("resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "densenet121")
PATTERNS = ("2:4", "1:4", "1:8", "1:16")
_DISTINCT = 3  # images, repeated: the outputs of any batch are known from those of three


def prepared(model: str, pattern: str) -> nn.Module:
    """A network of torchvision made ready for N:M training, which stands for a trained one.

    Batch norms have random parameters, and statistics between random ones and those of the
    network's own activations: with random ones alone the signal of a deep network at 1:16 dies out,
    and the output would say nothing about its convs.
    """
    torch.manual_seed(0)
    network = torchvision.models.get_model(model, weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            _randomise(module)
    result = spre_fx.prepare(network, pattern, branch=None).train()
    with torch.no_grad():
        result(torch.randn(4, 3, 64, 64))
    return result.eval()


def _randomise(norm: nn.BatchNorm2d) -> None:
    norm.momentum = 0.9
    for tensor in (norm.weight, norm.running_var):
        assert tensor is not None
        nn.init.uniform_(tensor, 0.5, 1.5)
    for tensor in (norm.bias, norm.running_mean):
        assert tensor is not None
        nn.init.normal_(tensor, std=0.1)


def images(batch: int, pixels: int) -> Tensor:
    """Input of shape (batch, 3, pixels, pixels), channels_last, of which no more than 3 differ."""
    torch.manual_seed(1)
    distinct = torch.randn(_DISTINCT, 3, pixels, pixels)
    repeated = distinct[torch.arange(batch) % _DISTINCT]
    return repeated.contiguous(memory_format=torch.channels_last)


def expected(dense: nn.Module, x: Tensor) -> Tensor:
    """The output in float64, computed once for each image that differs."""
    double = copy.deepcopy(dense).double()
    with torch.inference_mode():
        distinct = double(x[:_DISTINCT].double())
    return distinct[torch.arange(len(x)) % _DISTINCT]
