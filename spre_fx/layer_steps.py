"""The steps of the engine that packed layers are, and dense convs of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from spre_fx.engine import Kind, Step
from spre_fx.packed_layers import PackedConv2d, PackedLinear
from spre_fx.packed_ops import TYPES
from spre_fx.weight_layout import pack_bias, pack_dense, pack_depthwise


@dataclass(frozen=True, eq=False)
class LayerStep:
    """A step and the constants that it reads, laid out as the engine reads them.

    Attributes:
        step: Its operands are numbered x 0, y 1, weight 2, bias 3 and residual 4.
        weight: The weight.
        bias: The bias, None where the layer has none.
    """

    step: Step
    weight: Tensor
    bias: Tensor | None


def layer_step(layer: nn.Module, x: Tensor, residual: Tensor | None = None) -> LayerStep | None:
    """What the engine does for a layer; None where it has no such step.

    Args:
        layer: A packed layer, or an `nn.Conv2d`.
        x: An input, of which shape and type count.
        residual: Likewise what a packed layer adds to its output.

    Raises:
        ModelError: If x or residual does not fit a packed layer.
    """
    if isinstance(layer, PackedConv2d | PackedLinear):
        if (x.ndim == 4) != isinstance(layer, PackedConv2d):
            return None  # tensors of 4 axes are channels-last to the engine
        return LayerStep(layer.step(x, residual), layer.step_weight(), layer.bias)
    if isinstance(layer, nn.Conv2d) and residual is None:
        return _conv_step(layer, x)
    return None


def window_fields(layer: Any) -> dict[str, int]:
    """The fields of a kernel that slides over an image: of a conv or a pool."""
    found = {}
    for name in ("kernel_size", "stride", "padding", "dilation"):
        field = "kernel" if name == "kernel_size" else name
        found[f"{field}_h"], found[f"{field}_w"] = _pair(getattr(layer, name, 1))
    return found


def _conv_step(conv: nn.Conv2d, x: Tensor) -> LayerStep | None:
    """The step of a dense or depthwise conv; None of one that has groups or dilation."""
    zeros = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1
    dense = conv.groups == 1 and _pair(conv.dilation) == (1, 1)
    fits = x.ndim == 4 and x.dtype == conv.weight.dtype and x.dtype in TYPES
    if not fits or not zeros or not (depthwise or dense):
        return None
    batch, channels, height, width = x.shape
    window = window_fields(conv)
    step = Step(kind=Kind.DEPTHWISE_CONV if depthwise else Kind.DENSE_CONV, **window)
    step.type, step.groups = TYPES[x.dtype], conv.groups if depthwise else 1
    step.x, step.y, step.weight, step.residual = 0, 1, 2, -1
    step.bias = -1 if conv.bias is None else 3
    step.batch, step.height, step.width = batch, height, width
    step.channels = step.x_stride = channels
    step.out_channels = step.y_stride = conv.out_channels
    step.out_height, step.out_width = (
        (side + 2 * window[f"padding_{axis}"] - window[f"dilation_{axis}"] * (kernel - 1) - 1)
        // window[f"stride_{axis}"]
        + 1
        for side, axis, kernel in ((height, "h", step.kernel_h), (width, "w", step.kernel_w))
    )
    weight = (pack_depthwise if depthwise else pack_dense)(conv.weight)
    return LayerStep(step, weight, pack_bias(conv.bias))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
