"""The checkpoint of a run: one file, written whole or not at all, that only its own run reads."""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from recipes import distributed
from recipes.errors import RecipeError
from recipes.options import Options
from recipes.recipe import Recipe
from spre_fx.atomic_write import write_atomically

# Where a run is, and what it runs on. (Another number of workers augments other images otherwise.)
_FREE = ("root", "output", "resume", "workers", "device", "eval_every")


def settings(recipe: Recipe, options: Options) -> dict[str, Any]:
    """All that decides what a run computes, as JSON has it."""
    found = asdict(recipe) | asdict(options) | {"world_size": distributed.world_size()}
    for name in _FREE:
        del found[name]
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def save(path: Path, content: dict[str, Any]) -> None:
    """Replace the checkpoint at `path`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint at `path`, with its tensors on the CPU.

    Args:
        path: A file that `save` wrote.
        expected: The `settings` of this run.

    Raises:
        RecipeError: If it cannot be read, or is of a run with other settings.
    """
    content = _read(path)
    if "settings" not in content:
        raise RecipeError(f"{path}: expected a checkpoint of this script, found other content.")
    found = content["settings"]
    differences = [
        f"  {name}: {found.get(name)!r} in the checkpoint, {expected.get(name)!r} now"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]
    if differences:
        raise RecipeError(
            f"--resume: expected the options of the run in {path}, found others:\n"
            + "\n".join(differences)
            + "\nRepeat those options, or choose another --output."
        )
    return content


def load_pretrained(model: nn.Module, path: Path) -> None:
    """Load the `weights` in a file into a dense model.

    Raises:
        RecipeError: If they are not there, or of another model.
    """
    try:
        model.load_state_dict(weights(path))
    except (RuntimeError, AttributeError) as error:
        raise RecipeError(
            f"--pretrained {path}: expected the weights of this dense model, found others. {error}"
        ) from error


def weights(path: Path) -> dict[str, Any]:
    """A state_dict, or that of a checkpoint with one as "model" or "state_dict".

    Its metadata are kept, which say what N:M weights are of.

    Raises:
        RecipeError: If it cannot be read.
    """
    content = _read(path)
    for key in ("model", "state_dict"):
        content = content.get(key, content)
    consume_prefix_in_state_dict_if_present(content, "module.")  # DistributedDataParallel's
    return content


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RecipeError(f"{path}: expected a checkpoint, found no such file.") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise RecipeError(
            f"{path}: expected a file of torch.save, found another. {error}"
        ) from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected a dict, found a {type(content).__name__}.")
    return content
