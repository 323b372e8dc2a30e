"""Layers with packed N:M weights, which the engine runs faster than dense ones on CPUs.

They take the place of `nn.Conv2d` and `nn.Linear` in a deployed model, and can hold what follows
them there: `y = activation(layer(x) + bias + residual)`. The weight is packed once, in its type,
which no `.to(dtype)` changes. There is no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from spre_fx.engine import Kind, Step
from spre_fx.errors import ModelError, OptionError
from spre_fx.packed_ops import ACTIVATIONS, Pair, conv2d_step, linear_step
from spre_fx.weight_layout import (
    Layout,
    channels_below,
    layout,
    pack,
    pack_bias,
    packable,
    unpack,
    unpack_bias,
    weight_dtype,
)
from spre_fx.winograd_filters import filters_of, winograd_refusal

if TYPE_CHECKING:
    from typing_extensions import Self

_Dense = TypeVar("_Dense", nn.Conv2d, nn.Linear)


def refusal(layer: nn.Module) -> str | None:
    """Why a layer cannot be packed, in a sentence without its name; None where it can be."""
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return f"expected an nn.Conv2d or nn.Linear, found {type(layer).__name__}."
    if not packable(layer.weight.dtype):
        return f"expected a weight of float32 or bfloat16, found {layer.weight.dtype}."
    if not isinstance(layer, nn.Conv2d):
        return None
    if layer.padding_mode != "zeros":
        return f"expected padding with zeros, found padding_mode={layer.padding_mode!r}."
    if _padding(layer) is None:
        return (
            "expected as much padding on either side, found padding='same' with a kernel of "
            f"{layer.kernel_size} and dilation {layer.dilation}."
        )
    return None


class _Packed(nn.Module):
    """What packed layers share.

    Attributes:
        packed: The weight, as `weight_layout.pack` packs it.
        bias: As `weight_layout.pack_bias` pads it, float32; or None.
        in_channels: Of the input, all groups together.
        out_channels: Of the output, all groups together.
        kernel_size: Height and width; 1 and 1 of a linear layer.
        groups: Of the channels.
        activation: What is applied to the output: "relu", "relu6", "silu", "hardswish" or None.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        groups: int,
        activation: str | None,
        planar: bool = False,
        quartered: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            names = ", ".join(str(name) for name in ACTIVATIONS)
            raise OptionError(f"expected an activation of {names}, found {activation!r}.")
        self.register_buffer("packed", pack(weight, groups, planar=planar, quartered=quartered))
        self.register_buffer("bias", pack_bias(bias, groups))
        self.out_channels = weight.shape[0]
        self.in_channels = weight.shape[1] * groups
        self.kernel_size: Pair = (weight.shape[2], weight.shape[3])
        self.groups = groups
        self.activation = activation

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weight, and so of inputs and outputs: float32 or bfloat16."""
        return weight_dtype(self.packed.dtype)

    @property
    def layout(self) -> Layout:
        """How the weight is packed."""
        return layout(tuple(self.packed.shape), self._weight_shape(), self.groups, self.dtype)

    @property
    def slots(self) -> int:
        """Slots of each output in each channel group at each tap: its share of the work."""
        return self.layout.slots

    @property
    def channel_group(self) -> int:
        """Input channels that are looked at together: 16 or 32."""
        return self.layout.channel_group

    def dense_weight(self) -> Tensor:
        """The weight that was packed, `(C_out, C_in/groups, kH, kW)`, bit for bit but for -0.0."""
        return unpack(self.packed, self._weight_shape(), self.groups)

    @property
    def weight(self) -> Tensor:
        """The weight of the dense layer, unpacked each time it is asked for."""
        return self.dense_weight()

    def dense_bias(self) -> Tensor | None:
        """The bias, `(C_out,)`, in the type of the weight; or None."""
        if self.bias is None:
            return None
        return unpack_bias(self.bias, self.out_channels, self.groups).to(self.dtype)

    def extra_repr(self) -> str:
        """What `print` shows between the brackets."""
        parts = [f"{self.in_channels}, {self.out_channels}", *self._options()]
        parts += [f"slots={self.slots}", f"dtype={str(self.dtype).removeprefix('torch.')}"]
        parts += ["planar=True"] * self.layout.planar
        parts += ["quartered=True"] * self.layout.quartered
        parts += ["bias=False"] * (self.bias is None)
        parts += [f"activation={self.activation!r}"] * (self.activation is not None)
        return ", ".join(parts)

    def _options(self) -> list[str]:
        return []

    def _weight_shape(self) -> tuple[int, int, int, int]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load, refusing a damaged weight: the engine reads whatever channels it names."""
        packed = state_dict.get(f"{prefix}packed")
        if packed is not None and not channels_below(packed, self.channel_group):
            errors: list[str] = rest[-1]
            errors.append(f"{prefix}packed is damaged: it names channels outside of their group.")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the buffers; the bias stays float32, whatever type the rest of a model takes."""
        bias = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if bias is not None and self.bias is not None and self.bias.dtype != bias.dtype:
            self.bias = bias.to(self.bias.device)
        return self


class PackedConv2d(_Packed):
    """An N:M convolution with a packed weight.

    Args:
        weight: `(C_out, C_in/groups, kH, kW)`, float32 or bfloat16.
        bias: `(C_out,)` or None.
        stride: Height and width, like the next two.
        padding: Zeros on either side.
        dilation: Between taps.
        groups: Of the channels.
        activation: "relu", "relu6", "silu", "hardswish" or None.
        planar: Whether the weight is packed for kernels that take neighbouring pixels together,
            rather than outputs; of float32.
        quartered: Whether it is packed for kernels that shuffle bytes, where its non-zeros allow
            it.
        winograd: Outputs on a side of the tiles, 2 or 4, in which a planned graph computes the
            dense convolution by Winograd's minimal filtering; 0: it computes the non-zeros. Calls
            of the layer itself always do that. An infinity or NaN reaches all outputs of the tiles
            that read it. `winograd_refusal` says which convolutions it is for.

    Raises:
        ModelError: If the weight is of another type, or Winograd's filtering is not for it.
        OptionError: If there is no such activation, or no tiles of such a side.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        groups: int = 1,
        activation: str | None = None,
        planar: bool = False,
        quartered: bool = False,
        winograd: int = 0,
    ) -> None:
        super().__init__(
            weight,
            bias,
            groups=groups,
            activation=activation,
            planar=planar,
            quartered=quartered,
        )
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.winograd = winograd
        if winograd not in (0, 2, 4):
            raise OptionError(f"expected winograd to be 0, 2 or 4, found {winograd!r}.")
        if winograd and (reason := winograd_refusal(self)) is not None:
            raise ModelError(f"Winograd's filtering cannot compute the layer: {reason}")

    @classmethod
    def from_dense(
        cls,
        conv: nn.Conv2d,
        *,
        planar: bool = False,
        quartered: bool = False,
        winograd: int = 0,
    ) -> PackedConv2d:
        """Pack a convolution, which is left as it is.

        Raises:
            ModelError: If it cannot be packed, or computed as asked; `refusal` and
                `winograd_refusal` say so beforehand.
        """
        if (reason := refusal(conv)) is not None or (padding := _padding(conv)) is None:
            raise ModelError(f"the layer cannot be packed: {reason}")
        return cls(
            conv.weight,
            conv.bias,
            stride=_pair(conv.stride),
            padding=padding,
            dilation=_pair(conv.dilation),
            groups=conv.groups,
            planar=planar,
            quartered=quartered,
            winograd=winograd,
        )

    def to_dense(self) -> nn.Conv2d:
        """The convolution alone, without the activation, as a dense layer of torch."""
        conv: nn.Conv2d = nn.utils.skip_init(
            nn.Conv2d,
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias is not None,
            dtype=self.dtype,
            device=self.packed.device,
        )
        return _filled(conv, self.dense_weight(), self.dense_bias())

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`activation(conv(x) + bias + residual)`, channels-last.

        Args:
            x: `(N, C_in, H, W)` of any strides; channels-last is not copied.
            residual: As the output: `(N, C_out, H_out, W_out)`.

        Raises:
            ModelError: If x or residual is of another shape or type.
        """
        operands = (x, self.packed, self.bias, residual)
        y: Tensor = torch.ops.spre_fx.packed_conv2d.default(*operands, *self._how())
        return y

    def step(self, x: Tensor, residual: Tensor | None = None) -> Step:
        """What `forward` does, as a step of a program; only the shapes of the tensors count."""
        step = conv2d_step(x, self.packed, self.bias, residual, *self._how())
        if self.transforms:
            step.kind, step.winograd = Kind.WINOGRAD_CONV, self.winograd
        return step

    @property
    def transforms(self) -> bool:
        """Whether `step` reads transformed filters.

        Of an inference tensor none are made: nobody could tell when it changes.
        """
        return self.winograd != 0 and not self.packed.is_inference()

    def step_weight(self) -> Tensor:
        """The weight that `step` reads: the packed one, or what was made of it as it is now."""
        return filters_of(self) if self.transforms else self.packed

    def _how(self) -> tuple[Any, ...]:
        return (
            *(self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding),
            *(self.dilation, self.groups, self.activation),
        )

    def _options(self) -> list[str]:
        options = [f"kernel_size={self.kernel_size}", f"stride={self.stride}"]
        options += [f"padding={self.padding}"] * (self.padding != (0, 0))
        options += [f"dilation={self.dilation}"] * (self.dilation != (1, 1))
        options += [f"groups={self.groups}"] * (self.groups != 1)
        return options + [f"winograd={self.winograd}"] * (self.winograd != 0)


class PackedLinear(_Packed):
    """An N:M linear layer with a packed weight.

    Args:
        weight: `(C_out, C_in)`, float32 or bfloat16.
        bias: `(C_out,)` or None.
        activation: "relu", "relu6", "silu", "hardswish" or None.
        quartered: Whether the weight is packed for kernels that shuffle bytes, where its non-zeros
            allow it.

    Raises:
        ModelError: If the weight is of another type.
        OptionError: If there is no such activation.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        activation: str | None = None,
        quartered: bool = False,
    ) -> None:
        weight = weight[:, :, None, None]
        super().__init__(weight, bias, groups=1, activation=activation, quartered=quartered)

    @classmethod
    def from_dense(cls, linear: nn.Linear, *, quartered: bool = False) -> PackedLinear:
        """Pack a linear layer, which is left as it is.

        Raises:
            ModelError: If it cannot be packed; `refusal` says so beforehand.
        """
        if (reason := refusal(linear)) is not None:
            raise ModelError(f"the layer cannot be packed: {reason}")
        return cls(linear.weight, linear.bias, quartered=quartered)

    @property
    def weight(self) -> Tensor:
        """The weight of the dense layer, `(C_out, C_in)`, unpacked each time it is asked for."""
        return self.dense_weight().flatten(1)

    def to_dense(self) -> nn.Linear:
        """The linear layer alone, without the activation, as a dense layer of torch."""
        linear: nn.Linear = nn.utils.skip_init(
            nn.Linear,
            self.in_channels,
            self.out_channels,
            bias=self.bias is not None,
            dtype=self.dtype,
            device=self.packed.device,
        )
        return _filled(linear, self.weight, self.dense_bias())

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`activation(linear(x) + bias + residual)`.

        Args:
            x: `(..., C_in)`.
            residual: As the output: `(..., C_out)`.

        Raises:
            ModelError: If x or residual is of another shape or type.
        """
        how = (self.in_channels, self.out_channels, self.activation)
        operands = (x, self.packed, self.bias, residual)
        y: Tensor = torch.ops.spre_fx.packed_linear.default(*operands, *how)
        return y

    def step(self, x: Tensor, residual: Tensor | None = None) -> Step:
        """What `forward` does, as a step of a program; only the shapes of the tensors count."""
        how = (self.in_channels, self.out_channels, self.activation)
        return linear_step(x, self.packed, self.bias, residual, *how)

    def step_weight(self) -> Tensor:
        """The weight that `step` reads."""
        return self.packed


def _padding(conv: nn.Conv2d) -> Pair | None:
    """Zeros on either side of height and width; None where the two sides differ."""
    if not isinstance(conv.padding, str):
        return _pair(conv.padding)
    if conv.padding == "valid":
        return 0, 0
    sides = zip(conv.dilation, conv.kernel_size, strict=True)
    height, width = (dilation * (kernel - 1) for dilation, kernel in sides)
    return None if height % 2 or width % 2 else (height // 2, width // 2)


def _pair(values: tuple[int, ...]) -> Pair:
    return values[0], values[1]


def _filled(layer: _Dense, weight: Tensor, bias: Tensor | None) -> _Dense:
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer.eval()
