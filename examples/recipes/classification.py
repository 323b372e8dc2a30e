"""Image classification: cross-entropy, top-1 and top-5."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from recipes import distributed
from recipes.recipe import Batch, Recipe
from recipes.schedules import warmup_cosine


@dataclass(frozen=True, kw_only=True)
class Classification(Recipe):
    """A recipe for `(images, labels)`, with SGD and a cosine schedule.

    Attributes:
        label_smoothing: Of the training loss.
        warmup_epochs: Epochs in which the learning rate rises.
        lr_floor: Fraction of the peak learning rate at the end.
    """

    metric: str = "top1"
    label_smoothing: float = 0.1
    warmup_epochs: int = 5
    lr_floor: float = 0.0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy with label smoothing."""
        images, labels = batch
        return F.cross_entropy(model(images), labels, label_smoothing=self.label_smoothing)

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Top-1 and top-5 accuracy in percent, and the loss without label smoothing."""
        sums: Tensor | None = None
        for images, labels in batches:
            logits = model(images).float()
            best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            found = torch.stack(
                [
                    best[:, 0].sum().double(),
                    best.any(1).sum().double(),
                    F.cross_entropy(logits, labels, reduction="sum").double(),
                    labels.new_tensor(len(labels)).double(),
                ]
            )
            sums = found if sums is None else sums + found
        if sums is None:  # more ranks than images
            sums = torch.zeros(4, dtype=torch.float64, device=next(model.parameters()).device)
        top1, top5, loss, count = distributed.total(sums).tolist()
        return {
            "top1": 100 * top1 / count,
            "top5": 100 * top5 / count,
            "evaluation loss": loss / count,
        }

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
        """SGD with momentum 0.9; every parameter decays, as in the authors' code (zyxxmu/SpRE)."""
        return SGD(model.parameters(), lr, momentum=0.9, weight_decay=weight_decay)

    def lr_factor(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """Warm-up, then half a cosine.

        Step by step, as the code of SR-STE (aojunzz/NM-sparsity); that of SpRe changes it at each
        epoch.
        """
        warmup = self.warmup_epochs * steps_per_epoch
        return warmup_cosine(step, warmup, epochs * steps_per_epoch, self.lr_floor)
