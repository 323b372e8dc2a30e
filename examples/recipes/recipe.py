"""What differs from one experiment to the next; the loop in `training` asks for nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, Dataset, DistributedSampler, Sampler, default_collate

from recipes import distributed

Batch = Any  # what `collate` returns, with its tensors on the device


class EpochSampler(Protocol):
    """Indices of samples, in another order each epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch, from 0."""

    def __iter__(self) -> Iterator[int]: ...


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """One experiment: model, data, loss, metrics and hyper-parameters.

    A checkpoint is of one recipe: all fields but `root` are compared when a run is resumed.

    Attributes:
        root: The data, as --data names it.
        epochs: How long it trains.
        batch_size: Images per step, of all ranks together.
        lr: Peak learning rate at that batch size; another batch size scales it in proportion.
        weight_decay: Of the optimizer.
        metric: Name of the main metric among those of `evaluate`.
        exclude: Layers that stay dense, by name or glob.
        lbc_end: Fraction of the training at which LBC has removed all it removes (t_f).
    """

    root: Path
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    metric: str
    exclude: tuple[str, ...] = ()
    lbc_end: float = 0.5  # LBC's README: --t_f 60 of 120 epochs

    @abstractmethod
    def model(self) -> nn.Module:
        """The dense model with fresh weights, in training mode."""

    def prepared(self, model: nn.Module) -> None:  # noqa: B027 - most start from what it is given
        """Change, in place, what `prepare` returned, before it trains."""

    @abstractmethod
    def training_data(self) -> Dataset[Any]:
        """The training set, with `__len__`.

        Raises:
            RecipeError: If `root` does not hold it.
        """

    @abstractmethod
    def evaluation_data(self) -> Dataset[Any]:
        """The set that `evaluate` is computed on.

        Raises:
            RecipeError: If `root` does not hold it.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor | Mapping[str, Tensor]:
        """The loss of a training batch, a scalar, or named terms of it, which are added.

        Args:
            model: The model in training mode, perhaps wrapped for several ranks or compiled.
            batch: A batch of `training_data`, on the model's device.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Metrics over the whole evaluation set, the same on every rank.

        Each rank is given another part of the set, without repetitions; `distributed.total` and
        `distributed.gather` put the parts together.

        Args:
            model: The model in evaluation mode.
            batches: Batches of `evaluation_data`, on the model's device.
        """

    @abstractmethod
    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
        """The optimizer of the prepared model."""

    @abstractmethod
    def lr_factor(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """What each learning rate of the optimizer is multiplied with at a step, from 0."""

    def collate(self, samples: list[Any]) -> Any:
        """Make a batch of samples."""
        return default_collate(samples)

    def training_sampler(self, data: Dataset[Any], seed: int) -> EpochSampler:
        """This rank's samples of an epoch, in random order, as many on every rank."""
        return DistributedSampler(
            data, distributed.world_size(), distributed.rank(), seed=seed, drop_last=True
        )

    def training_batches(
        self, data: Dataset[Any], sampler: EpochSampler, batch_size: int
    ) -> Sampler[list[int]]:
        """The samples of `sampler` in batches of one rank, as many on every rank."""
        del data  # for those that put alike images together
        return BatchSampler(sampler, batch_size, drop_last=True)
