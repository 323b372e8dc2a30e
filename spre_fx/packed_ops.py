"""The operators of packed layers: `spre_fx::packed_conv2d` and `spre_fx::packed_linear`.

Both compute `activation(layer(x) + bias + residual)` from a weight that `weight_layout.pack` packed
and a bias that `weight_layout.pack_bias` padded. On the CPU the engine runs them on torch's
threads. Where there is no engine, or it has no kernel for a step, the weight is unpacked and torch
computes the same, sums in float32 rounded once. There is no gradient through them.

Importing this module registers them; so it must be imported before a program that holds them, such
as one of `torch.export.load`, is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from spre_fx.engine import Activation, Engine, Kind, Program, Step, Type, load, program
from spre_fx.errors import ModelError
from spre_fx.weight_layout import (
    padded_outputs,
    slots_and_channel_group,
    unpack,
    unpack_bias,
    weight_dtype,
)

ACTIVATIONS: dict[str | None, tuple[Activation, Callable[[Tensor], Tensor]]] = {
    None: (Activation.IDENTITY, lambda y: y),
    "relu": (Activation.RELU, F.relu),
    "relu6": (Activation.RELU6, F.relu6),
    "silu": (Activation.SILU, F.silu),
    "hardswish": (Activation.HARDSWISH, F.hardswish),
}
_TYPES = {torch.float32: Type.FLOAT32, torch.bfloat16: Type.BFLOAT16}
_ALIGNMENT = 64  # bytes, of packed weights and of scratch

Pair: TypeAlias = tuple[int, int]


class _Conv(NamedTuple):
    """What a convolution computes; a linear layer is a 1x1 convolution of pixels."""

    in_channels: int
    out_channels: int
    kernel_size: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    activation: str | None = None

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """`(C_out, C_in/groups, kH, kW)`."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def output_size(self, height: int, width: int) -> Pair:
        """Height and width of the output."""
        sides = zip(
            *((height, width), self.kernel_size, self.stride, self.padding, self.dilation),
            strict=True,
        )
        out_height, out_width = (
            (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for side, kernel, stride, padding, dilation in sides
        )
        return out_height, out_width


class _Operands(NamedTuple):
    """The tensors of one call."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None


class _Call(NamedTuple):
    """All that a one-step program depends on, but for the addresses."""

    conv: _Conv
    dtype: torch.dtype
    sizes: tuple[int, int, int]  # batch, height and width of the input
    packed: tuple[int, ...]  # the shape of the packed weight
    bias: bool
    residual: bool


class _Planned(NamedTuple):
    """A program, never changed once made, and the bytes of scratch that it needs."""

    steps: Program
    scratch: int


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    **options: Any,
) -> Tensor:
    conv = _conv(**options)
    y = _empty_conv2d(conv, _Operands(x, weight, bias, residual))
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    operands = _Operands(x, weight, bias, residual)
    if _run(conv, (x.shape[0], x.shape[2], x.shape[3]), operands, y):
        return y
    unpacked, unpacked_bias = _unpacked(conv, operands)
    y = F.conv2d(x.float(), unpacked, unpacked_bias, *conv[3:7])
    return _epilogue(y, conv, operands).contiguous(memory_format=torch.channels_last)


def _conv2d_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    **options: Any,
) -> Tensor:
    return _empty_conv2d(_conv(**options), _Operands(x, weight, bias, residual))


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    **options: Any,
) -> Tensor:
    linear = _Conv(**options)
    y = _empty_linear(linear, _Operands(x, weight, bias, residual))
    residual = None if residual is None else residual.contiguous()
    operands = _Operands(x.contiguous(), weight, bias, residual)
    if _run(linear, (1, prod(x.shape[:-1]), 1), operands, y):
        return y
    unpacked, unpacked_bias = _unpacked(linear, operands)
    y = F.linear(x.float(), unpacked.flatten(1), unpacked_bias)
    return _epilogue(y, linear, operands).contiguous()


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    **options: Any,
) -> Tensor:
    return _empty_linear(_Conv(**options), _Operands(x, weight, bias, residual))


def _conv(
    *,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    **options: Any,
) -> _Conv:
    """The options of an operator, without lists, which no cache can look up."""
    return _Conv(
        kernel_size=(kernel_size[0], kernel_size[1]),
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
        **options,
    )


def _empty_conv2d(conv: _Conv, operands: _Operands) -> Tensor:
    """Check the operands and allocate the output, channels-last."""
    x = operands.x
    if x.ndim != 4 or x.shape[1] != conv.in_channels:
        raise ModelError(
            f"expected an input of shape (N, {conv.in_channels}, H, W), found {tuple(x.shape)}."
        )
    size = conv.output_size(x.shape[2], x.shape[3])
    # Not asked of symbols: torch.export would narrow the sizes that it was told of.
    if any(isinstance(side, int) and side < 1 for side in size):
        raise ModelError(
            f"expected an input that a kernel of {conv.kernel_size} with padding {conv.padding} "
            f"and dilation {conv.dilation} fits in, found {tuple(x.shape)}."
        )
    shape = (x.shape[0], conv.out_channels, *size)
    _check(conv, operands, shape)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _empty_linear(linear: _Conv, operands: _Operands) -> Tensor:
    """Check the operands and allocate the output."""
    x = operands.x
    if x.ndim == 0 or x.shape[-1] != linear.in_channels:
        raise ModelError(
            f"expected an input of shape (..., {linear.in_channels}), found {tuple(x.shape)}."
        )
    shape = (*x.shape[:-1], linear.out_channels)
    _check(linear, operands, shape)
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def _check(conv: _Conv, operands: _Operands, shape: tuple[int, ...]) -> None:
    """Check types, and the operands that are as large as the output or its channels."""
    x, weight, bias, residual = operands
    if x.dtype != weight_dtype(weight):
        raise ModelError(
            f"expected an input of {weight_dtype(weight)}, the type of the packed weight, found "
            f"{x.dtype}: convert the input, or choose another type for the model with "
            "spre_fx.finalize(..., dtype=...)."
        )
    if conv.activation not in ACTIVATIONS:
        names = ", ".join(str(name) for name in ACTIVATIONS)
        raise ModelError(f"expected an activation of {names}, found {conv.activation!r}.")
    outputs = padded_outputs(conv.out_channels, conv.groups)
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (outputs,)):
        raise ModelError(
            f"expected a packed bias of {outputs} float32 numbers, found {bias.dtype} of shape "
            f"{tuple(bias.shape)}."
        )
    if residual is not None and (residual.dtype != x.dtype or residual.shape != shape):
        raise ModelError(
            f"expected a residual of {x.dtype} with the shape of the output, {shape}, found "
            f"{residual.dtype} of shape {tuple(residual.shape)}."
        )


def _run(conv: _Conv, sizes: tuple[int, int, int], operands: _Operands, y: Tensor) -> bool:
    """Run a layer on the engine, or say that it cannot.

    Args:
        conv: The layer.
        sizes: Batch, height and width of the input.
        operands: What `_check` has seen, x and residual channels-last.
        y: Where the output goes, channels-last.
    """
    x, weight, bias, residual = operands
    engine = load() if x.is_cpu else None
    if engine is None:
        return False
    threads = torch.get_num_threads()
    call = _Call(conv, x.dtype, sizes, tuple(weight.shape), bias is not None, residual is not None)
    planned = _plan(engine, call, threads)
    if planned is None:
        return False
    if y.numel() == 0:
        return True
    weight = _aligned(weight)
    scratch = torch.empty(planned.scratch + _ALIGNMENT, dtype=torch.uint8)
    buffers = [
        0 if tensor is None else tensor.data_ptr() for tensor in (x, y, weight, bias, residual)
    ]
    engine.run(planned.steps, buffers, -scratch.data_ptr() // _ALIGNMENT * -_ALIGNMENT, threads)
    return True


@lru_cache(maxsize=4096)
def _plan(engine: Engine, call: _Call, threads: int) -> _Planned | None:
    """The program of a call, or None where the engine has no kernel for it.

    Raises:
        ModelError: If the packed weight is not one of such a layer.
    """
    step = _step(call)
    if not engine.takes(step):
        return None
    steps = program([step])
    return _Planned(steps, engine.scratch(steps, threads))


def _step(call: _Call) -> Step:
    conv = call.conv
    slots, channel_group = slots_and_channel_group(
        call.packed, conv.weight_shape, conv.groups, call.dtype
    )
    batch, height, width = call.sizes
    out_height, out_width = conv.output_size(height, width)
    step = Step(kind=Kind.SPARSE_CONV, type=_TYPES[call.dtype])
    step.x, step.x_stride = 0, conv.in_channels
    step.y, step.y_stride = 1, conv.out_channels
    step.weight = 2
    step.bias = 3 if call.bias else -1
    step.residual, step.residual_stride = 4 if call.residual else -1, conv.out_channels
    step.batch, step.height, step.width, step.channels = batch, height, width, conv.in_channels
    step.out_height, step.out_width = out_height, out_width
    step.out_channels = conv.out_channels
    step.kernel_h, step.kernel_w = conv.kernel_size
    step.stride_h, step.stride_w = conv.stride
    step.padding_h, step.padding_w = conv.padding
    step.dilation_h, step.dilation_w = conv.dilation
    step.groups = conv.groups
    step.activation = ACTIVATIONS[conv.activation][0]
    step.slots, step.channel_group = slots, channel_group
    return step


def _aligned(weight: Tensor) -> Tensor:
    """The weight, copied if it lies where the engine cannot read it, as in a mapped file."""
    if weight.is_contiguous() and weight.data_ptr() % _ALIGNMENT == 0:
        return weight
    return weight.clone(memory_format=torch.contiguous_format)


def _unpacked(conv: _Conv, operands: _Operands) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in float32, for torch."""
    weight = unpack(operands.weight, conv.weight_shape, conv.groups).float()
    if operands.bias is None:
        return weight, None
    return weight, unpack_bias(operands.bias, conv.out_channels, conv.groups)


def _epilogue(y: Tensor, conv: _Conv, operands: _Operands) -> Tensor:
    """`activation(y + residual)` in the type of the input."""
    if operands.residual is not None:
        y = y + operands.residual
    activated: Tensor = ACTIVATIONS[conv.activation][1](y)
    return activated.to(operands.x.dtype)


def _no_gradient(gradient: Tensor, shape: list[int]) -> Tensor:  # noqa: ARG001
    raise ModelError(
        "a packed layer computes no gradients: train the graph that spre_fx.prepare returns, and "
        "run what spre_fx.finalize returns under torch.inference_mode()."
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], **_: Any) -> None:
    ctx.shape = inputs[0].shape


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    """Refuse, in an operator: a compiled model raises when it is run backward, not compiled."""
    refused = torch.ops.spre_fx.packed_backward(gradient, ctx.shape)
    return refused, None, None, None


_LIBRARY = torch.library.Library("spre_fx", "FRAGMENT")
_OPERANDS = "Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, *"
_OPERATORS: dict[str, tuple[str, Callable[..., Tensor], Callable[..., Tensor]]] = {
    "packed_conv2d": (
        f"({_OPERANDS}, int in_channels, int out_channels, int[2] kernel_size, int[2] stride, "
        "int[2] padding, int[2] dilation, int groups, str? activation) -> Tensor",
        _conv2d,
        _conv2d_fake,
    ),
    "packed_linear": (
        f"({_OPERANDS}, int in_channels, int out_channels, str? activation) -> Tensor",
        _linear,
        _linear_fake,
    ),
    "packed_backward": (
        "(Tensor gradient, SymInt[] shape) -> Tensor",
        _no_gradient,
        torch.Tensor.new_empty,
    ),
}
for _name, (_schema, _compute, _fake) in _OPERATORS.items():
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, _compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spre_fx::{_name}", _fake, lib=_LIBRARY)
for _name in ("packed_conv2d", "packed_linear"):
    torch.library.register_autograd(
        f"spre_fx::{_name}", _backward, setup_context=_setup_context, lib=_LIBRARY
    )
