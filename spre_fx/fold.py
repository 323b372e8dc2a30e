"""The algebra that turns trained branches into one kernel, in float64.

In evaluation a BN applies a fixed affine map to each output channel, so it folds into the conv
before it:

    gamma * (W x + b - mean) / sqrt(var + eps) + beta  =  W' x + b'
    s  = gamma / sqrt(var + eps)
    W' = s * W            (s scales whole filters: a zero of W stays a zero)
    b' = s * (b - mean) + beta

Branches that read the same input and are added fold into their sum (Eq. 10 of Zhang et al.,
2306.05612v3):

    W* = B * W' + B^S * W^S',    b* = b' + b^S'

B^S is a subset of B, so W* is N:M as the main branch was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_weights

from spre_fx.errors import InvariantError


@dataclass(frozen=True, eq=False)
class BatchNormStatistics:
    """What a BN applies in evaluation.

    Attributes:
        mean: Running mean, `(C_out,)`.
        var: Running variance, `(C_out,)`.
        eps: Added to `var`.
        gamma: Scale, `(C_out,)`; None counts as ones.
        beta: Shift, `(C_out,)`; None counts as zeros.
    """

    mean: Tensor
    var: Tensor
    eps: float
    gamma: Tensor | None
    beta: Tensor | None


@dataclass(frozen=True, eq=False)
class Branch:
    """One conv or linear, with the BN after it where there is one.

    Attributes:
        weight: Masked weight, `(C_out, C_in/groups, *kernel)`.
        bias: `(C_out,)` or None.
        bn: The BN after it, or None.
    """

    weight: Tensor
    bias: Tensor | None
    bn: BatchNormStatistics | None


def fold_batch_norm(branch: Branch) -> tuple[Tensor, Tensor | None]:
    """Fold the BN of a branch into its weight and bias.

    Zeros of the weight come out as exactly +0, whatever the sign a mask left them with, and even if
    a variance of zero makes the scale infinite.

    Returns:
        Weight and bias in float64. The bias is None only without a bias and without a BN.
    """
    weight, bias, bn = _float64(branch.weight), _optional(branch.bias), branch.bn
    if bn is None:
        return weight.masked_fill(weight == 0, 0.0), bias
    folded, shift = fuse_conv_bn_weights(
        weight,
        bias,
        _float64(bn.mean),
        _float64(bn.var),
        bn.eps,
        _optional(bn.gamma),
        _optional(bn.beta),
    )
    return folded.detach().masked_fill(weight == 0, 0.0), shift.detach()


def merge(branches: Sequence[Branch]) -> tuple[Tensor, Tensor | None]:
    """Fold branches that are added into one kernel.

    Eq. 10 of Zhang et al., 2306.05612v3.

    Returns:
        Weight and bias in float64. The bias is None only if no branch has a bias or a BN.

    Raises:
        InvariantError: Unless there is a branch and all weights have the same shape.
    """
    shapes = {tuple(branch.weight.shape) for branch in branches}
    if len(shapes) != 1:
        raise InvariantError(
            f"expected branches with weights of one shape, found shapes {sorted(shapes)}."
        )
    weights, biases = zip(*map(fold_batch_norm, branches), strict=True)
    present = [bias for bias in biases if bias is not None]
    return reduce(torch.add, weights), reduce(torch.add, present) if present else None


def _float64(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64, copy=True)


def _optional(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _float64(tensor)
