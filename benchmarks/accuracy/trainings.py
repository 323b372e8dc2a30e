"""One training run: from a seed to the accuracy of what is deployed."""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, Arm
from patch_network import resnet
from patches import SPLITS, Patches, patches
from torch import Tensor, nn

import spre_fx
from spre_fx.criteria import CriterionTaps

TASK = "src"
BATCH = 64
STEPS_PER_EPOCH = 250


@dataclass(frozen=True)
class Recipe:
    """How every arm is trained: SGD with momentum 0.9, one warm-up epoch, then a cosine to 0.

    Attributes:
        epochs: Of 250 batches of 64 patches.
        learning_rate: At its highest.
        weight_decay: Of all parameters.
    """

    epochs: float = 4
    learning_rate: float = 0.1
    weight_decay: float = 2e-3


@dataclass(frozen=True)
class Job:
    """A run to be made: one row of the results.

    Attributes:
        pattern: N:M; "dense" for the dense arm.
        arm: Its name.
        seed: Of the initial weights, which all arms share, and of the order of the batches.
        split: "test" or "validation".
        epochs: How long; that of the recipe for all but the controls.
    """

    pattern: str
    arm: str
    seed: int
    split: str
    epochs: float


def run(job: Job, recipe: Recipe, cache: Path) -> dict[str, Any]:
    """Train, finalize, and judge what would be deployed.

    Args:
        job: What to train.
        recipe: How.
        cache: A folder for the dense networks that ASP starts from.

    Returns:
        What a row says of the outcome: accuracy, seconds of the training, and the mean share of
        live taps in the end.
    """
    arm, data = ARMS[job.arm], patches(SPLITS[job.split])
    weights = trained_dense(job, recipe, cache) if arm.starts_trained else None
    torch.manual_seed(job.seed)
    model = resnet().to(memory_format=torch.channels_last)
    if weights is not None:
        model.load_state_dict(weights)
    steps = round(job.epochs * STEPS_PER_EPOCH)
    prepared = arm.prepare(model, job.pattern, steps)
    seconds = train(prepared, data, steps, recipe, job.seed)
    row: dict[str, Any] = {"seconds": round(seconds, 2)}
    if arm.method is None:
        _save(prepared.state_dict(), _dense_file(job, recipe, cache))
        row["accuracy"] = accuracy(prepared, data)
        return row
    live = [site.live_taps for site in spre_fx.sites(prepared) if site.live_taps]
    if live:
        row["live_taps"] = round(sum(n for n, _ in live) / sum(of for _, of in live), 4)
    row["accuracy"] = accuracy(spre_fx.finalize(prepared, "dense"), data)
    return row


def trained_dense(job: Job, recipe: Recipe, cache: Path) -> dict[str, Tensor]:
    """The weights of the dense arm with the seed and split of a job, trained now if need be."""
    file = _dense_file(job, recipe, cache)
    if not file.exists():
        run(Job("dense", "dense", job.seed, job.split, recipe.epochs), recipe, cache)
    weights: dict[str, Tensor] = torch.load(file)
    return weights


def _dense_file(job: Job, recipe: Recipe, cache: Path) -> Path:
    options = "-".join(str(value) for value in vars(recipe).values())
    return cache / f"dense-{options}-{job.split}-{job.seed}.pt"


def _save(weights: dict[str, Tensor], file: Path) -> None:
    """Whole or not at all: another worker may be waiting for it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    torch.save(weights, part)
    part.replace(file)


def train(model: nn.Module, data: Patches, steps: int, recipe: Recipe, seed: int) -> float:
    """Train a network in place.

    Returns:
        Seconds.
    """
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=0.9,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, steps))
    guided = any(isinstance(m, CriterionTaps) for m in model.modules())
    start = time.perf_counter()
    model.train()
    for batch in _batches(len(data.x_train), steps, seed):
        x, y = data.x_train[batch], data.y_train[batch]
        if guided:
            spre_fx.update_taps(model, lambda: nn.functional.cross_entropy(model(x), y))  # noqa: B023
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start


def _warm_cosine(step: int, steps: int) -> float:
    """Share of the learning rate: one epoch up, then down to 0 along a cosine."""
    if step < STEPS_PER_EPOCH:
        return (step + 1) / STEPS_PER_EPOCH
    progress = (step - STEPS_PER_EPOCH) / (steps - STEPS_PER_EPOCH)
    return (1 + math.cos(math.pi * progress)) / 2


def _batches(count: int, steps: int, seed: int) -> list[Tensor]:
    """Indices of each batch: a new order every epoch, the same for every arm of a seed."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps / STEPS_PER_EPOCH)
    orders = [torch.randperm(count, generator=generator) for _ in range(epochs)]
    return [batch for order in orders for batch in order.split(BATCH)][:steps]


@torch.no_grad()
def accuracy(model: nn.Module, data: Patches) -> float:
    """Fraction of the patches to judge by that are named right."""
    logits = model.eval()(data.x_judge)
    return float((logits.argmax(1) == data.y_judge).double().mean())


def step_times(arms: list[Arm], pattern: str, rounds: int) -> dict[str, float]:
    """Median milliseconds of a training step of each arm, all taking turns.

    Args:
        arms: What to time.
        pattern: N:M.
        rounds: Steps of each that are counted, after as many tenths to warm up.
    """
    data, recipe = patches(SPLITS["validation"]), Recipe()
    models = {}
    for arm in arms:
        torch.manual_seed(0)
        model = resnet().to(memory_format=torch.channels_last)
        models[arm.name] = arm.prepare(model, pattern, rounds)
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for _ in range(rounds + rounds // 10):
        for name, model in models.items():
            times[name].append(train(model, data, 2, recipe, 0) / 2)
    return {
        name: 1000 * sorted(taken[rounds // 10 :])[rounds // 2] for name, taken in times.items()
    }


def row_of(
    job: Job, recipe: Recipe, outcome: dict[str, Any], versions: dict[str, str]
) -> dict[str, Any]:
    """A row of the results."""
    return {
        "task": TASK,
        **asdict(recipe),
        **asdict(job),
        "steps": round(job.epochs * STEPS_PER_EPOCH),
        **outcome,
        "versions": versions,
    }
