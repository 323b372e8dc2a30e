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
from spre_fx.liveness import ALIGNMENT
from spre_fx.operators import operator, register_gradient
from spre_fx.weight_layout import (
    Layout,
    layout,
    padded_outputs,
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
TYPES = {torch.float32: Type.FLOAT32, torch.bfloat16: Type.BFLOAT16}

Pair: TypeAlias = tuple[int, int]


class _Layer(NamedTuple):
    """What a layer computes; a linear one is a 1x1 convolution whose pixels lie in a row."""

    linear: bool
    in_channels: int
    out_channels: int
    activation: str | None
    kernel_size: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def memory_format(self) -> torch.memory_format:
        """In which the channels of a pixel lie side by side."""
        return torch.contiguous_format if self.linear else torch.channels_last

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """`(C_out, C_in/groups, kH, kW)`."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def image(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Batch, height and width of what the engine sees of an input or output."""
        return (1, prod(shape[:-1]), 1) if self.linear else (shape[0], shape[2], shape[3])

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of an input of a shape that was checked."""
        if self.linear:
            return (*shape[:-1], self.out_channels)
        sides = zip(
            *(shape[2:], self.kernel_size, self.stride, self.padding, self.dilation), strict=True
        )
        height, width = (
            (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for side, kernel, stride, padding, dilation in sides
        )
        return (shape[0], self.out_channels, height, width)

    def by_torch(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What torch computes, without the activation."""
        if self.linear:
            return F.linear(x, weight.flatten(1), bias)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class _Spec(NamedTuple):
    """What there is to check of a tensor. In a fake call its sizes may be symbols."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Call(NamedTuple):
    """A layer and its operands, but for where they lie in memory."""

    layer: _Layer
    x: _Spec
    weight: _Spec
    bias: _Spec | None
    residual: _Spec | None


class _Plan(NamedTuple):
    """How a call is run. Never changed once made, since threads share it.

    Attributes:
        shape: Of the output.
        steps: None where the engine has no kernel.
        scratch: Bytes.
    """

    shape: tuple[int, ...]
    steps: Program | None
    scratch: int


_Optional: TypeAlias = Tensor | None


def _conv2d(x: Tensor, weight: Tensor, bias: _Optional, residual: _Optional, *how: Any) -> Tensor:
    return _compute(_conv(*how), x, weight, bias, residual)


def _conv2d_fake(
    x: Tensor, weight: Tensor, bias: _Optional, residual: _Optional, *how: Any
) -> Tensor:
    return _fake(_conv(*how), x, weight, bias, residual)


def _linear(x: Tensor, weight: Tensor, bias: _Optional, residual: _Optional, *how: Any) -> Tensor:
    return _compute(_Layer(True, *how), x, weight, bias, residual)


def _linear_fake(
    x: Tensor, weight: Tensor, bias: _Optional, residual: _Optional, *how: Any
) -> Tensor:
    return _fake(_Layer(True, *how), x, weight, bias, residual)


def conv2d_step(x: Tensor, weight: Tensor, bias: _Optional, residual: _Optional, *how: Any) -> Step:
    """What the engine does for `packed_conv2d`, as a step of a program; of tensors, shapes count.

    Raises:
        ModelError: If the operands do not fit the layer.
    """
    call = _call(_conv(*how), x, weight, bias, residual)
    return _step(call, _checked_shape(call))


def linear_step(x: Tensor, weight: Tensor, bias: _Optional, residual: _Optional, *how: Any) -> Step:
    """`conv2d_step` for `packed_linear`."""
    call = _call(_Layer(True, *how), x, weight, bias, residual)
    return _step(call, _checked_shape(call))


def _no_gradient(gradient: Tensor, shape: list[int]) -> Tensor:  # noqa: ARG001
    raise ModelError(
        "a packed layer computes no gradients: train the graph that spre_fx.prepare returns, and "
        "run what spre_fx.finalize returns under torch.inference_mode()."
    )


def _conv(*how: Any) -> _Layer:
    """From the options in the order of the schema, lists made tuples that a cache can look up."""
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, activation = how
    pairs = (tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation))
    return _Layer(False, in_channels, out_channels, activation, *pairs, groups)


def _compute(
    layer: _Layer, x: Tensor, weight: Tensor, bias: _Optional, residual: _Optional
) -> Tensor:
    call = _call(layer, x, weight, bias, residual)
    engine = load() if x.is_cpu else None
    threads = torch.get_num_threads()
    plan = _plan(call, engine, threads)
    if residual is not None and not _fits(residual, x, plan.shape):
        return _added(_compute, layer, (x, weight, bias), residual)
    if engine is None or plan.steps is None:
        return _by_torch(layer, x, weight, bias, residual)
    layout = layer.memory_format
    y = torch.empty(plan.shape, dtype=x.dtype, memory_format=layout)
    if y.numel() == 0:
        return y
    x, weight = x.contiguous(memory_format=layout), aligned(weight)
    residual = None if residual is None else residual.contiguous(memory_format=layout)
    bias = None if bias is None else bias.contiguous()
    scratch = torch.empty(plan.scratch, dtype=torch.uint8)
    buffers = [
        0 if tensor is None else tensor.data_ptr() for tensor in (x, y, weight, bias, residual)
    ]
    engine.run(plan.steps, buffers, scratch.data_ptr(), threads)
    return y


def _fake(layer: _Layer, x: Tensor, weight: Tensor, bias: _Optional, residual: _Optional) -> Tensor:
    shape = _checked_shape(_call(layer, x, weight, bias, residual))
    if residual is not None and not _fits(residual, x, shape):
        return _added(_fake, layer, (x, weight, bias), residual)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layer.memory_format)


def _fits(residual: Tensor, x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a residual needs neither broadcasting nor promotion to be added to the output."""
    return residual.dtype == x.dtype and tuple(residual.shape) == shape


def _added(
    compute: Callable[..., Tensor],
    layer: _Layer,
    operands: tuple[Tensor, Tensor, _Optional],
    residual: Tensor,
) -> Tensor:
    """The layer by itself, then the addition and the activation as torch computes them."""
    y = compute(layer._replace(activation=None), *operands, None)
    activated: Tensor = ACTIVATIONS[layer.activation][1](y + residual)
    return activated


def _by_torch(
    layer: _Layer, x: Tensor, weight: Tensor, bias: _Optional, residual: _Optional
) -> Tensor:
    """From the unpacked weight, in float32, as the engine computes."""
    unpacked = unpack(weight, layer.weight_shape, layer.groups).float()
    if bias is not None:
        bias = unpack_bias(bias, layer.out_channels, layer.groups)
    y = layer.by_torch(x.float(), unpacked, bias)
    if residual is not None:
        y = y + residual
    activated = ACTIVATIONS[layer.activation][1](y)
    return activated.to(x.dtype).contiguous(memory_format=layer.memory_format)


def aligned(weight: Tensor) -> Tensor:
    """The weight, copied if it lies where the engine cannot read it, as in a mapped file."""
    if weight.is_contiguous() and weight.data_ptr() % ALIGNMENT == 0:
        return weight
    return weight.clone(memory_format=torch.contiguous_format)


def _call(layer: _Layer, x: Tensor, weight: Tensor, bias: _Optional, residual: _Optional) -> _Call:
    return _Call(
        layer,
        _Spec(x.shape, x.dtype, x.device),
        _Spec(weight.shape, weight.dtype, weight.device),
        None if bias is None else _Spec(bias.shape, bias.dtype, bias.device),
        None if residual is None else _Spec(residual.shape, residual.dtype, residual.device),
    )


@lru_cache(maxsize=4096)
def _plan(call: _Call, engine: Engine | None, threads: int) -> _Plan:
    """Check a call and plan how it is run.

    Raises:
        ModelError: If the operands do not fit the layer.
    """
    shape = _checked_shape(call)
    step = _step(call, shape)
    if engine is None or not engine.takes(step):
        return _Plan(shape, None, 0)
    steps = program([step])
    return _Plan(shape, steps, engine.scratch(steps, threads))


def _step(call: _Call, shape: tuple[int, ...]) -> Step:
    layer = call.layer
    step = Step(kind=Kind.SPARSE_CONV, type=TYPES[call.x.dtype])
    step.x, step.y, step.weight = 0, 1, 2
    step.bias = -1 if call.bias is None else 3
    step.residual = -1 if call.residual is None else 4
    step.x_stride = step.channels = layer.in_channels
    step.y_stride = step.residual_stride = step.out_channels = layer.out_channels
    step.batch, step.height, step.width = layer.image(call.x.shape)
    _, step.out_height, step.out_width = layer.image(shape)
    step.kernel_h, step.kernel_w = layer.kernel_size
    step.stride_h, step.stride_w = layer.stride
    step.padding_h, step.padding_w = layer.padding
    step.dilation_h, step.dilation_w = layer.dilation
    step.groups = layer.groups
    step.activation = ACTIVATIONS[layer.activation][0]
    step.slots, step.channel_group, step.parts, step.planar = _layout(call)
    return step


def _layout(call: _Call) -> Layout:
    layer = call.layer
    return layout(tuple(call.weight.shape), layer.weight_shape, layer.groups, call.x.dtype)


def _checked_shape(call: _Call) -> tuple[int, ...]:
    """The shape of the output, if the operands fit the layer.

    Raises:
        ModelError: If they do not.
    """
    _check_input(call)
    shape = call.layer.output_shape(call.x.shape)
    _check_output(call, shape)
    _check_bias(call)
    _layout(call)
    if call.layer.activation not in ACTIVATIONS:
        names = ", ".join(str(name) for name in ACTIVATIONS)
        raise ModelError(f"expected an activation of {names}, found {call.layer.activation!r}.")
    return shape


def _check_input(call: _Call) -> None:
    layer, x, weight = call.layer, call.x, call.weight
    rank = len(x.shape)
    fits = rank >= 1 if layer.linear else rank == 4
    if not fits or x.shape[-1 if layer.linear else 1] != layer.in_channels:
        expected = f"..., {layer.in_channels}" if layer.linear else f"N, {layer.in_channels}, H, W"
        raise ModelError(f"expected an input of shape ({expected}), found {tuple(x.shape)}.")
    dtype = weight_dtype(weight.dtype)
    if x.dtype != dtype:
        raise ModelError(
            f"expected an input of {dtype}, the type of the packed weight, found {x.dtype}: "
            "convert it, or choose the type of the model with spre_fx.finalize(..., dtype=...)."
        )
    for operand in (weight, call.bias, call.residual):
        if operand is not None and operand.device != x.device:
            raise ModelError(
                f"expected the input and all of the layer on one device, found {x.device} and "
                f"{operand.device}."
            )


def _check_output(call: _Call, shape: tuple[int, ...]) -> None:
    layer, x = call.layer, call.x
    # Not asked of symbols: torch.export would narrow the sizes that it was told of.
    sides = [] if layer.linear else [side for side in shape[2:] if isinstance(side, int)]
    if min(sides, default=1) < 1:
        raise ModelError(
            f"expected an input that a kernel of {layer.kernel_size} with padding {layer.padding} "
            f"and dilation {layer.dilation} fits in, found {tuple(x.shape)}."
        )


def _check_bias(call: _Call) -> None:
    outputs, bias = padded_outputs(call.layer.out_channels, call.layer.groups), call.bias
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (outputs,)):
        raise ModelError(
            f"expected a packed bias of {outputs} float32 numbers, found {bias.dtype} of shape "
            f"{tuple(bias.shape)}."
        )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.shape, ctx.others = inputs[0].shape, len(inputs) - 1


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Refuse, in an operator: a compiled model raises when it is run backward, not compiled."""
    refused: Tensor = torch.ops.spre_fx.packed_backward(gradient, ctx.shape)
    return (refused, *(None,) * ctx.others)


_OPERANDS = "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, "
_OPERATORS: dict[str, tuple[str, Callable[..., Tensor], Callable[..., Tensor]]] = {
    "packed_conv2d": (
        f"({_OPERANDS} int in_channels, int out_channels, int[2] kernel_size, int[2] stride, "
        "int[2] padding, int[2] dilation, int groups, str? activation) -> Tensor",
        _conv2d,
        _conv2d_fake,
    ),
    "packed_linear": (
        f"({_OPERANDS} int in_channels, int out_channels, str? activation) -> Tensor",
        _linear,
        _linear_fake,
    ),
    "packed_backward": (
        "(Tensor gradient, SymInt[] shape) -> Tensor",
        _no_gradient,
        torch.Tensor.new_empty,
    ),
}
for _name, (_schema, _function, _fake_function) in _OPERATORS.items():
    operator(_name, fake=_fake_function, schema=_schema)(_function)
for _name in ("packed_conv2d", "packed_linear"):
    register_gradient(_name, _backward, _setup_context)
