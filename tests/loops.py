"""A small model, every way of training it, and one step of each: what the tests of loops share."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from models import randomise
from torch import Tensor, nn
from torch.fx import GraphModule

import spre_fx
from spre_fx import CubicRamp, EveryK, Freeze, RunningMean, SpRe
from spre_fx.modules import NMLayer

RAMP = CubicRamp(1, 9, every=2)
RECIPES: dict[str, dict[str, Any]] = {
    "sr-ste": {},
    "sr-ste every 3": {"schedule": EveryK(3)},
    "sr-ste frozen at 6": {"schedule": Freeze(at=6, before=EveryK(2))},
    "sr-ste ramp": {"schedule": CubicRamp(2, 8, every=3)},
    "asp": {"method": "asp"},
    "lbc": {"method": "lbc", "schedule": RAMP},
    "gmp": {"method": "gmp", "schedule": RAMP},
    "rigl": {"method": "rigl", "schedule": Freeze(at=9, before=EveryK(2))},
    "granet": {"method": "granet", "schedule": RAMP},
    "taylor": {"criterion": "taylor", "schedule": EveryK(3)},
    "steady taps": {
        "criterion": RunningMean(0.5),
        "branch": SpRe(hysteresis=0.2, narrow=CubicRamp(1, 9), straight_through=True),
    },
    "taps by change": {"criterion": "change", "branch": "random", "schedule": EveryK(2)},
}
# Kept masks, scores, weights that come back, and what a branch remembers.
FEW = ("sr-ste every 3", "lbc", "rigl", "steady taps")
OF_LAYERS = {name: RECIPES[name] for name in RECIPES if name not in ("gmp", "rigl", "granet")}
SHAPE = (4, 8, 6, 6)


def quick(*kept: str, of: Iterable[str] = RECIPES) -> list[Any]:
    """Recipes as parameters of a test: all but these few are slow."""
    slow = pytest.mark.slow
    return [name if name in kept else pytest.param(name, marks=slow) for name in of]


def net(*, norms: bool = True) -> nn.Sequential:
    """A site with a SpRe branch, one without, a linear."""
    kind = nn.BatchNorm2d if norms else nn.Identity
    layers = [
        *(nn.Conv2d(8, 16, 3, padding=1, bias=False), kind(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1, bias=False), kind(16), nn.ReLU()),
        *(nn.Conv2d(16, 8, 1), kind(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    ]
    return randomise(nn.Sequential(*layers))


def prepared(recipe: str = "sr-ste", seed: int = 0, **options: Any) -> GraphModule:
    """The net, prepared by a recipe, from one seed."""
    torch.manual_seed(seed)
    dtype = options.pop("dtype", torch.float32)
    model = net(norms=options.pop("norms", True)).to(dtype)
    return spre_fx.prepare(model, **{"pattern": "1:4", **RECIPES[recipe], **options})


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """With momentum, so that the optimizer has a state to lose."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)


def batch(step: int, rank: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The images of a step on a rank."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(SHAPE, generator=generator).to(dtype)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().mean()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, recipe: str = "sr-ste"
) -> list[float]:
    """Train, and return the losses."""
    losses = []
    dtype = next(model.parameters()).dtype
    for step in steps:
        x = batch(step, dtype=dtype)
        if recipe == "taylor":
            spre_fx.update_taps(model, lambda x=x: loss_of(model, x))
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def masks(model: nn.Module) -> dict[str, Tensor]:
    """B of each layer as evaluation sees it."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, NMLayer)}
    was = model.training
    model.eval()
    found = {name: layer.masked_weight()[1].bool() for name, layer in layers.items()}
    model.train(was)
    return found


def assert_agrees(model: GraphModule, tolerance: float = 1e-10) -> GraphModule:
    """Finalize, and compare outputs in evaluation in float64."""
    model = model.double().eval()
    deployed = spre_fx.finalize(model)
    x = batch(99, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(deployed(x), model(x), rtol=tolerance, atol=tolerance)
    return deployed
