"""What a model must be before `prepare` or `finalize` will touch it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from spre_fx.batch_norm import is_batch_norm
from spre_fx.errors import ModelError
from spre_fx.modules import NMLayer
from spre_fx.ranks import is_shard


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be traced, copied or masked.

    Raises:
        ModelError: Naming the module or tensor, what was found and what to do.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected an nn.Module, found {type(model).__name__}.")
    for name, module in model.named_modules():
        _check_module(name or type(model).__name__, module)
    check_tensors(model)


def _check_module(name: str, module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            f"{name}: expected a Python module, found a compiled {type(module).__name__}. Prepare "
            "the model before torch.jit compiles it."
        )
    if isinstance(module, LazyModuleMixin) and _never_ran(module):
        raise ModelError(
            f"{name}: expected initialised weights, found an uninitialised "
            f"{type(module).__name__}. Run one forward first."
        )
    home = type(module).__module__
    if home.startswith("torch.") and ".quantized" in home:
        raise ModelError(
            f"{name}: expected floating-point layers, found the quantised {type(module).__name__}. "
            "Prepare and train the float model, finalize it, and quantise the deployed one."
        )


def check_tensors(model: nn.Module) -> None:
    """Refuse tensors without values, and weights and statistics that are not finite.

    Other buffers may hold what they like, such as the -inf of an attention mask.

    Raises:
        ModelError: Naming the tensor.
    """
    norms = [module for module in model.modules() if is_batch_norm(module)]
    checked = {id(parameter) for parameter in model.parameters()}
    checked |= {id(buffer) for norm in norms for buffer in norm.buffers()}
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_shard(tensor):
            raise ModelError(
                f"{name}: expected whole tensors, found a shard of one (DTensor). Call prepare "
                "before fully_shard. To finalize, gather the weights "
                "(torch.distributed.checkpoint.state_dict.get_model_state_dict with "
                "full_state_dict=True), load them into a prepared model that is not sharded, and "
                "finalize that."
            )
        if tensor.device.type == "meta":
            raise ModelError(
                f"{name}: expected values, found a tensor on the meta device. Load the weights "
                "first (model.to_empty(device=...), then load_state_dict)."
            )
        if id(tensor) in checked and not _all_finite(tensor):
            raise ModelError(
                f"{name}: expected finite values, found {_not_finite(tensor)}. Go back to a "
                "checkpoint from before the training diverged."
            )


def _all_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite: a finite sum says so several times faster than each of them.

    The sum of large values may be infinite all the same.
    """
    tensor = tensor.detach()
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _never_ran(module: Any) -> bool:
    return bool(module.has_uninitialized_params()) or module.cls_to_become is not None


def _not_finite(tensor: torch.Tensor) -> str:
    return f"{int(tensor.isnan().sum())} NaN and {int(tensor.isinf().sum())} infinite values"


def is_prepared(model: nn.Module) -> bool:
    """Whether `model` carries N:M layers in training."""
    return any(isinstance(module, NMLayer) for module in model.modules())
