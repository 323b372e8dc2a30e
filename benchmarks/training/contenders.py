"""What is compared: the plain model, what a user's call of `prepare` makes of it, the reference."""

from __future__ import annotations

from typing import Any

import reference
import torch
import torchvision
from setting import Setting
from torch import nn

import spre_fx

DENSE, REFERENCE = "dense", "reference"
# The options of `prepare` beside the pattern. The ramp of LBC is over after the first two steps,
# which are not timed: N:M masks then hold, as in the second half of its trainings.
PREPARED: dict[str, dict[str, Any]] = {
    "SR-STE": {"branch": None},
    "SR-STE + SpRe": {},
    "ASP + SpRe": {"method": "asp"},
    "LBC + SpRe": {"method": "lbc", "schedule": spre_fx.CubicRamp(0, 1)},
}
CONTENDERS = (DENSE, *PREPARED, REFERENCE)


def network(contender: str, setting: Setting) -> nn.Module:
    """A contender in training mode, on its device; the weights it starts from are those of all."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(setting.model, weights=None)
    layout = torch.channels_last if setting.channels_last else torch.preserve_format
    dense: nn.Module = model.to(setting.device, memory_format=layout).train()
    if contender == DENSE:
        return dense
    if contender == REFERENCE:
        return reference.algorithm_1(dense, spre_fx.Pattern.parse(setting.pattern))
    return spre_fx.prepare(dense, setting.pattern, **PREPARED[contender])


def live_taps(model: nn.Module) -> float | None:
    """The share of the taps of the SpRe branches that are live; None of models without."""
    taps = [site.live_taps for site in spre_fx.sites(model) if site.live_taps is not None]
    return sum(live for live, _ in taps) / sum(of for _, of in taps) if taps else None
