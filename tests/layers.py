"""Convs and linears of every configuration, for the tests of what is made of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Make = Callable[..., Any]

LAYERS: dict[str, Make] = {
    "1d": lambda **k: nn.Conv1d(8, 6, 3, **k),
    "1d circular": lambda **k: nn.Conv1d(8, 6, 3, 2, 1, padding_mode="circular", **k),
    "2d": lambda **k: nn.Conv2d(8, 6, 3, **k),
    "2d 1x1": lambda **k: nn.Conv2d(8, 6, 1, 2, bias=False, **k),
    "2d stride": lambda **k: nn.Conv2d(8, 6, 3, (2, 1), (1, 0), bias=False, **k),
    "2d dilated same": lambda **k: nn.Conv2d(8, 6, 3, padding="same", dilation=2, **k),
    "2d valid": lambda **k: nn.Conv2d(8, 6, 3, padding="valid", **k),
    "2d groups": lambda **k: nn.Conv2d(16, 6, 3, padding=1, groups=2, **k),
    "2d reflect": lambda **k: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect", **k),
    "2d replicate": lambda **k: nn.Conv2d(8, 6, (3, 5), 1, (1, 2), padding_mode="replicate", **k),
    "2d 1x7": lambda **k: nn.Conv2d(8, 6, (1, 7), padding="same", padding_mode="circular", **k),
    "3d": lambda **k: nn.Conv3d(8, 6, (3, 1, 2), (1, 2, 1), (1, 0, 1), **k),
    "linear": lambda **k: nn.Linear(8, 6, **k),
    "linear no bias": lambda **k: nn.Linear(8, 6, bias=False, **k),
}
CONVS = {name: make for name, make in LAYERS.items() if "linear" not in name}

every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
every_conv = pytest.mark.parametrize("make", CONVS.values(), ids=CONVS)


def inputs(layer: Any) -> Tensor:
    """Two random inputs, 9 wide along each axis, of the type of the layer."""
    shape = [layer.in_features] if isinstance(layer, nn.Linear) else [layer.in_channels]
    return torch.randn(2, *shape, *[9] * (layer.weight.dim() - 2), dtype=layer.weight.dtype)
