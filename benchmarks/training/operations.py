"""A training step by kind of operation, as torch.profiler has it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from training import Training

MASKS = "mask updates"
REST = "rest"
_INPUT_GRADIENT, _WEIGHT_GRADIENT = "conv input gradient", "conv weight gradient"
_STEP = "training step"
_NAMES = {
    "conv forward": ("aten::conv2d", "aten::convolution"),
    _INPUT_GRADIENT: (_INPUT_GRADIENT,),
    _WEIGHT_GRADIENT: (_WEIGHT_GRADIENT,),
    "batch norm forward": ("aten::batch_norm",),
    "batch norm backward": (
        "aten::native_batch_norm_backward",
        "aten::cudnn_batch_norm_backward",
        "aten::batch_norm_backward",
    ),
    "masked weights": (
        "StraightThroughDecay",
        "StraightThroughDecayBackward",
        "spre_fx::mask_weight",
        "spre_fx::mask_weight, backward",
        "spre_fx::decay_gradient",
        "_ProductOfNumbers",
        "_ProductOfNumbersBackward",
        "spre_fx::product_gradients",
        "SRSTEWeight",
        "SRSTEWeightBackward",
    ),
    "elementwise": tuple(
        f"aten::{name}{suffix}"
        for name in ("add", "mul", "relu", "threshold_backward", "where", "copy", "fill", "to")
        for suffix in ("", "_")
    ),
    MASKS: (
        MASKS,
        *(f"spre_fx::{name}" for name in ("nm_mask", "unstructured_mask", "live_taps")),
        *("spre_fx::spre_mask", "_SpReMask", "_SpReMaskBackward", "spre_fx::update_mask"),
        "spre_fx::signal_of_step",
    ),
    "optimizer": ("Optimizer.step#SGD.step", "Optimizer.zero_grad#SGD.zero_grad"),
}
KIND = {name: kind for kind, names in _NAMES.items() for name in names}
# An operator with a gradient shows under the name of what autograd made for it.
_OPERATOR = re.compile(r"(?:GeneratedBackwardFor_)?spre_fx(?:::|_)(\w+?)(?:_default)?(Backward)?")


def measure(training: Training, steps: int, *, split: bool = True) -> dict[str, float]:
    """Milliseconds of a step, by kind of operation; their sum is the step.

    An operation is of the kind of the outermost one around it that has a kind. Operators of this
    library that are not for masks have their own lines. Time in nothing that has a kind, such as
    that of Python, is the rest.

    Args:
        training: Any whose network is not compiled: the profiler does not see into generated code.
        steps: To take the mean of, after one that is not counted.
        split: Compute the two gradients of each conv one after the other, to tell them apart. What
            this takes of Python's time, some 10 us an operation, is in the rest.
    """
    cuda = training.setting.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with ExitStack() as stack:
        stack.enter_context(_marked_masks(training.network))
        if split:
            stack.enter_context(_SplitGradients())  # type: ignore[no-untyped-call]
        training.step()
        profiler = stack.enter_context(profile(activities=activities))
        total = 0.0
        for _ in range(steps):
            with record_function(_STEP):
                total += training.milliseconds()
    return by_kind(profiler.events(), total, steps, cuda=cuda)


def by_kind(
    events: Iterable[FunctionEvent], total: float, steps: int, *, cuda: bool = False
) -> dict[str, float]:
    """Milliseconds of a step, by kind, the longest first, the rest last.

    Args:
        events: Of the profiler.
        total: Milliseconds of all steps.
        steps: How many there were.
        cuda: Whether the device's time counts, of the kernels that each operation launched.
    """
    taken: dict[str, float] = defaultdict(float)
    for event in events:
        kind = _kind(event)
        if kind is not None and event.device_type.name == "CPU":
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            taken[kind] += own / 1e3 / steps
    rest = total / steps - sum(taken.values())
    return dict(sorted(taken.items(), key=lambda item: -item[1])) | {REST: rest}


def _kind(event: FunctionEvent | None) -> str | None:
    found = None
    while event is not None:
        found = kind_of(event.name) or found
        event = event.cpu_parent
    return found


def kind_of(name: str) -> str | None:
    """The kind of an operation, by its name; None if it has none."""
    if operator := _OPERATOR.fullmatch(name):
        name = f"spre_fx::{operator[1]}{', backward' if operator[2] else ''}"
        return KIND.get(name, name)
    return KIND.get(name)


def share(taken: Mapping[str, float], kind: str) -> float:
    """The fraction of the step."""
    return taken.get(kind, 0.0) / sum(taken.values())


@contextmanager
def _marked_masks(network: nn.Module) -> Iterator[None]:
    """Mark what modules compute that make masks, whose operators are not all of this library."""
    open_ranges: list[record_function] = []

    def begin(*_: Any) -> None:
        open_ranges.append(record_function(MASKS))
        open_ranges[-1].__enter__()

    def end(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    with ExitStack() as stack:
        for name, module in network.named_modules():
            if name.rpartition(".")[2] in ("nm_mask", "live_taps"):
                stack.callback(module.register_forward_pre_hook(begin).remove)
                stack.callback(module.register_forward_hook(end).remove)
        yield


class _SplitGradients(TorchDispatchMode):
    """Computes the gradients of a conv one after the other, each in a range of the profile."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not torch.ops.aten.convolution_backward.default:
            return func(*args, **(kwargs or {}))
        *operands, (of_input, of_weight, of_bias) = args
        input_gradient = weight_gradient = bias_gradient = None
        if of_input:
            with record_function(_INPUT_GRADIENT):
                input_gradient, *_ = func(*operands, [True, False, False])
        if of_weight or of_bias:
            with record_function(_WEIGHT_GRADIENT):
                _, weight_gradient, bias_gradient = func(*operands, [False, of_weight, of_bias])
        return input_gradient, weight_gradient, bias_gradient
