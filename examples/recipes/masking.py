"""`spre_fx.prepare` as the options ask for it, with schedules as long as the training."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.amp import GradScaler

import spre_fx
from recipes.options import Options
from recipes.recipe import Recipe


def prepare(
    model: nn.Module, recipe: Recipe, options: Options, steps_per_epoch: int, scaler: GradScaler
) -> nn.Module:
    """The model in training as the options want it; as it is for "dense"."""
    if options.method == "dense":
        return model
    return spre_fx.prepare(
        model,
        options.pattern,
        branch=None if options.branch == "none" else options.branch,
        exclude=options.exclude,
        depthwise=options.depthwise,
        **_method(recipe, options, steps_per_epoch, scaler),
    )


def _method(
    recipe: Recipe, options: Options, steps_per_epoch: int, scaler: GradScaler
) -> dict[str, Any]:
    """The mask method and, where it needs one, its schedule."""
    steps = options.epochs * steps_per_epoch
    if options.method == "sr-ste":
        return {"method": spre_fx.SRSTE(scaler=scaler if scaler.is_enabled() else None)}
    if options.method == "asp":  # masks of the first step stay: the method's own schedule
        return {"method": "asp"}
    if options.method == "lbc":
        # The authors' code (zyxxmu/LBC) removes combinations once an epoch, from the first on.
        end = max(1, round(recipe.lbc_end * steps))
        return {"method": "lbc", "schedule": spre_fx.CubicRamp(0, end, every=steps_per_epoch)}
    if options.method == "rigl":
        # Evci et al., 2020, Sec. 4.1: every 100 steps, until 25,000 of 32,000.
        schedule = spre_fx.Freeze(at=round(0.75 * steps), before=spre_fx.EveryK(100))
        return {"method": "rigl", "schedule": schedule}
    # GMP and GraNet as the commands in GraNet's repository: pruning ends after 30 of 100 epochs,
    # with an update every 4,000 steps of 128 images, which is 0.4 epochs.
    ramp = spre_fx.CubicRamp(0, max(1, round(0.3 * steps)), every=max(1, 2 * steps_per_epoch // 5))
    if options.method == "granet":  # regenerates to the end
        return {"method": spre_fx.GraNet(until=steps), "schedule": ramp}
    return {"method": "gmp", "schedule": ramp}
