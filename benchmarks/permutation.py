"""How much more magnitude N:M masks keep after a channel permutation, and how long it takes.

Weights are drawn with heavy tails, as trained ones have: a normal number times a scale of its
filter, of its input channel and of its own. The figures measure the search, not a trained network.
Usage:

    python benchmarks/permutation.py --models resnet18 --seconds 20
"""

from __future__ import annotations

import argparse
import time

import torch
import torchvision
from tabulate import tabulate
from torch import nn

import spre_fx
from spre_fx import masks
from spre_fx.passes import PermuteChannels, Policy, trace
from spre_fx.patterns import Pattern


@torch.no_grad()
def heavy_tailed(model: nn.Module, seed: int) -> nn.Module:
    """Give every conv and linear of `model` seeded heavy-tailed weights."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight
            ones = [1] * (weight.ndim - 2)
            weight.copy_(torch.randn(weight.shape, generator=generator))
            for shape in (weight.shape, (len(weight), 1, *ones), (1, weight.shape[1], *ones)):
                weight.mul_(torch.randn(shape, generator=generator).mul(0.5).exp())
    return model


def kept(model: nn.Module, names: list[str], pattern: Pattern) -> tuple[float, float]:
    """Magnitude that the masks keep of the named layers, and all of it."""
    weights = [model.get_submodule(name).weight.detach() for name in names]
    return (
        sum(float((w * masks.nm_mask(w, pattern)).abs().sum()) for w in weights),
        sum(float(w.abs().sum()) for w in weights),
    )


def measure(name: str, text: str, options: argparse.Namespace) -> list[object]:
    """One row of the table."""
    torch.manual_seed(options.seed)
    model = heavy_tailed(torchvision.models.get_model(name), options.seed)
    graph_module = trace(model.to(options.device))
    pattern = Pattern.parse(text)
    search = spre_fx.ChannelPermutation(options.sweeps, options.seconds, options.seed)
    start = time.perf_counter()
    result = PermuteChannels(Policy(pattern), search)(graph_module)
    seconds = time.perf_counter() - start
    names = list(result.account.applied)
    before, total = kept(graph_module, names, pattern)
    after, _ = kept(result.graph_module, names, pattern)
    gain = f"{after / before - 1:+.2%}"
    return [name, text, len(names), before / total, after / total, gain, seconds]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4", "1:8", "1:16"])
    parser.add_argument("--sweeps", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=None, help="limit for each search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    rows = [measure(model, text, options) for model in options.models for text in options.patterns]
    headers = ("model", "pattern", "layers permuted", "kept before", "kept after", "gain", "s")
    print(tabulate(rows, headers, floatfmt=("", "", "", ".4f", ".4f", "", ".1f")))


if __name__ == "__main__":
    main()
