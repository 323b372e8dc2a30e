"""What training on several ranks needs to know about tensors.

By default DistributedDataParallel broadcasts every buffer of rank 0 before each forward. Masks are
functions of the weights, which it keeps equal anyway, and of steps, so each rank makes the very
same ones.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

_IGNORED = "_ddp_params_and_buffers_to_ignore"
_PRESERVED = "_user_preserved_attributes"  # in the meta of a GraphModule: what its copies keep


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, as fully_shard leaves them."""
    home = sys.modules.get("torch.distributed.tensor")  # nobody has one without importing this
    return home is not None and isinstance(tensor, home.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or what its shards make together; then every rank has to ask for it."""
    shard: Any = tensor
    gathered: Tensor = shard.full_tensor() if is_shard(tensor) else tensor
    return gathered


def keep_masks_from_ddp(model: nn.Module) -> None:
    """Let DistributedDataParallel broadcast no masks of `model`, neither at first nor ever.

    `prepare` does it to its result. DDP asks the very module it is given, or what torch.compile
    made of it: call this on a module of your own that has a prepared model inside, such as a
    LightningModule. Otherwise masks are broadcast before every forward, which is slow but right.

    Copies of a GraphModule made with `copy.deepcopy` keep it, and so does one that was pickled, but
    not copies of the latter.

    Args:
        model: A module with prepared layers inside, or anything else, which it leaves alone.
    """
    names = [
        f"{prefix}{name}.{buffer}" if name else f"{prefix}{buffer}"
        for name, module in model.named_modules(remove_duplicate=False)
        for buffer in getattr(module, "per_rank", ())
        for prefix in ("", "_orig_mod.")
        if module._buffers[buffer] is not None
    ]
    if not names:
        return
    ignored = sorted({*getattr(model, _IGNORED, ()), *names})
    setattr(model, _IGNORED, ignored)
    if isinstance(model, GraphModule):
        model.meta.setdefault(_PRESERVED, {})[_IGNORED] = ignored
