"""After training: one N:M conv per site, a file, and the metrics before and after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

import spre_fx
from recipes import distributed
from recipes.evaluation import evaluate
from recipes.loaders import DeviceBatches
from recipes.logs import say, show
from recipes.options import Options
from recipes.recipe import Recipe

Metrics = dict[str, float]


def deploy(
    models: Mapping[str, nn.Module], recipe: Recipe, options: Options, batches: DeviceBatches
) -> dict[str, Metrics]:
    """Finalize each model, write it to a file, and evaluate it before and after.

    All in the type of the weights, without autocast, so that the two can be compared. A dense model
    has nothing to finalize.

    Args:
        models: Trained models by name; the first one's file is `deployed`, another's says its name.
        recipe: What they were trained by.
        options: Likewise.
        batches: The evaluation set.

    Returns:
        Metrics by model: each name, and "NAME, deployed".
    """
    results: dict[str, Metrics] = {}
    files: dict[str, str] = {}
    for name, model in models.items():
        distributed.share_buffers(model)
        results[name] = evaluate(model, recipe, batches)
        if options.method == "dense":
            continue
        deployed = spre_fx.finalize(model)
        label = f"{name}, deployed"
        results[label] = evaluate(deployed, recipe, batches)
        stem = "deployed" if name == "trained" else f"deployed-{name.lower()}"
        if distributed.is_main():
            if name == "trained":
                changes = spre_fx.diff(model, deployed)
                show("Deployed", changes, options.output / "diff.txt")
            files[label] = str(write(deployed, options.output / stem))
    rows = [
        {"model": name, **metrics, "file": files.get(name, "")} for name, metrics in results.items()
    ]
    main = ", ".join(f"{name} {metrics[recipe.metric]:.3f}" for name, metrics in results.items())
    show("Results", f"{tabulate(rows, headers='keys', floatfmt='.3f')}\n\n{recipe.metric}: {main}")
    return results


def write(deployed: nn.Module, stem: Path) -> Path:
    """Write a deployed model with `spre_fx.save`, or with torch.save where that cannot be.

    A detector is no single graph, and its own code does not fit into a file: what torch.save
    pickles needs the sources where it is loaded.
    """
    path = stem.with_suffix(".safetensors")
    try:
        spre_fx.save(deployed, path)
    except spre_fx.ModelError as error:
        path = stem.with_suffix(".pt")
        torch.save(spre_fx.to_dense(deployed), path)
        say(f"{path} is a pickled module, not a file of spre_fx.save: {error}")
    return path
