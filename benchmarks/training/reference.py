"""SR-STE + SpRe as the paper writes it down, in operations of torch.

Algorithm 1 of Zhang et al., 2306.05612v3, taken word by word: a sort of each group for the N:M
mask, a sort of the layer for the unstructured threshold, two dense convs and two batch norms. It is
what one would write without this library, and it computes the same.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from spre_fx import Pattern

DECAY = 2e-4


class NMMask(nn.Module):
    """Line 3: the N largest magnitudes of every M consecutive input channels (Eq. 3)."""

    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        self.pattern = pattern

    def forward(self, weight: Tensor) -> Tensor:
        """B, a bool tensor `(C_out, C_in/groups, *kernel)` as the weight."""
        n, m = self.pattern.n, self.pattern.m
        channels = weight.shape[1]
        magnitude = F.pad(weight.detach().abs().movedim(1, -1), (0, -channels % m))
        order = magnitude.reshape(-1, m).argsort(dim=1, descending=True, stable=True)
        mask = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :n], True)
        return mask.view(magnitude.shape)[..., :channels].movedim(-1, 1)


class LiveTaps(nn.Module):
    """The taps where the unstructured mask is denser than N/M (Eq. 4, condition of Eq. 8)."""

    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        self.pattern = pattern

    def forward(self, weight: Tensor) -> Tensor:
        """A bool tensor of the shape of the kernel."""
        n, m = self.pattern.n, self.pattern.m
        magnitude = weight.detach().abs()
        descending = torch.sort(magnitude.flatten(), descending=True).values
        threshold = descending[math.ceil(weight.numel() * n / m) - 1]
        kept = (magnitude >= threshold).sum((0, 1))
        live: Tensor = kept * m > n * weight.shape[0] * weight.shape[1]
        return live


class SRSTEWeight(torch.autograd.Function):
    """B * W; backward g + decay * (1 - B) * W (Zhou et al., 2021)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        """B * W."""
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of W."""
        weight, mask = ctx.saved_tensors
        return gradients[0] + DECAY * ~mask * weight, None


class SparseLayer(nn.Module):
    """A conv or linear with N:M weights."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, pattern: Pattern) -> None:
        super().__init__()
        self.layer = layer
        self.nm_mask = NMMask(pattern)

    def forward(self, x: Tensor) -> Tensor:
        """layer(x; B * W)."""
        weight = self.layer.weight
        return run(self.layer, x, SRSTEWeight.apply(weight, self.nm_mask(weight)))


class TwoBranches(nn.Module):
    """A conv and its batch norm, and the SpRe branch beside them (Eq. 9)."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, pattern: Pattern) -> None:
        super().__init__()
        self.conv, self.bn = conv, bn
        self.conv_spre, self.bn_spre = copy.deepcopy(conv), copy.deepcopy(bn)
        self.conv_spre.reset_parameters()
        self.bn_spre.reset_parameters()
        self.nm_mask = NMMask(pattern)
        self.live_taps = LiveTaps(pattern)

    def forward(self, x: Tensor) -> Tensor:
        """bn(conv(x; B * W)) + bn_spre(conv(x; B^S * W^S))."""
        weight = self.conv.weight
        mask = self.nm_mask(weight)  # Algorithm 1, line 3
        mask_spre = mask * self.live_taps(weight)  # line 4, Eq. 8
        main: Tensor = self.bn(run(self.conv, x, SRSTEWeight.apply(weight, mask)))
        spre: Tensor = self.bn_spre(run(self.conv_spre, x, self.conv_spre.weight * mask_spre))
        return main + spre


def run(layer: nn.Conv2d | nn.Linear, x: Tensor, weight: Tensor) -> Tensor:
    """A layer with another weight in the place of its own."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    y: Tensor = layer._conv_forward(x, weight, layer.bias)
    return y


def algorithm_1(model: nn.Module, pattern: Pattern) -> nn.Module:
    """A copy of a model with two branches for convs of more than one tap, one for other layers.

    Layers with fewer input channels than M stay as they are. The model has to be one that
    `torch.fx` can trace.
    """
    model = copy.deepcopy(model)
    bn_of = _batch_norms(model)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Conv2d | nn.Linear) or layer.weight.shape[1] < pattern.m:
            continue
        bn = model.get_submodule(bn_of[name]) if name in bn_of else None
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1) and bn is not None:
            assert isinstance(bn, nn.BatchNorm2d)
            model.set_submodule(name, TwoBranches(layer, bn, pattern))
            model.set_submodule(bn_of[name], nn.Identity())
        else:
            model.set_submodule(name, SparseLayer(layer, pattern))
    return model


def _batch_norms(model: nn.Module) -> dict[str, str]:
    """Conv -> the batch norm that alone reads its output."""
    modules = dict(model.named_modules())
    found = {}
    for node in fx.symbolic_trace(model).graph.nodes:
        if isinstance(modules.get(str(node.target)), nn.BatchNorm2d):
            (before,) = node.all_input_nodes
            if isinstance(modules.get(str(before.target)), nn.Conv2d) and len(before.users) == 1:
                found[str(before.target)] = str(node.target)
    return found
