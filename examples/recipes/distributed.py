"""Ranks: started by torchrun, or the only one."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from recipes.errors import RecipeError


def start(wanted: str | None) -> torch.device:
    """Join the other ranks, if torchrun started this process, and say which device is this one's.

    Args:
        wanted: "cpu", "cuda", "cuda:1"; None: a GPU if there is one.

    Raises:
        RecipeError: If there is no such device.
    """
    device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"--device {wanted}: expected cpu or cuda.")
    if device.type == "cuda":
        if ":" not in str(device):
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.index >= torch.cuda.device_count():
            raise RecipeError(
                f"--device {wanted or 'cuda'}: expected a GPU with index {device.index}, found "
                f"{torch.cuda.device_count()} GPUs. Start as many processes as there are GPUs, or "
                "take --device cpu."
            )
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def stop() -> None:
    """Leave the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Which of the ranks this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this rank writes and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the ranks, on each of them."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def gather(found: Any) -> list[Any]:
    """What every rank found, in the order of the ranks, on each of them. Anything that pickles."""
    everything = [found]
    if dist.is_initialized():
        everything = [None] * world_size()
        dist.all_gather_object(everything, found)
    return everything


def share_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0, whose running statistics are the ones that are kept.

    DistributedDataParallel does so before each training forward, but not after the last one.
    """
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
