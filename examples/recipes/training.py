"""The training loop that all recipes share: train, evaluate, keep, go on, finalize.

A run that is killed and resumed computes what it would have computed anyway. A checkpoint is
written after each epoch, and at the start of each one every rank's generators are seeded from
(seed, epoch, rank), so that what is drawn in an epoch does not depend on what was before it. On a
CPU the results are equal bit for bit; on a GPU as far as its kernels are deterministic.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import spre_fx
from recipes import checkpoints, deployment, distributed
from recipes.errors import RecipeError
from recipes.evaluation import evaluate
from recipes.loaders import DeviceBatches, evaluation_loader, training_loader
from recipes.logs import Log, progress, say, show
from recipes.masking import prepare
from recipes.options import Options
from recipes.recipe import Recipe
from spre_fx.inspection import site_table

_LOSS_EVERY = 50  # steps between two looks at the loss, each of which waits for the device


@dataclass
class Run:
    """What changes while a model trains.

    Attributes:
        settings: All that decides what the run computes.
        model: What `prepare` returned; its weights are the ones that are trained.
        called: The same, as the loop calls it: compiled, and wrapped for several ranks.
        optimizer: Of `model`.
        scaler: Of the loss, for float16.
        ema: The moving average of `model`.
        epoch: Epochs behind.
    """

    settings: dict[str, Any]
    model: nn.Module
    called: nn.Module
    optimizer: Optimizer
    scaler: GradScaler
    ema: AveragedModel | None
    epoch: int = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "epoch": self.epoch,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was made."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.epoch = state["epoch"]


def main(recipe: Recipe, found: argparse.Namespace) -> None:
    """Run a recipe as the command line asks; what the user can put right is said in one message."""
    try:
        run(recipe, Options.of(found, recipe))
    except (RecipeError, spre_fx.SpreError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None  # as argparse says that a command line is wrong


def run(recipe: Recipe, options: Options) -> dict[str, dict[str, float]]:
    """Train to the end, finalize, and evaluate what came of it.

    Returns:
        The metrics of each model: "trained", "EMA", and the deployed form of each.
    """
    device = distributed.start(options.device)
    try:
        return _run(recipe, options, device)
    finally:
        distributed.stop()


def _run(recipe: Recipe, options: Options, device: torch.device) -> dict[str, dict[str, float]]:
    if options.checkpoint.exists() and not options.resume:
        raise RecipeError(
            f"--output {options.output}: expected a folder without a run, found "
            f"{options.checkpoint}. Add --resume to go on with it, or choose another folder."
        )
    training = training_loader(recipe, options, device)
    evaluation = evaluation_loader(recipe, options, device)
    run = _start(recipe, options, device, len(training))
    if options.method != "dense":
        show("Sites", site_table(run.model), options.output / "sites.txt")
    with closing(Log(options.output, run.settings, run.epoch)) as log:
        while run.epoch < options.epochs:
            start = time.monotonic()
            values = {"loss": _train_epoch(run, recipe, options, training)}
            values["lr"] = run.optimizer.param_groups[0]["lr"]
            values["seconds"] = time.monotonic() - start
            if run.epoch % options.eval_every == 0 or run.epoch == options.epochs:
                values |= _evaluate(run.model, recipe, evaluation, options)
            log.epoch(run.epoch, values)
            if distributed.is_main():
                checkpoints.save(options.checkpoint, run.state())
        models = {"trained": run.model} | ({} if run.ema is None else {"EMA": run.ema.module})
        results = deployment.deploy(models, recipe, options, evaluation)
        log.write({"results": results})
    return results


def _start(recipe: Recipe, options: Options, device: torch.device, steps_per_epoch: int) -> Run:
    """A new run, or one that goes on from its checkpoint."""
    settings = checkpoints.settings(recipe, options)
    resumed = options.checkpoint.exists()
    state = checkpoints.load(options.checkpoint, settings) if resumed else None
    torch.manual_seed(options.seed)
    dense = recipe.model()
    if options.pretrained is not None and not resumed:
        checkpoints.load_pretrained(dense, options.pretrained)
    run = _build(dense, recipe, options, device, steps_per_epoch)
    if state is not None:
        run.load(state)
        say(f"resumed {options.checkpoint} after epoch {run.epoch}")
    elif options.resume:
        say(f"{options.checkpoint} is not there yet: starting at the first epoch")
    options.output.mkdir(parents=True, exist_ok=True)
    distributed.barrier()  # every rank has read the checkpoint
    return run


def _build(
    dense: nn.Module, recipe: Recipe, options: Options, device: torch.device, steps_per_epoch: int
) -> Run:
    """The model, prepared, and all that trains it."""
    scaler = GradScaler(device.type, enabled=options.amp == "fp16")
    model = prepare(dense, recipe, options, steps_per_epoch, scaler)
    recipe.prepared(model)
    model = model.to(device).train()
    called: nn.Module = torch.compile(model) if options.compile else model  # type: ignore[assignment]
    if distributed.world_size() > 1:
        ids = [device.index] if device.type == "cuda" else None
        called = DistributedDataParallel(called, device_ids=ids)
    optimizer = recipe.optimizer(model, options.lr, options.weight_decay)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    ema = None
    if options.ema is not None:  # buffers are those of the model: counts and masks have no average
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema))
    return Run(checkpoints.settings(recipe, options), model, called, optimizer, scaler, ema)


def _train_epoch(run: Run, recipe: Recipe, options: Options, batches: DeviceBatches) -> float:
    """Train for one epoch.

    Returns:
        The mean loss over its steps and the ranks.
    """
    _seed(options.seed, run.epoch)
    batches.set_epoch(run.epoch)
    run.called.train()
    total = torch.zeros((), device=batches.device)
    bar = progress(batches, f"epoch {run.epoch + 1}/{options.epochs}")
    for number, batch in enumerate(bar):
        factor = recipe.lr_factor(run.epoch * len(batches) + number, len(batches), options.epochs)
        for group in run.optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
        with _autocast(options, batches.device):
            loss = _sum(recipe.loss(run.called, batch))
        run.optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        if run.ema is not None:
            run.ema.update_parameters(run.model)
        total += loss.detach()
        if number % _LOSS_EVERY == 0:
            mean = float(total) / (number + 1)
            _check_finite(mean, run.epoch, number)
            bar.set_postfix(loss=f"{mean:.4f}")
    run.epoch += 1
    mean = float(distributed.total(total)) / (len(batches) * distributed.world_size())
    _check_finite(mean, run.epoch - 1, len(batches) - 1)
    return mean


def _sum(loss: Tensor | Mapping[str, Tensor]) -> Tensor:
    return loss if isinstance(loss, Tensor) else torch.stack(list(loss.values())).sum()


def _check_finite(loss: float, epoch: int, step: int) -> None:
    if not math.isfinite(loss):
        raise RecipeError(
            f"the loss is {loss} at step {step} of epoch {epoch + 1}: expected a finite one. Try a "
            "lower --lr, or --amp bf16 or off. The last checkpoint is of the epoch before."
        )


def _seed(seed: int, epoch: int) -> None:
    """Seed all generators of this rank for an epoch; workers take their seeds from torch's."""
    sequence = np.random.SeedSequence([seed, epoch, distributed.rank()])
    number = int(sequence.generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def _autocast(options: Options, device: torch.device) -> torch.autocast:
    """What --amp asks for."""
    dtype = torch.float16 if options.amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=options.amp != "off")


def _evaluate(
    model: nn.Module, recipe: Recipe, batches: DeviceBatches, options: Options
) -> dict[str, float]:
    """Metrics of a model that goes on training."""
    distributed.share_buffers(model)
    with _autocast(options, batches.device):
        return evaluate(model, recipe, batches)
