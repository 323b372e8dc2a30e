"""Random calls of what the engine has for training, each with what torch computes.

As a program, `training_cases.py DIRECTORY ISA COUNT` runs so many of each on the library `_ISA.so`
of a directory.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from engine_cases import THREADS, Fenced, fenced
from masked_convs import assert_close, draw_conv
from torch import Tensor
from weights import DTYPES, KINDS, draw_weight

from spre_fx import mask_ops, native_conv
from spre_fx.engine import Engine, Weight, library
from spre_fx.patterns import Pattern

KERNELS = ((), (1, 1), (3,), (3, 3), (3, 3), (2, 2), (5, 5), (7, 7), (2, 3, 2))
PATTERNS = ((1, 2), (2, 4), (1, 4), (1, 8), (5, 8), (1, 16), (8, 16), (3, 7), (31, 32), (9, 64))


class Draw:
    """A weight in fenced memory, and as torch has it."""

    def __init__(self, seed: int, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
        self.random = random.Random(seed)
        kernel = self.random.choice(KERNELS)
        self.pattern = Pattern(*self.random.choice(PATTERNS))
        most = 2000 // ((len(kernel) and torch.Size(kernel).numel()) or 1)
        filters = self.random.choice((1, 2, 3, 8, 17))
        channels = self.random.randint(1, max(1, most // filters) + self.pattern.m)
        kind = self.random.choice((*KINDS, "special"))
        dtype = self.random.choice(dtypes)
        self.weight = draw_weight((filters, channels, *kernel), dtype, kind, seed)
        if self.random.random() < 0.5:  # channels-last, whatever the number of axes
            self.weight = self.weight.movedim(1, -1).contiguous().movedim(-1, 1)
        self.memory = fenced(in_memory(self.weight))

    def view(self) -> Weight:
        weight, taps = self.weight, self.weight.shape[2:].numel()
        shape = (*weight.shape[:2], taps, not weight.is_contiguous())
        return Weight(self.memory.address, weight.itemsize, *shape)

    def mask(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.random.randrange(2**31))
        kept = torch.rand(self.weight.shape, generator=generator) < self.pattern.density
        return torch.empty_like(self.weight, dtype=torch.bool).copy_(kept)


def in_memory(tensor: Tensor) -> Tensor:
    """The numbers in the order in which they lie in memory."""
    return tensor if tensor.is_contiguous() else tensor.movedim(1, -1)


def assert_same(found: Fenced, expected: Tensor, *others: Fenced) -> None:
    """Bit for bit but for the bits of a NaN; and nothing else is written."""
    assert all(memory.intact() for memory in (found, *others))
    numbers = found.bytes.view(expected.dtype)
    expected = in_memory(expected).flatten()
    torch.testing.assert_close(numbers, expected, rtol=0, atol=0, equal_nan=True)
    if expected.is_floating_point():
        ordered = ~expected.isnan()
        assert torch.equal(numbers.signbit()[ordered], expected.signbit()[ordered])


def nm_mask(engine: Engine, seed: int, threads: int) -> None:
    draw = Draw(seed)
    n, m = draw.pattern.n, draw.pattern.m
    mask = Fenced(draw.weight.numel())
    engine.nm_mask(draw.view(), n, m, mask.address, threads)
    assert_same(mask, mask_ops.nm_mask_by_torch(draw.weight, n, m), draw.memory)


def count_largest(engine: Engine, seed: int, threads: int) -> None:
    draw = Draw(seed)
    kept = draw.random.choice((1, draw.weight.numel(), draw.pattern.kept(draw.weight.numel())))
    view = draw.view()
    per_tap = Fenced(8 * view.taps)
    scratch = Fenced(engine.count_scratch(view, threads) // 64 * 64 + 64)
    engine.count_largest(view, kept, per_tap.address, scratch.address, threads)
    expected = mask_ops.count_per_tap(mask_ops.largest(draw.weight, kept)).flatten()
    assert_same(per_tap, expected, scratch, draw.memory)


def mask_weight(engine: Engine, seed: int, threads: int) -> None:
    draw = Draw(seed, (torch.float32, torch.float64))
    weight, mask = draw.weight, draw.mask()
    byte_mask, y = fenced(in_memory(mask)), Fenced(weight.numel() * weight.itemsize)
    engine.mask_weight(
        weight=draw.memory.address,
        mask=byte_mask.address,
        y=y.address,
        itemsize=weight.itemsize,
        count=weight.numel(),
        threads=threads,
    )
    assert_same(y, weight * mask, draw.memory, byte_mask)


def decay_gradient(engine: Engine, seed: int, threads: int) -> None:
    draw = Draw(seed, (torch.float32, torch.float64))
    weight, mask, decay = draw.weight, draw.mask(), draw.random.choice((2e-4, 0.0, 1.7))
    drawn = draw_weight(weight.shape, weight.dtype, draw.random.choice(KINDS), seed + 1)
    gradient = torch.empty_like(weight).copy_(drawn)
    memory, byte_mask = fenced(in_memory(gradient)), fenced(in_memory(mask))
    y = Fenced(weight.numel() * weight.itemsize)
    engine.decay_gradient(
        gradient=memory.address,
        weight=draw.memory.address,
        mask=byte_mask.address,
        y=y.address,
        itemsize=weight.itemsize,
        count=weight.numel(),
        decay=decay,
        threads=threads,
    )
    expected = torch.where(mask, gradient, gradient + decay * weight)
    assert_same(y, expected, draw.memory, memory, byte_mask)


def product_gradients(engine: Engine, seed: int, threads: int) -> None:
    draw = Draw(seed, (torch.float32, torch.float64))
    weight, mask = draw.weight, draw.mask()
    drawn = draw_weight(weight.shape, weight.dtype, draw.random.choice(KINDS), seed + 1)
    gradient = torch.empty_like(weight).copy_(drawn)
    numbers = mask * torch.empty_like(weight).fill_(draw.random.choice((1.0, 0.3)))
    memories = [fenced(in_memory(gradient)), draw.memory, fenced(in_memory(numbers))]
    of_weight, of_mask = (Fenced(weight.numel() * weight.itemsize) for _ in range(2))
    engine.product_gradients(
        gradient=memories[0].address,
        weight=memories[1].address,
        mask=memories[2].address,
        of_weight=of_weight.address,
        of_mask=of_mask.address,
        itemsize=weight.itemsize,
        count=weight.numel(),
        threads=threads,
    )
    assert_same(of_weight, gradient * numbers, *memories)
    assert_same(of_mask, torch.where(mask, gradient * weight, 0.0))


# What each pass reads besides the mask, and what its result lies in memory like.
PASSES = (
    (("x", "weight", "bias"), "x"),
    (("y_gradient", "weight"), "x"),
    (("x", "y_gradient"), "mask"),
)


def masked_conv(engine: Engine, seed: int, threads: int) -> None:
    draw = random.Random(seed)
    conv = draw_conv(draw, draw.choice((torch.float32, torch.float64)))
    of_x, of_weight = (native_conv.memory_format(tensor) for tensor in (conv.x, conv.mask))
    formats = {"x": of_x, "y_gradient": of_x, "weight": of_weight, "mask": of_weight}
    for name, memory_format in formats.items():
        setattr(conv, name, getattr(conv, name).contiguous(memory_format=memory_format))
    memories = {name: fenced(in_memory(getattr(conv, name))) for name in formats}
    if conv.bias is not None:
        memories["bias"] = fenced(conv.bias.clone(memory_format=torch.contiguous_format))
    before = {name: memory.bytes.clone() for name, memory in memories.items()}
    mask = memories["mask"].address
    kept = engine.count_kept(mask, conv.mask.numel())
    assert kept == int(conv.mask.sum())
    shapes = native_conv.describe(conv.x, conv.mask, conv.geometry)
    expected = (conv.output(), *conv.gradients())
    for which, (operands, like) in enumerate(PASSES):
        values = expected[which].contiguous(memory_format=formats[like])
        result = Fenced(values.numel() * conv.x.itemsize)
        scratch = Fenced(-(-engine.masked_conv_scratch(shapes, which, kept, threads) // 64) * 64)
        engine.masked_conv(
            *(shapes, which, kept),
            mask=mask,
            result=result.address,
            scratch=scratch.address,
            threads=threads,
            **{name: memories[name].address for name in operands if name in memories},
        )
        assert all(memory.intact() for memory in (result, scratch, *memories.values()))
        assert_close(result.bytes.view(conv.x.dtype), in_memory(values).flatten())
    assert all(torch.equal(memory.bytes, before[name]) for name, memory in memories.items())


CALLS: dict[str, Callable[[Engine, int, int], None]] = {
    "nm_mask": nm_mask,
    "count_largest": count_largest,
    "mask_weight": mask_weight,
    "decay_gradient": decay_gradient,
    "product_gradients": product_gradients,
    "masked_conv": masked_conv,
}


def main(directory: str, isa: str, count: str) -> None:
    engine = library.find(Path(directory), (isa,))
    assert isinstance(engine, Engine), engine
    for call in CALLS.values():
        for seed in range(int(count)):
            call(engine, seed, THREADS[seed % len(THREADS)])


if __name__ == "__main__":
    main(*sys.argv[1:])
