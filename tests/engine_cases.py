"""Random steps of the engine, each with what torch computes in float64, for tests and sanitizers.

As a program, `engine_cases.py DIRECTORY ISA COUNT` runs so many cases of each kind on the library
`_ISA.so` of a directory.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from spre_fx import weight_layout
from spre_fx.engine import PLANE_SLACK, Activation, Engine, Kind, Step, Type, library, program

PAGE = mmap.PAGESIZE
UNTOUCHED = 0x5A  # what every byte is that no step may write
THREADS = (1, 2, 3)
TYPES = {torch.float32: Type.FLOAT32, torch.bfloat16: Type.BFLOAT16}
ACTIVATIONS = {
    Activation.IDENTITY: lambda x: x,
    Activation.RELU: F.relu,
    Activation.RELU6: F.relu6,
    Activation.SILU: F.silu,
    Activation.HARDSWISH: F.hardswish,
}


class Fenced:
    """Bytes that end where a page begins that nothing can read or write.

    A read or write behind the last byte ends the process; one before the first byte is found by
    `intact`.
    """

    def __init__(self, size: int) -> None:
        start = -(-size // PAGE) * PAGE + PAGE
        self._map = mmap.mmap(-1, start + PAGE)
        self._front = start - size
        whole = torch.frombuffer(self._map, dtype=torch.uint8, count=start).fill_(UNTOUCHED)
        self.bytes = whole[self._front :]
        self.address = self.bytes.data_ptr()
        end = ctypes.c_void_p(self.address + size)
        assert ctypes.CDLL(None).mprotect(end, ctypes.c_size_t(PAGE), 0) == 0
        self._before = whole[: self._front]

    def intact(self) -> bool:
        return bool((self._before == UNTOUCHED).all())


def fenced(tensor: Tensor) -> Fenced:
    memory = Fenced(tensor.numel() * tensor.element_size())
    memory.bytes.copy_(tensor.contiguous().view(-1).view(torch.uint8))
    return memory


@dataclass
class Pixels:
    """A channels-last tensor whose pixels lie `stride` elements apart, behind `offset` of them.

    Or one in planes that far apart. What lies between and before is NaN, so that reading it shows.
    """

    values: Tensor  # (N, C, H, W)
    stride: int
    offset: int
    planes: bool = False
    memory: Fenced = field(init=False)

    def __post_init__(self) -> None:
        n, c, h, w = self.values.shape
        pixels = n * h * w
        used = n * c * self.stride if self.planes else (pixels - 1) * self.stride + c
        size = self.offset + used
        elements = torch.full((size,), float("nan"), dtype=self.values.dtype)
        self.place(elements).copy_(self.values)
        self.memory = fenced(elements)

    def place(self, elements: Tensor) -> Tensor:
        n, c, h, w = self.values.shape
        strides = (h * w * self.stride, 1, w * self.stride, self.stride)
        if self.planes:
            strides = (c * self.stride, self.stride, w, 1)
        return elements[self.offset :].as_strided((n, c, h, w), strides)

    def read(self) -> Tensor:
        return self.place(self.memory.bytes.view(self.values.dtype)).clone()

    def others(self) -> Tensor:
        """The bytes that belong to no pixel, nor are anyone's."""
        elements = self.memory.bytes.clone().view(self.values.dtype)
        self.place(elements).zero_()
        if self.planes:
            n, c, h, w = self.values.shape
            behind = elements[self.offset + h * w :]
            behind.as_strided((n * c, PLANE_SLACK), (self.stride, 1)).zero_()
        return elements.view(torch.uint8)


