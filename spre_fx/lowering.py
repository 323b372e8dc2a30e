"""`lower`: a deployed model, made as fast as this machine can run it."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from spre_fx import engine
from spre_fx.backends import Backend, DenseBackend, is_lowered
from spre_fx.checks import is_prepared
from spre_fx.choice import Shape, Timings
from spre_fx.cpu_backend import CPUBackend
from spre_fx.cuda_backend import CUDABackend
from spre_fx.dense_form import to_dense
from spre_fx.errors import ModelError, OptionError
from spre_fx.modules import Layer
from spre_fx.passes.pipeline import lowering_pipeline
from spre_fx.passes.planned_graph import planned
from spre_fx.passes.regions import assemble, find_regions, is_divided
from spre_fx.planned import images_at_a_time

BackendName: TypeAlias = Literal["auto", "cpu", "cuda", "dense"]
_NAMES = ("auto", "cpu", "cuda", "dense")


def lower(
    deployed: nn.Module,
    backend: BackendName = "auto",
    *,
    example_inputs: Any = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Make a deployed model as fast as this machine can run it, layer by layer.

    `finalize` and `adopt` do this. What `load` returns is lowered with this function, and so is a
    model that has moved to another device or machine.

    Args:
        deployed: What `finalize`, `adopt`, `load` or `lower` returned. Never modified.
        backend: As for `finalize`.
        example_inputs: As for `finalize`.
        dtype: As for `finalize`.

    Returns:
        The lowered model in evaluation mode, on the same device.

    Raises:
        ModelError: If the model is not deployed, or does not run on the example inputs.
        OptionError: If there is no such backend, or it cannot run on the model's device.
    """
    if is_prepared(deployed) or not is_divided(deployed):
        raise ModelError(
            f"expected a deployed model, found a {type(deployed).__name__} that finalize, adopt "
            "or load did not make. Finalize the prepared model, which lowers it as well."
        )
    return lower_in_place(to_dense(deployed), backend, example_inputs, dtype, stacklevel=3)


def lower_in_place(
    model: nn.Module,
    backend: str,
    example_inputs: Any = None,
    dtype: torch.dtype | None = None,
    *,
    stacklevel: int,
) -> nn.Module:
    """`lower` of a dense model that may be edited.

    Args:
        model: A deployed model of ordinary torch layers.
        backend: As for `finalize`.
        example_inputs: As for `finalize`.
        dtype: As for `finalize`.
        stacklevel: Of warnings, such that they name the line of the user.

    Returns:
        The model, or the graph that takes its place.
    """
    if dtype is not None:
        model = model.to(dtype)
    model = model.eval()
    chosen = choose_backend(model, backend, stacklevel=stacklevel + 1)
    calls = {} if example_inputs is None else calls_of_layers(model, example_inputs)
    if chosen.name == "cpu":
        calls = of_images_together(calls)
    shapes = {layer: [call.x for call in each] for layer, each in calls.items()}
    timings = Timings.of_machine(chosen.machine)
    regions = find_regions(model)
    passes = lowering_pipeline(chosen, shapes, timings)
    for region in reversed(regions):  # inner ones first, as in finalize
        passes.run_in_place(region.graph_module)
    timings.save()
    lowered = assemble(model, regions).eval()
    if any(map(is_lowered, lowered.modules())):
        lowered = lowered.requires_grad_(False)
    return planned(lowered)


def check_backend(name: str) -> None:
    """Refuse a backend that there is not.

    Raises:
        OptionError: With the names there are.
    """
    if name not in _NAMES:
        raise OptionError(f"backend={name!r}: expected one of {', '.join(map(repr, _NAMES))}.")


def choose_backend(model: nn.Module, name: str, *, stacklevel: int) -> Backend:
    """The backend of that name, on the device of the model.

    Raises:
        OptionError: If there is no such backend, or it cannot run on the model's device.
    """
    check_backend(name)
    device = next((p.device for p in model.parameters()), torch.device("cpu")).type
    asked = name
    if name == "auto":
        name = device if device in ("cpu", "cuda") else "dense"
    elif name not in ("dense", device):
        raise OptionError(
            f"backend={name!r}: expected a model on that device, found one on {device!r}. Move it "
            "there first, or leave the choice to backend='auto'."
        )
    if name == "cuda":
        return CUDABackend()
    if name == "cpu" and engine.load() is None:
        if asked == "cpu":
            warnings.warn(f"backend='cpu': {engine.why_not()}", stacklevel=stacklevel)
        return DenseBackend(f"runs as an ordinary dense layer: {engine.why_not()}")
    return CPUBackend() if name == "cpu" else DenseBackend()


@dataclass(frozen=True)
class LayerCall:
    """The shapes of what a layer is called with, and of what it returns."""

    x: Shape
    y: Shape


@torch.no_grad()
def calls_of_layers(model: nn.Module, example_inputs: Any) -> dict[nn.Module, list[LayerCall]]:
    """The calls of each layer in one run of a model.

    Args:
        model: The model, in evaluation mode.
        example_inputs: What it is called with, or a tuple of its positional arguments. They are
            moved to the device of the model, and to its type where they are floating.

    Raises:
        ModelError: If the model does not run on them.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    inputs = tree_map(lambda value: _like_weights(value, model), inputs)
    found: dict[nn.Module, list[LayerCall]] = defaultdict(list)

    def note(layer: nn.Module, arguments: tuple[Any, ...], y: Any) -> None:
        if arguments and isinstance(arguments[0], Tensor) and isinstance(y, Tensor):
            found[layer].append(LayerCall(tuple(arguments[0].shape), tuple(y.shape)))

    layers = [module for module in model.modules() if isinstance(module, Layer)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        model(*inputs)
    except Exception as error:  # whatever the model's own operations raise
        raise ModelError(
            f"example_inputs: expected what the model can be called with, found "
            f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return dict(found)


def of_images_together(
    calls: Mapping[nn.Module, list[LayerCall]],
) -> dict[nn.Module, list[LayerCall]]:
    """The calls with as many images as a planned graph is likely to run together.

    A layer's choice is right for the batch that it runs on, and its activations are then as likely
    to be in a cache as they were when it was measured. Calls whose batches differ stay as they are.
    """
    every = [call for each in calls.values() for call in each]
    batches = {shape[0] for call in every for shape in (call.x, call.y) if shape}
    if len(batches) != 1 or not all(call.x and call.y for call in every):
        return dict(calls)
    batch = batches.pop()
    weights = [layer.weight for layer in calls if isinstance(layer.weight, Tensor)]
    size = max(weight.itemsize for weight in weights)  # activations are of their type
    images = images_at_a_time(
        batch,
        weights=2 * sum(weight.nbytes for weight in weights),  # with indices, or transformed
        activations=size * sum(prod(call.y) for call in every),
        arena=size * max(prod(call.x) + prod(call.y) for call in every),
    )
    return {
        layer: [LayerCall((images, *call.x[1:]), (images, *call.y[1:])) for call in each]
        for layer, each in calls.items()
    }


def _like_weights(value: Any, model: nn.Module) -> Any:
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if not isinstance(value, Tensor) or weight is None:
        return value
    return value.to(weight.device, weight.dtype if value.is_floating_point() else None)
