"""Batch norms: which kinds are known, their statistics, and the one a SpRe branch gets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spre_fx.fold import BatchNormStatistics, Branch, fold_batch_norm
from spre_fx.subclasses import plain_base

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether `module` computes a batch norm and nothing else.

    A subclass that overrides no forward does.
    """
    return plain_base(module, _KINDS) is not None or is_frozen_batch_norm(module)


def is_frozen_batch_norm(module: nn.Module) -> bool:
    """Whether `module` is a FrozenBatchNorm2d, torchvision's or one written alike.

    Known by its name and buffers, since importing torchvision costs more than all of this library.
    """
    return (
        type(module).__name__ == "FrozenBatchNorm2d"
        and {
            "weight",
            "bias",
            "running_mean",
            "running_var",
        }
        <= set(module._buffers)
        and hasattr(module, "eps")
    )


def has_statistics(module: nn.Module) -> bool:
    """Whether `module` is a known batch norm with running statistics, and so can be folded."""
    return is_batch_norm(module) and module.running_mean is not None


def statistics(bn: Any) -> BatchNormStatistics:
    """What `bn` computes in evaluation, as tensors of shape `(C_out,)` and eps."""
    return BatchNormStatistics(
        mean=bn.running_mean, var=bn.running_var, eps=bn.eps, gamma=bn.weight, beta=bn.bias
    )


def affine(bn: Any) -> tuple[Tensor, Tensor]:
    """The scale and the shift of each channel in evaluation, `(C_out,)` in float64."""
    ones = torch.ones_like(bn.running_mean)[:, None]
    scale, shift = fold_batch_norm(Branch(ones, None, statistics(bn)))
    assert shift is not None
    return scale.flatten(), shift


def new_spre_batch_norm(bn: Any, gamma: float) -> nn.Module:
    """The batch norm of a SpRe branch: configured as the main one, new, with gamma set.

    A frozen batch norm gets a trainable `nn.BatchNorm2d`. One without affine parameters gets them
    when gamma must differ from 1, which it could not hold otherwise.

    Args:
        bn: The main branch's batch norm.
        gamma: Starting value of its weight.
    """
    frozen = is_frozen_batch_norm(bn)
    options = {
        "num_features": bn.running_mean.numel(),
        "eps": bn.eps,
        "device": bn.running_mean.device,
        "dtype": bn.running_mean.dtype,
    }
    if not frozen:
        options |= {"momentum": bn.momentum, "affine": bn.affine or gamma != 1.0}
    if not frozen and bn.affine and bn.bias is None:
        options["bias"] = False
    if isinstance(bn, nn.SyncBatchNorm):
        options["process_group"] = bn.process_group
    kind = next((kind for kind in _KINDS if isinstance(bn, kind)), nn.BatchNorm2d)
    new: nn.Module = kind(**options)
    if isinstance(new.weight, nn.Parameter):
        with torch.no_grad():
            new.weight.fill_(gamma)
    return new.train(bn.training)
