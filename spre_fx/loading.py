"""Models by name, and what torch.save wrote, for the command line."""

from __future__ import annotations

import difflib
import importlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from spre_fx.errors import ModelError, OptionError

_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
_NESTS = ("state_dict", "model_state_dict", "model")


def load_model(name: str, *, pretrained: bool = False) -> nn.Module:
    """Make a model.

    Args:
        name: A torchvision name, `timm:NAME`, or `package.module:NAME` of a module or of a callable
            that makes one without arguments.
        pretrained: Whether to take the published weights of a torchvision or timm name.

    Raises:
        OptionError: If there is no such name.
        ModelError: If what the name stands for is no model.
    """
    torch.manual_seed(0)  # random weights, hence live taps, are the same each time
    library, separator, rest = name.partition(":")
    if not separator:
        return _from_torchvision(name, pretrained=pretrained)
    if library == "timm":
        return _from_timm(rest, pretrained=pretrained)
    if pretrained:
        raise OptionError(f"--pretrained: expected a torchvision or timm name, found {name!r}.")
    return _from_module(library, rest)


def _from_torchvision(name: str, *, pretrained: bool) -> nn.Module:
    known = torchvision.models.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise OptionError(
            f"{name!r} is no torchvision model. {hint}Expected a torchvision name, timm:NAME, or "
            "package.module:NAME."
        )
    options: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
    if not pretrained and name in ("googlenet", "inception_v3"):
        options["init_weights"] = True  # what they do anyway, without the warning
    model: nn.Module = torchvision.models.get_model(name, **options)
    return model


def _from_timm(name: str, *, pretrained: bool) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise OptionError(
            f"timm:{name}: expected timm, found it missing. Run: pip install timm"
        ) from error
    if not timm.is_model(name):
        raise OptionError(f"timm:{name}: timm knows no model {name!r}.")
    model: nn.Module = timm.create_model(name, pretrained=pretrained)
    return model


def _from_module(path: str, attribute: str) -> nn.Module:
    try:
        found = importlib.import_module(path)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptionError(f"{path}:{attribute}: expected a model there, found: {error}.") from error
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ModelError(
                f"{path}:{attribute}: expected a model, found a {type(found).__name__}."
            )
        try:
            found = found()
        except Exception as error:
            raise ModelError(
                f"{path}:{attribute}: expected a callable that makes a model without arguments, "
                f"found {type(error).__name__}: {error}"
            ) from error
    if not isinstance(found, nn.Module):
        raise ModelError(
            f"{path}:{attribute}: expected an nn.Module, found a {type(found).__name__}."
        )
    return found


def load_file(path: Path, *, trust: bool) -> nn.Module | dict[str, Tensor]:
    """A model, or a `state_dict`, from a file of torch.save, onto the CPU.

    Args:
        path: The file.
        trust: Whether to unpickle it, which runs whatever code its author put there. If not, only
            tensors and plain data are read.

    Raises:
        OptionError: If the file holds neither, or needs trust.
    """
    if not path.is_file():
        raise OptionError(f"{path}: expected a file of torch.save, found none.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        raise OptionError(
            f"{path}: expected tensors and plain data, found a pickled object or a damaged file. "
            "Unpickling a model runs whatever code its author put there: --trust does it."
            if not trust
            else f"{path}: expected a file of torch.save, found: {error}."
        ) from error
    except (RuntimeError, EOFError, AttributeError, ImportError, KeyError) as error:
        found = f"{type(error).__name__}: {error}"
        raise OptionError(f"{path}: expected a file of torch.save, found {found}.") from error
    return content if isinstance(content, nn.Module) else _state(path, content)


def _state(path: Path, content: object) -> dict[str, Tensor]:
    """The state_dict in a checkpoint, under the names the bare model gives its entries."""
    while isinstance(content, Mapping) and any(isinstance(content.get(n), Mapping) for n in _NESTS):
        content = next(content[n] for n in _NESTS if isinstance(content.get(n), Mapping))
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise OptionError(
            f"{path}: expected a model or a state_dict, found a {type(content).__name__}."
        )
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return state
