"""Batches of a recipe's data, for this rank and on its device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from recipes import distributed
from recipes.errors import RecipeError
from recipes.options import Options
from recipes.recipe import EpochSampler, Recipe


class DeviceBatches:
    """A DataLoader whose batches are on a device.

    Args:
        loader: The batches.
        device: Where tensors in tuples, lists and dicts go.
        sampler: What is told of each epoch.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        device: torch.device,
        sampler: EpochSampler | None = None,
    ) -> None:
        self.device = device
        self._loader = loader
        self._sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch, from 0."""
        assert self._sampler is not None
        self._sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            yield to_device(batch, self.device)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with all tensors inside on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def training_loader(recipe: Recipe, options: Options, device: torch.device) -> DeviceBatches:
    """Batches of the training set, in random order.

    Raises:
        RecipeError: If the ranks cannot share a batch evenly, or the data are less than one.
    """
    ranks = distributed.world_size()
    if options.batch_size % ranks:
        raise RecipeError(
            f"--batch-size {options.batch_size}: expected a multiple of the {ranks} processes, "
            "which share it."
        )
    data = recipe.training_data()
    sampler = recipe.training_sampler(data, options.seed)
    batches = recipe.training_batches(data, sampler, options.batch_size // ranks)
    found = _loader(recipe, options, device, data, batches)
    if not len(found):
        raise RecipeError(
            f"--batch-size {options.batch_size}: expected at most the {len(data)} training samples "  # type: ignore[arg-type]
            f"in {recipe.root}."
        )
    return DeviceBatches(found, device, sampler)


def evaluation_loader(recipe: Recipe, options: Options, device: torch.device) -> DeviceBatches:
    """Batches of this rank's part of the evaluation set: every sample is in one part, once."""
    data = recipe.evaluation_data()
    part = range(distributed.rank(), len(data), distributed.world_size())  # type: ignore[arg-type]
    size = max(1, options.batch_size // distributed.world_size())
    batches = BatchSampler(part, size, drop_last=False)
    return DeviceBatches(_loader(recipe, options, device, data, batches), device)


def _loader(
    recipe: Recipe, options: Options, device: torch.device, data: Any, batches: Any
) -> DataLoader[Any]:
    # Workers that outlive an epoch would go on with the random numbers of the one before.
    return DataLoader(
        data,
        batch_sampler=batches,
        collate_fn=recipe.collate,
        num_workers=options.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=False,
    )
