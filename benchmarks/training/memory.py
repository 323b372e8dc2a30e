"""The peak memory of training steps, in a process that does nothing else."""

from __future__ import annotations

import process_memory
import torch
from setting import Setting
from training import Training


def peak(contender: str, setting: Setting, steps: int) -> int:
    """Bytes at the peak of some steps, above the process before the model was built.

    On CUDA those that torch allocated. Else what was resident: what is for a moment there while the
    model is prepared is not in it, weights, their gradients and momentum are.
    """
    if setting.device == "cuda":
        training = Training(contender, setting)
        torch.cuda.reset_peak_memory_stats()
        _run(training, steps)
        return torch.cuda.max_memory_allocated()
    process_memory.warm_up()
    before = process_memory.resident()
    training = Training(contender, setting)
    process_memory.release()
    process_memory.forget_peak()
    _run(training, steps)
    return process_memory.peak() - before


def _run(training: Training, steps: int) -> None:
    for _ in range(steps):
        training.step()
