"""The proof that a folded layer is what its branches were, run by `finalize` at every site."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from spre_fx import masks
from spre_fx.errors import VerificationError
from spre_fx.modules import Layer
from spre_fx.patterns import Pattern

_RANKS = {nn.BatchNorm1d: 3, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class BranchModules:
    """One branch of a site as it stands in the training graph.

    Attributes:
        layer: An ordinary conv or linear holding the masked weight.
        bn: Its batch norm, if it has one.
    """

    layer: Layer
    bn: nn.Module | None

    def evaluate(self, x: Tensor) -> Tensor:
        """The branch's output in evaluation, in float64."""
        y: Tensor = _on_cpu(self.layer, torch.float64)(x)
        if self.bn is None:
            return y
        bn: Any = _on_cpu(self.bn, torch.float64)
        rank = next((rank for kind, rank in _RANKS.items() if isinstance(bn, kind)), y.dim())
        if rank != y.dim():  # views between the two: the axes behind the channels may be any
            ones = [1] * (rank - 3)
            flat: Tensor = bn(y.reshape(*y.shape[:2], -1, *ones))
            return flat.reshape(y.shape)
        output: Tensor = bn(y)
        return output


def _on_cpu(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in evaluation mode, on the CPU, where no reduced precision is in force.

    A module without children shares with its copy what is no tensor: a deep copy of all that
    would take most of the time of `finalize`.
    """
    if module._modules:
        return copy.deepcopy(module).to("cpu", dtype).eval()
    new = copy.copy(module)
    for tensors in ("_parameters", "_buffers"):
        held = getattr(module, tensors)
        new.__dict__[tensors] = {name: _converted(value, dtype) for name, value in held.items()}
    new.training = False
    return new


def _converted(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.detach().to("cpu", dtype)


def check_pattern(name: str, layer: Layer, pattern: Pattern) -> None:
    """Refuse a layer whose weight breaks its N:M pattern.

    Raises:
        VerificationError: Naming the layer and the pattern.
    """
    if not masks.obeys(layer.weight.detach(), pattern):
        members = "weights of the order (C_out, *kernel)" if pattern.flat else "input channels"
        raise VerificationError(
            f"{name}: expected at most {pattern.n} non-zeros in every {pattern.m} consecutive "
            f"{members} after folding, found a group with more. No model was made."
        )


@torch.no_grad()
def check_agreement(
    name: str, branches: Sequence[BranchModules], exact: Layer, folded: Layer
) -> None:
    """Refuse a folded layer that computes something else than its branches.

    All run on random input that covers the kernel. In float64 the largest difference may be 1e-10
    of the largest output; in the layer's own type, once rounded to it, 1e-5 for float32 and eight
    units of precision for anything shorter.

    Args:
        name: The site, for the message.
        branches: The branches as they were in training.
        exact: The folded layer with float64 weights.
        folded: The same rounded to the type of the model.

    Raises:
        VerificationError: Naming the site, the type and the difference.
    """
    x = _probe(exact)
    expected = reduce(torch.add, [branch.evaluate(x) for branch in branches])
    largest = max(expected.abs().max().item(), torch.finfo(torch.float64).tiny)
    for layer in (exact, folded):
        dtype = layer.weight.dtype
        tolerance = _TOLERANCE.get(dtype, 8 * torch.finfo(dtype).eps)
        output = _on_cpu(layer, dtype)(x.to(dtype)).double()
        difference = (output - expected).abs().max().item() / largest
        if not difference <= tolerance:
            raise VerificationError(
                f"{name}: expected folded and two-branch outputs to agree in {dtype} to "
                f"{tolerance:.0e} of the largest output, found {difference:.1e}. No model was "
                "made. Check this site's batch norms for running variances that are zero or huge."
            )


def _probe(layer: Layer) -> Tensor:
    """Standard normal input, two images, just large enough for two outputs along each axis."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Linear):
        shape = [layer.in_features]
    else:
        reach = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
        sizes = [dilation * (kernel - 1) + 1 + stride for kernel, dilation, stride in reach]
        padding = layer._reversed_padding_repeated_twice
        shape = [layer.in_channels, *(max(size, *padding) + 1 for size in sizes)]
    # Values exact in every float type, so that rounding the input does not count as a difference.
    return torch.randn(2, *shape, generator=generator).bfloat16().double()
