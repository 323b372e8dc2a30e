"""The resident memory of this process, as Linux counts it."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch
from torch import nn


def warm_up() -> None:
    """Load what the first conv of a process loads."""
    with torch.inference_mode():
        nn.Conv2d(16, 16, 3)(torch.randn(1, 16, 8, 8))
    release()


def release() -> None:
    """Hand back to the system what is free, so that it is not counted."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Bytes resident now."""
    return _status("VmRSS")


def peak() -> int:
    """The most bytes resident since the process, or `forget_peak`, began."""
    return _status("VmHWM")


def forget_peak() -> None:
    """The peak counts from here."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])
