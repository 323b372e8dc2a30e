"""Memory for large results.

What takes longest about a product of a large weight on a CPU is that the system has to find, clear
and map a page for each 4 kB of the result: torch hands freed memory back between steps. On Linux
NumPy asks for huge pages, of 2 MB, wherever they fit; torch does not.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_LEAST = 2**22  # bytes, from which on NumPy asks


def empty_like(tensor: Tensor) -> Tensor:
    """`torch.empty_like`, in huge pages where it is large and on a CPU."""
    if not tensor.is_cpu or tensor.nbytes < _LEAST:
        return torch.empty_like(tensor)
    layout = torch.empty_like(tensor, device="meta")
    memory = torch.from_numpy(np.empty(layout.nbytes, np.uint8)).view(tensor.dtype)
    return memory.as_strided(layout.shape, layout.stride())