@dataclass
class Case:
    """A step, what it reads and writes, and what it should write, in float64.

    Attributes:
        size: The largest of the sums that the activation has yet to bound.
    """

    step: Step
    x: Pixels
    y: Pixels
    expected: Tensor
    size: float
    residual: Pixels | None = None
    weight: Fenced | None = None
    bias: Fenced | None = None

    def run(self, engine: Engine, threads: int) -> None:
        """Run the step and compare.

        Raises:
            AssertionError: If something else was written, or elsewhere.
        """
        memories = [self.x.memory, self.y.memory]
        memories += [m for m in (self.weight, self.bias) if m is not None]
        if self.residual is not None and self.residual is not self.y:
            memories.append(self.residual.memory)
        inputs = [m.bytes.clone() for m in memories]
        others = self.y.others()
        steps = program([self.step])
        scratch = Fenced(-(-engine.scratch(steps, threads) // 64) * 64)
        engine.run(steps, self.addresses(), scratch.address, threads)
        for memory, before in zip(memories, inputs, strict=True):
            assert memory.intact()
            assert memory is self.y.memory or torch.equal(memory.bytes, before)
        assert scratch.intact()
        assert torch.equal(self.y.others(), others), "written beside the pixels of y"
        close(self.y.read(), self.expected, self.size)

    def addresses(self) -> list[int]:
        residual = self.y if self.residual is None else self.residual
        operands = (self.x.memory, self.y.memory, residual.memory, self.weight, self.bias)
        return [0 if memory is None else memory.address for memory in operands]


def largest(numbers: Tensor) -> float:
    """The largest finite magnitude."""
    finite = numbers[numbers.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def close(found: Tensor, expected: Tensor, size: float) -> None:
    """Compare with a result in float64, up to what the element type can tell apart of its sums."""
    rounding = 2**-8 if found.dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(
        found.double(), expected, rtol=rounding, atol=1e-5 * max(size, 1e-3), equal_nan=True
    )


class Draw:
    """Draws the parts of a case."""

    def __init__(self, seed: int, dtype: torch.dtype, *, finite: bool = True) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.finite = finite

    def one_of(self, *options: int) -> int:
        return self.random.choice(options)

    def chance(self) -> bool:
        return self.random.random() < 0.5

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def pixels(self, *shape: int, planes: bool = False) -> Pixels:
        """A tensor of (N, C, H, W), with infinities and NaN where these are asked for."""
        values = self.normal(*shape)
        if not self.finite:
            for value in (float("inf"), float("-inf"), float("nan")):
                values.view(-1)[self.random.randrange(values.numel())] = value
        least = shape[2] * shape[3] + PLANE_SLACK if planes else shape[1]
        return Pixels(values, least + self.one_of(0, 0, 1, 5, 16), self.one_of(0, 0, 3, 16), planes)

    def window(self, most: int = 3) -> dict[str, int]:
        """Kernel, stride, padding, dilation; sizes of an image that has room for the kernel."""
        kernel = self.one_of(1, 1, 3, 3, 5, 2)
        w = {"kernel_h": kernel, "kernel_w": self.one_of(kernel, kernel, 1, 3)}
        for axis in "hw":
            w[f"stride_{axis}"] = self.one_of(1, 1, 2, 3)
            w[f"dilation_{axis}"] = self.one_of(1, 1, 1, 2, 3)
            w[f"padding_{axis}"] = self.one_of(*range(most + 1))
        return self.with_image(w)

    def three_by_three(self) -> dict[str, int]:
        """The window of most convs, for which there are kernels of their own."""
        w = dict.fromkeys(("kernel_h", "kernel_w"), 3)
        w |= {f"{name}_{axis}": 1 for name in ("stride", "dilation") for axis in "hw"}
        w |= {f"padding_{axis}": self.one_of(0, 1, 1) for axis in "hw"}
        return self.with_image(w)

    def with_image(self, w: dict[str, int]) -> dict[str, int]:
        w["batch"] = self.one_of(1, 1, 2, 3)
        for axis, size in (("h", "height"), ("w", "width")):
            reach = w[f"dilation_{axis}"] * (w[f"kernel_{axis}"] - 1) + 1
            least = max(1, reach - 2 * w[f"padding_{axis}"])
            w[size] = least + self.random.randrange(14)
            room = w[size] + 2 * w[f"padding_{axis}"] - reach
            w[f"out_{size}"] = room // w[f"stride_{axis}"] + 1
        return w

    def pooling_window(self) -> dict[str, int]:
        """The same with a padding that torch's pooling takes: half of the kernel at most."""
        while True:
            w = self.window(2)
            if all(2 * w[f"padding_{axis}"] <= w[f"kernel_{axis}"] for axis in "hw"):
                return w

    def epilogue(self, sums: Tensor, *, planes: bool) -> tuple[Tensor, Pixels | None, Pixels]:
        """An activation of sums in float64 and a residual: what is expected, where it goes."""
        activation = self.one_of(*ACTIVATIONS)
        self.activation = Activation(activation)
        plain = activation in (Activation.IDENTITY, Activation.RELU, Activation.RELU6)
        y = self.pixels(*sums.shape, planes=planes and plain and self.chance())
        residual = None
        if self.chance():
            other = y.planes or (planes and self.chance())
            residual = y if self.chance() else self.pixels(*sums.shape, planes=other)
            sums = sums + residual.values.double()
        return ACTIVATIONS[self.activation](sums), residual, y


def case(
    draw: Draw,
    kind: Kind,
    x: Pixels,
    sums: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    epilogue: bool = True,
    planes: bool = False,
    **fields: int,
) -> Case:
    """Put a case together: operands 0 to 4 are x, y, residual, weight and bias."""
    if epilogue:
        expected, residual, y = draw.epilogue(sums, planes=planes)
    else:
        draw.activation = Activation.IDENTITY
        expected, residual, y = sums, None, draw.pixels(*sums.shape)
    size = draw.dtype.itemsize
    for pixels in (x, y, residual):
        assert pixels is None or pixels.memory.bytes.numel() % size == 0
    step = Step(
        kind=kind,
        type=TYPES[draw.dtype],
        **{"x": 0, "x_offset": x.offset * size, "x_stride": x.stride},
        **{"y": 1, "y_offset": y.offset * size, "y_stride": y.stride},
        residual=-1 if residual is None else 2,
        residual_offset=0 if residual is None else residual.offset * size,
        residual_stride=0 if residual is None else residual.stride,
        **{"x_planes": x.planes, "y_planes": y.planes},
        residual_planes=residual is not None and residual.planes,
        weight=-1 if weight is None else 3,
        bias=-1 if bias is None else 4,
        channels=x.values.shape[1],
        out_channels=sums.shape[1],
        activation=draw.activation,
        **{"groups": 1, **fields},
    )
    operands = (None if operand is None else fenced(operand) for operand in (weight, bias))
    return Case(step, x, y, expected, max(map(largest, (sums, expected))), residual, *operands)


def image(draw: Draw, w: dict[str, int], channels: int, *, planes: bool = False) -> Pixels:
    return draw.pixels(w["batch"], channels, w["height"], w["width"], planes=planes)


def sizes(w: dict[str, int], *names: str) -> dict[str, tuple[int, int]]:
    return {name: (w[f"{name}_h"], w[f"{name}_w"]) for name in names}


def a_bias(draw: Draw, outputs: int, groups: int = 1) -> tuple[Tensor, Tensor | None]:
    """A bias for torch in float64, and as the engine reads it: none, or float32 and padded."""
    if draw.chance():
        return torch.zeros(outputs).double(), None
    bias = torch.randn(outputs, generator=draw.generator)
    return bias.double(), weight_layout.pack_bias(bias, groups)


def pruned(draw: Draw, weight: Tensor, n: int, m: int) -> Tensor:
    """The weight with the largest N of any M consecutive input channels."""
    padded = F.pad(weight, (0, 0, 0, 0, 0, -weight.shape[1] % m))
    parts = padded.unflatten(1, (-1, m))
    kept = parts.abs().topk(n, dim=2).indices
    mask = torch.zeros_like(parts).scatter_(2, kept, 1)
    return weight * mask.flatten(1, 2)[:, : weight.shape[1]]


def planar_conv(draw: Draw) -> Case:
    return sparse_conv(draw, planar=draw.dtype == torch.float32)


def wide_sparse_conv(draw: Draw) -> Case:
    """One whose weights go over the pixels in several passes."""
    return sparse_conv(draw, wide=True)


def sparse_conv(draw: Draw, *, planar: bool = False, wide: bool = False) -> Case:
    w = draw.three_by_three() if wide else draw.window()
    groups = draw.one_of(1, 1, 1, 2, 3)
    inputs = draw.one_of(1, 3, 4, 8, 15, 16, 17, 20, 24, 31, 32, 33, 48, 60, 64)
    outputs = draw.one_of(1, 3, 8, 15, 16, 17, 31, 32, 33, 40, 64, 65, 80)
    if wide:
        inputs = draw.one_of(64, 96, 100, 128)
    elif draw.chance():  # the 1x1 convs that are not packed
        for axis in "hw":
            w |= {f"kernel_{axis}": 1, f"padding_{axis}": 0, f"stride_{axis}": 1}
        w |= {"out_height": w["height"], "out_width": w["width"]}
    n, m = draw.random.choice(
        [(2, 4), (1, 4), (1, 8), (1, 16), (8, 16), (1, 32), (2, 32), (3, 5), (1, 2)]
    )
    if not draw.finite:
        n, m, inputs = 1, 1, draw.one_of(32, 64)  # no free slots: these multiply by zero
    shape = (outputs * groups, inputs, w["kernel_h"], w["kernel_w"])
    weight = pruned(draw, draw.normal(*shape), n, m)
    packed = weight_layout.pack(weight, groups, planar=planar, quartered=draw.chance())
    slots, channel_group, parts, _ = weight_layout.layout(
        tuple(packed.shape), shape, groups, draw.dtype
    )
    fields = {"slots": slots, "channel_group": channel_group, "groups": groups}
    fields["planar"] = int(planar)
    fields["parts"] = 1 if parts == 2 and draw.chance() else parts  # then it is the same weight
    if draw.chance():
        fields |= {"tile_blocks": draw.one_of(1, 2, 3, 4), "tile_pixels": draw.one_of(1, 3, 7, 14)}
        fields |= {"tile_rows": draw.one_of(1, 2, 5), "split": draw.one_of(1, 2, 3)}
        taps = w["kernel_h"] * w["kernel_w"]
        one = taps == 1 and not (w["padding_h"] or w["padding_w"])
        fields["direct"] = int(not planar and one and inputs % channel_group == 0 and draw.chance())
    x = image(draw, w, inputs * groups, planes=planar and draw.chance())
    bias, padded = a_bias(draw, outputs * groups, groups)
    sums = F.conv2d(
        *(x.values.double(), weight.double(), bias),
        **sizes(w, "stride", "padding", "dilation"),
        groups=groups,
    )
    operands = {"weight": packed, "bias": padded, "planes": planar}
    return case(draw, Kind.SPARSE_CONV, x, sums, **operands, **w, **fields)


def dense_conv(draw: Draw) -> Case:
    w = draw.window()
    w |= {"dilation_h": 1, "dilation_w": 1}
    for axis, size in (("h", "height"), ("w", "width")):
        room = w[size] + 2 * w[f"padding_{axis}"] - w[f"kernel_{axis}"]
        w[f"out_{size}"] = room // w[f"stride_{axis}"] + 1
    inputs, outputs = draw.one_of(1, 3, 3, 4, 17), draw.one_of(1, 8, 16, 24, 33, 64, 80, 100)
    weight = draw.normal(outputs, inputs, w["kernel_h"], w["kernel_w"])
    x = image(draw, w, inputs)
    bias, padded = a_bias(draw, outputs)
    sums = F.conv2d(x.values.double(), weight.double(), bias, **sizes(w, "stride", "padding"))
    packed = weight_layout.pack_dense(weight)
    return case(draw, Kind.DENSE_CONV, x, sums, weight=packed, bias=padded, **w)


def winograd_conv(draw: Draw) -> Case:
    """Of finite float32 numbers: what is not finite reaches all outputs of its tile."""
    draw.dtype, draw.finite = torch.float32, True
    w = dict.fromkeys(("kernel_h", "kernel_w"), 3)
    w |= {f"{name}_{axis}": 1 for name in ("stride", "dilation") for axis in "hw"}
    w["batch"] = draw.one_of(1, 1, 2, 3)
    for axis, size in (("h", "height"), ("w", "width")):
        w[f"padding_{axis}"] = draw.one_of(0, 1, 1, 2, 4)
        w[size] = max(1, 3 - 2 * w[f"padding_{axis}"]) + draw.random.randrange(14)
        w[f"out_{size}"] = w[size] + 2 * w[f"padding_{axis}"] - 2
    inputs, outputs = draw.one_of(1, 3, 16, 20, 33, 64), draw.one_of(1, 8, 16, 24, 40, 64, 80, 100)
    side = draw.one_of(2, 4)
    fields = {"winograd": side}
    if draw.chance():
        fields |= {"tile_pixels": draw.one_of(1, 3, 7, 14), "split": draw.one_of(1, 2, 3)}
    weight = draw.normal(outputs, inputs, 3, 3)
    x = image(draw, w, inputs)
    bias, padded = a_bias(draw, outputs)
    sums = F.conv2d(x.values.double(), weight.double(), bias, **sizes(w, "padding"))
    packed = weight_layout.pack_winograd(weight, side)
    return case(draw, Kind.WINOGRAD_CONV, x, sums, weight=packed, bias=padded, **w, **fields)


def usual_depthwise_conv(draw: Draw) -> Case:
    return depthwise_conv(draw, usual=True)


def depthwise_conv(draw: Draw, *, usual: bool = False) -> Case:
    w = draw.three_by_three() if usual else draw.window()
    channels = draw.one_of(1, 3, 8, 16, 17, 32, 40, 100)
    weight = draw.normal(channels, 1, w["kernel_h"], w["kernel_w"])
    x = image(draw, w, channels)
    bias, padded = a_bias(draw, channels)
    sums = F.conv2d(
        *(x.values.double(), weight.double(), bias),
        **sizes(w, "stride", "padding", "dilation"),
        groups=channels,
    )
    packed = weight_layout.pack_depthwise(weight)
    fields = {**w, "groups": channels}
    return case(draw, Kind.DEPTHWISE_CONV, x, sums, weight=packed, bias=padded, **fields)


def max_pool(draw: Draw) -> Case:
    w = draw.pooling_window()
    x = image(draw, w, draw.one_of(1, 3, 8, 16, 17, 32, 40))
    options = sizes(w, "stride", "padding", "dilation")
    sums = F.max_pool2d(x.values.double(), (w["kernel_h"], w["kernel_w"]), **options)
    return case(draw, Kind.MAX_POOL, x, sums, epilogue=draw.chance(), **w)


def average_pool(draw: Draw) -> Case:
    w = draw.pooling_window()
    w |= {"dilation_h": 1, "dilation_w": 1}
    for axis, size in (("h", "height"), ("w", "width")):
        room = w[size] + 2 * w[f"padding_{axis}"] - w[f"kernel_{axis}"]
        w[f"out_{size}"] = room // w[f"stride_{axis}"] + 1
    x = image(draw, w, draw.one_of(1, 3, 8, 16, 17, 32, 40))
    inside = draw.one_of(0, 1)
    sums = F.avg_pool2d(
        *(x.values.double(), (w["kernel_h"], w["kernel_w"])),
        **sizes(w, "stride", "padding"),
        count_include_pad=not inside,
    )
    return case(draw, Kind.AVERAGE_POOL, x, sums, count_inside=inside, epilogue=draw.chance(), **w)


def pointwise_fields(draw: Draw) -> tuple[dict[str, int], Pixels]:
    n, h, w = draw.one_of(1, 2), draw.one_of(1, 5, 9), draw.one_of(1, 4, 11)
    fields = {"batch": n, "height": h, "width": w, "out_height": h, "out_width": w}
    fields |= {f"{name}_{axis}": 1 for name in ("kernel", "stride", "dilation") for axis in "hw"}
    return fields, draw.pixels(n, draw.one_of(1, 3, 8, 16, 17, 32, 100), h, w)


def affine(draw: Draw) -> Case:
    fields, x = pointwise_fields(draw)
    channels = x.values.shape[1]
    bias, padded = a_bias(draw, channels)
    scale = torch.randn(channels, generator=draw.generator) if draw.chance() else None
    by = 1 if scale is None else scale.double().view(-1, 1, 1)
    sums = x.values.double() * by + bias.view(-1, 1, 1)
    return case(draw, Kind.AFFINE, x, sums, weight=scale, bias=padded, **fields)


def copy(draw: Draw) -> Case:
    fields, x = pointwise_fields(draw)
    return case(draw, Kind.COPY, x, x.values.double(), epilogue=False, **fields)


KINDS: dict[str, Callable[[Draw], Case]] = {
    each.__name__: each
    for each in (
        *(sparse_conv, wide_sparse_conv, planar_conv, dense_conv, winograd_conv),
        *(depthwise_conv, usual_depthwise_conv),
        *(max_pool, average_pool, affine, copy),
    )
}


def dtypes(isa: str) -> tuple[torch.dtype, ...]:
    return (torch.float32, torch.bfloat16) if isa == "avx512_bf16" else (torch.float32,)


def main(directory: str, isa: str, count: str) -> None:
    engine = library.find(Path(directory), (isa,))
    assert isinstance(engine, Engine), engine
    for make in KINDS.values():
        for seed in range(int(count)):
            for dtype in dtypes(isa):
                made = make(Draw(seed, dtype, finite=seed % 4 != 3))
                assert engine.takes(made.step)
                made.run(engine, THREADS[seed % len(THREADS)])


if __name__ == "__main__":
    main(*sys.argv[1:])
