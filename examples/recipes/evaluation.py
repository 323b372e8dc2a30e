"""Metrics of a model over the whole evaluation set."""

from __future__ import annotations

import torch
from torch import nn

from recipes.loaders import DeviceBatches
from recipes.logs import progress
from recipes.recipe import Recipe


@torch.no_grad()
def evaluate(model: nn.Module, recipe: Recipe, batches: DeviceBatches) -> dict[str, float]:
    """What the recipe measures, on every rank; the model is left in evaluation mode."""
    return recipe.evaluate(model.eval(), progress(batches, "evaluation"))
