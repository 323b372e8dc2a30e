"""Layers with 2:4 weights for sparse tensor cores: a linear, and a conv as a GEMM over patches.

Written against torch 2.11 to 2.15 and tested on the CPU, where the same layers multiply with the
decompressed weight. Nothing here has run on a GPU yet: what it gains there is not known. Run
`benchmarks/gpu/run.py` to see.

A conv is a GEMM over the matrix of its patches in channels_last order. For a 1x1 conv of stride 1
that matrix is the input as it lies in memory; a K x K conv has to write it, K * K times the input.
No open kernel forms the patches in shared memory with a sparse operand (NVIDIA/cutlass#2303): one
would be another `ConvMethod` in `CONV_METHODS`, and every other part of the library would offer,
measure and choose it.

What is saved, pickled and copied is the portable `TwoFour` of `semi_structured`. cuSPARSELt's own
form is kept beside it, 9/16 of the dense weight again, and made anew on each device.

Layers can hold what follows them: `y = activation(layer(x) + bias + residual)`. The libraries add
the bias; the rest are torch's operations, in place, or one kernel under `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spre_fx.errors import ModelError, OptionError
from spre_fx.semi_structured import (
    SHAPE_RULES,
    TwoFour,
    compress,
    decompress,
    filter_matrix,
    filters,
    is_two_four,
    padded_shape,
)
from spre_fx.semi_structured_ops import (
    DEFAULT_ALGORITHM,
    compress_for_cusparselt,
    pad_dense,
    search_algorithm,
    semi_structured_linear,
    why_not,
)

if TYPE_CHECKING:
    from typing_extensions import Self

Pair = tuple[int, int]
Dense = TypeVar("Dense", nn.Linear, nn.Conv2d)

_ACTIVATIONS: Mapping[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda y: y,
    "relu": partial(F.relu, inplace=True),
    "relu6": partial(F.relu6, inplace=True),
    "silu": partial(F.silu, inplace=True),
    "hardswish": partial(F.hardswish, inplace=True),
}


class SemiStructuredLayer(nn.Module):
    """A 2:4 matrix, kept compressed, and how to multiply with it. Base of the two layers.

    Attributes:
        values: See `TwoFour`; of a matrix that is padded with zeros to `padded_shape`.
        metadata: Likewise.
        bias: `(padded out_features,)` or None.
        compressed: The matrix as cuSPARSELt wants it; None on the CPU and for CUTLASS. Not saved.
        library: "cusparselt" or "cutlass".
        algorithm: Of cuSPARSELt.
        activation: What is applied to the output: "relu", "relu6", "silu", "hardswish" or None.

    Raises:
        ModelError: If the library has no rule for the type, or the matrix is not 2:4.
        OptionError: If there is no such library.
    """

    values: Tensor
    metadata: Tensor
    bias: Tensor | None
    compressed: Tensor | None

    def __init__(self, matrix: Tensor, bias: Tensor | None, library: str) -> None:
        super().__init__()
        if library not in SHAPE_RULES:
            raise OptionError(f"library={library!r}: expected one of {', '.join(SHAPE_RULES)}.")
        shape = padded_shape(library, matrix.dtype, (matrix.shape[0], matrix.shape[1]))
        if isinstance(shape, str):
            raise ModelError(f"{shape}.")
        if not is_two_four(matrix):
            raise ModelError(
                "expected a weight with at most two non-zeros in every four consecutive input "
                "channels, found more: train it with a pattern that is 2:4, such as 2:4 or 1:16."
            )
        self.library = library
        self.activation: str | None = None
        self.algorithm = DEFAULT_ALGORITHM
        self._tuned_on = ""
        missing = (shape[0] - matrix.shape[0], shape[1] - matrix.shape[1])
        two_four = compress(F.pad(matrix.detach(), (0, missing[1], 0, missing[0])))
        self.register_buffer("values", two_four.values)
        self.register_buffer("metadata", two_four.metadata)
        padded = None if bias is None else F.pad(bias.detach(), (0, missing[0]))
        self.register_buffer("bias", padded)
        self.register_buffer("compressed", None, persistent=False)
        self._compress()

    def multiply(self, x: Tensor, out_features: int) -> Tensor:
        """`x W^T + b`: `(rows, columns)` to `(rows, out_features)`, contiguous.

        Raises:
            ModelError: If x is of another type, or the library cannot run on its device.
        """
        if x.dtype != self.values.dtype:
            raise ModelError(
                f"expected inputs of {self.values.dtype}, the type the layer was lowered in, found "
                f"{x.dtype}: convert them, or finalize the model in their type."
            )
        if x.is_cuda and self.library == "cusparselt" and self.compressed is None:
            raise ModelError(f"{self._why_not(x.device) or 'the weight was never compressed'}.")
        result: Tensor = semi_structured_linear(
            x,
            self.values,
            self.metadata,
            self.compressed,
            self.bias,
            out_features=out_features,
            algorithm=self.algorithm,
        )
        return result

    def finish(self, y: Tensor, residual: Tensor | None) -> Tensor:
        """`activation(y + residual)`. May write over y."""
        return _ACTIVATIONS[self.activation](y if residual is None else y + residual)

    def matrix(self) -> Tensor:
        """The padded matrix, decompressed."""
        return decompress(TwoFour(self.values, self.metadata))

    def search(self, x: Tensor) -> None:
        """Take the algorithm that is fastest for `(rows, columns)` inputs like x.

        It is used for other numbers of rows, too. CUTLASS has one only. Not to be called while a
        CUDA graph is captured.
        """
        if self.compressed is not None and x.is_cuda:
            dense = pad_dense(x, 2 * self.values.shape[1])
            self.algorithm = search_algorithm(dense, self.compressed, self.bias)
            self._tuned_on = _machine(x.device)

    def _more(self) -> str:
        dtype = str(self.values.dtype).removeprefix("torch.")
        activation = f", activation={self.activation!r}" if self.activation else ""
        return f", library={self.library!r}, dtype={dtype}{activation}"

    def _compress(self) -> None:
        """Make cuSPARSELt's form of the weight where it can be used, and drop it elsewhere."""
        self.compressed = None
        if self.library == "cusparselt" and self.values.is_cuda:
            if self._why_not(self.values.device) is None:
                self.compressed = compress_for_cusparselt(TwoFour(self.values, self.metadata))
            if self._tuned_on != _machine(self.values.device):
                self.algorithm = DEFAULT_ALGORITHM

    def _why_not(self, device: torch.device) -> str | None:
        shape = padded_shape(self.library, self.values.dtype, (1, 1))
        if isinstance(shape, str):
            return shape
        return why_not(self.library, torch.cuda.get_device_capability(device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.compressed = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._compress()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._compress()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_buffers": self._buffers | {"compressed": None}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._compress()


class SemiStructuredLinear(SemiStructuredLayer):
    """`nn.Linear` with a 2:4 weight: `(*, in_features)` to `(*, out_features)`.

    Args:
        weight: `(out_features, in_features)`, float16 or bfloat16.
        bias: `(out_features,)` or None.
        library: "cusparselt" or "cutlass".
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, library: str = "cusparselt") -> None:
        super().__init__(filter_matrix(weight), bias, library)
        self.out_features, self.in_features = weight.shape

    @classmethod
    def from_dense(cls, linear: nn.Linear, library: str = "cusparselt") -> Self:
        """The layer that computes what `linear` does."""
        return cls(linear.weight, linear.bias, library).train(linear.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`activation(x W^T + b + residual)`."""
        y = self.multiply(x.reshape(-1, self.in_features), self.out_features)
        return self.finish(y.view(*x.shape[:-1], self.out_features), residual)

    def tune(self, x: Tensor) -> None:
        """Choose the library's algorithm for inputs like x: `(*, in_features)` on the device."""
        self.search(x.reshape(-1, self.in_features))

    def dense_weight(self) -> Tensor:
        """`(out_features, in_features)`."""
        return filters(self.matrix(), (self.out_features, self.in_features))

    def to_dense(self) -> nn.Linear:
        """The ordinary layer, without the activation."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return _filled(dense, self.dense_weight(), self.bias).train(self.training)

    def extra_repr(self) -> str:
        """What `print` shows between the brackets."""
        return f"{self.in_features}, {self.out_features}{self._more()}"


class SemiStructuredConv2d(SemiStructuredLayer):
    """`nn.Conv2d` with a weight that is 2:4 along its input channels; its result is channels_last.

    Args:
        weight: `(C_out, C_in, kH, kW)`, float16 or bfloat16.
        bias: `(C_out,)` or None.
        stride: Rows and columns.
        padding: Zeros on either side of rows and columns, "same" or "valid".
        dilation: Rows and columns.
        library: "cusparselt" or "cutlass".
        method: A key of `CONV_METHODS`.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        stride: Pair = (1, 1),
        padding: Pair | str = (0, 0),
        dilation: Pair = (1, 1),
        library: str = "cusparselt",
        method: str = "patch matrix",
    ) -> None:
        super().__init__(filter_matrix(weight), bias, library)
        self.out_channels, self.in_channels = weight.shape[:2]
        self.kernel_size: Pair = (weight.shape[2], weight.shape[3])
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.method = method

    @classmethod
    def from_dense(
        cls, conv: nn.Conv2d, library: str = "cusparselt", method: str = "patch matrix"
    ) -> Self:
        """The layer that computes what `conv` does.

        Raises:
            ModelError: If it has groups or pads with anything but zeros.
        """
        refusal = why_no_gemm(conv)
        if refusal is not None:
            raise ModelError(f"{refusal}.")
        layer = cls(
            conv.weight,
            conv.bias,
            stride=_pair(conv.stride),
            padding=conv.padding if isinstance(conv.padding, str) else _pair(conv.padding),
            dilation=_pair(conv.dilation),
            library=library,
            method=method,
        )
        return layer.train(conv.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`activation(conv(x) + bias + residual)`, in channels_last.

        Args:
            x: `(N, C_in, H, W)`, or one sample of it. Best in channels_last.
            residual: What can be added to the `(N, C_out, H', W')` that come out.
        """
        y = CONV_METHODS[self.method].run(self, _batched(x))
        return self.finish(y if x.ndim == 4 else y.squeeze(0), residual)

    def zeros_around(self) -> tuple[Pair, Pair]:
        """The padding at both ends of rows and columns; "same" puts an odd one at the far end."""
        if self.padding == "same":
            spans = zip(self.dilation, self.kernel_size, strict=True)
            rows, columns = (dilation * (size - 1) for dilation, size in spans)
            return (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2)
        rows, columns = (0, 0) if isinstance(self.padding, str) else self.padding
        return (rows, rows), (columns, columns)

    def tune(self, x: Tensor) -> None:
        """Choose the library's algorithm for inputs like x: `(N, C_in, H, W)` on the device."""
        CONV_METHODS[self.method].tune(self, _batched(x))

    def dense_weight(self) -> Tensor:
        """`(C_out, C_in, kH, kW)`."""
        shape = (self.out_channels, self.in_channels, *self.kernel_size)
        return filters(self.matrix(), shape)

    def to_dense(self) -> nn.Conv2d:
        """The ordinary layer, without the activation."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=self.bias is not None,
            device="meta",
        )
        return _filled(conv, self.dense_weight(), self.bias).train(self.training)

    def extra_repr(self) -> str:
        """What `print` shows between the brackets."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding!r}, dilation={self.dilation}, "
            f"method={self.method!r}{self._more()}"
        )


class ConvMethod(Protocol):
    """A way to run a conv with a 2:4 weight."""

    def run(self, layer: SemiStructuredConv2d, x: Tensor) -> Tensor:
        """The conv of `(N, C_in, H, W)`, in channels_last."""
        ...

    def tune(self, layer: SemiStructuredConv2d, x: Tensor) -> None:
        """Fit what can be chosen to inputs like x."""
        ...


class PatchMatrix:
    """A GEMM over the explicit matrix of patches, `(N * H' * W', kH * kW * padded C_in)`."""

    def run(self, layer: SemiStructuredConv2d, x: Tensor) -> Tensor:
        """The conv of `(N, C_in, H, W)`, in channels_last."""
        windows = _windows(layer, x)
        y = layer.multiply(windows.flatten(3).flatten(0, 2), layer.out_channels)
        return y.view(*windows.shape[:3], layer.out_channels).permute(0, 3, 1, 2)

    def tune(self, layer: SemiStructuredConv2d, x: Tensor) -> None:
        """Choose cuSPARSELt's algorithm for as many patches as x has."""
        layer.search(_windows(layer, x).flatten(3).flatten(0, 2))


CONV_METHODS: Mapping[str, ConvMethod] = {"patch matrix": PatchMatrix()}
"""How a conv can run. A hand-written kernel is one more entry."""


def why_no_gemm(conv: nn.Module) -> str | None:
    """Why a layer cannot become a `SemiStructuredConv2d`, or None."""
    if not isinstance(conv, nn.Conv2d) or isinstance(conv.weight, nn.UninitializedParameter):
        return f"sparse GEMMs run Conv2d and Linear, found {type(conv).__name__}"
    if conv.groups != 1:
        return (
            f"a sparse GEMM mixes all input channels, found groups={conv.groups}, each of which "
            "would be a small GEMM of its own"
        )
    if conv.padding_mode != "zeros":
        return f"patches are padded with zeros, found padding_mode={conv.padding_mode!r}"
    return None


def _windows(layer: SemiStructuredConv2d, x: Tensor) -> Tensor:
    """Patches as a view of the padded input: `(N, H', W', kH, kW, padded C_in)`."""
    (top, bottom), (left, right) = layer.zeros_around()
    padding = (0, -layer.in_channels % 4, left, right, top, bottom)
    x = x.permute(0, 2, 3, 1)
    if any(padding):
        x = F.pad(x, padding)
    for axis in (0, 1):
        extent = (layer.kernel_size[axis] - 1) * layer.dilation[axis] + 1
        x = x.unfold(1 + axis, extent, layer.stride[axis])
    rows, columns = layer.dilation
    return x[..., ::rows, ::columns].permute(0, 1, 2, 4, 5, 3)


def _batched(x: Tensor) -> Tensor:
    return x if x.ndim == 4 else x.unsqueeze(0)


def _pair(sizes: tuple[int, ...]) -> Pair:
    rows, columns = sizes
    return rows, columns


def _filled(dense: Dense, weight: Tensor, bias: Tensor | None) -> Dense:
    dense.weight = nn.Parameter(weight)
    if bias is not None:
        dense.bias = nn.Parameter(bias[: weight.shape[0]].clone())
    return dense


def _machine(device: torch.device) -> str:
    """What algorithm numbers depend on."""
    version = torch.backends.cusparselt.version()
    return f"{torch.cuda.get_device_name(device)}, cuSPARSELt {version}"
