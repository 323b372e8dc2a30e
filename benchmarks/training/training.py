"""A training step: zero_grad, forward, cross-entropy, backward, SGD."""

from __future__ import annotations

import contextlib
import time

import contenders
import torch
from setting import Setting
from torch import Tensor, nn
from torch.nn import functional as F

_CLASSES = 1000


class Training:
    """A contender, its optimizer and a batch of random images, the same for all contenders.

    Attributes:
        network: The model, not compiled.
    """

    def __init__(self, contender: str, setting: Setting) -> None:
        self.setting = setting
        self.network: nn.Module = contenders.network(contender, setting)
        self.run = torch.compile(self.network) if setting.mode == "compile" else self.network
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4
        )
        torch.manual_seed(1)
        images = torch.randn(setting.batch, 3, setting.pixels, setting.pixels)
        if setting.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        self.images = images.to(setting.device)
        self.labels = torch.randint(_CLASSES, (setting.batch,), device=setting.device)

    def step(self) -> Tensor:
        """Train one step; the loss."""
        self.optimizer.zero_grad()
        with self._autocast():
            loss = F.cross_entropy(self.run(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def milliseconds(self) -> float:
        """Of one step, on the device to its end.

        Raises:
            FloatingPointError: If the loss is not finite: arithmetic with such numbers, and with
                the subnormal ones on the way there, takes other times.
        """
        self._synchronize()
        start = time.perf_counter()
        loss = self.step()
        self._synchronize()
        taken = 1e3 * (time.perf_counter() - start)
        if not loss.isfinite():
            raise FloatingPointError(f"expected a finite loss, found {loss.item()}")
        return taken

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.setting.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.setting.device, torch.bfloat16)

    def _synchronize(self) -> None:
        if self.setting.device == "cuda":
            torch.cuda.synchronize()
