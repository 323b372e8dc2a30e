"""The CPU backend: packed N:M layers that the inference engine runs."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from spre_fx import engine
from spre_fx.backends import Lowered, dense
from spre_fx.engine.library import VERSION
from spre_fx.packed_layers import PackedConv2d, PackedLinear, refusal
from spre_fx.patterns import Pattern
from spre_fx.winograd_filters import winograd_refusal

_BFLOAT16 = "avx512_bf16"  # the instruction set that the engine needs for it
_WITH_LONG_PERMUTES = ("avx512_bf16", "avx512")  # of 16 lanes
_SPARSEST_BY_WINOGRAD = 1 / 8  # of sparser patterns the non-zeros alone are always faster
_PRICES = {2: 1.1, 4: 1.25}  # of transformed filters: 1.8 and 4 times as large as dense ones
_QUARTERED = "avx2"  # the instruction set whose shuffles of bytes are faster than its permutes


@dataclass(frozen=True)
class CPUBackend:
    """Takes Conv2d of any groups that pads with zeros, and Linear, in float32 and bfloat16."""

    name: str = "cpu"

    @property
    def machine(self) -> str:
        """The processor, and the instruction set and version of the engine."""
        loaded = engine.load()
        isa = "no engine" if loaded is None else loaded.isa
        return f"{processor()}, {isa}, version {VERSION}"

    def candidates(self, layer: nn.Module, pattern: Pattern) -> list[Lowered] | str:
        """The packed layer, of a conv in each layout and algorithm, or why there is none."""
        if (reason := refusal(layer)) is not None:
            return reason
        loaded = engine.load()
        if layer.weight.dtype == torch.bfloat16 and (loaded is None or loaded.isa != _BFLOAT16):
            return "this CPU has no instructions for bfloat16 that the engine uses"
        why = f"computes the {pattern} non-zeros only"
        quartered = shuffles_bytes()
        if isinstance(layer, nn.Linear):
            return [Lowered(PackedLinear.from_dense(layer, quartered=quartered), "cpu", why)]
        assert isinstance(layer, nn.Conv2d)
        ways = [Lowered(PackedConv2d.from_dense(layer, quartered=quartered), "cpu", why)]
        if layer.weight.dtype == torch.float32:
            ways.append(Lowered(PackedConv2d.from_dense(layer, planar=True), "cpu", why))
        if pattern.n / pattern.m >= _SPARSEST_BY_WINOGRAD and winograd_refusal(layer) is None:
            ways += [_by_winograd(layer, side, quartered) for side in _PRICES]
        return ways

    def rule(
        self,
        layer: nn.Module,
        pattern: Pattern,
        candidates: Sequence[Lowered],
        input_shape: tuple[int, ...] | None,  # noqa: ARG002
    ) -> Lowered:
        """Packed where `predicted_ratio` says it is faster; planar where permutes are slow.

        Quartered ones need no permutes.
        """
        loaded = engine.load()
        isa = "none" if loaded is None else loaded.isa
        ratio = predicted_ratio(layer, pattern, isa)
        first = candidates[0].module
        assert isinstance(first, PackedConv2d | PackedLinear)
        by_outputs = isa in _WITH_LONG_PERMUTES or first.layout.quartered or len(candidates) == 1
        packed = candidates[0 if by_outputs else 1]
        if ratio > 1:
            why = f"{packed.why}: expected to be {ratio:.1f} times as fast as dense"
            return Lowered(packed.module, packed.kind, why)
        return dense(layer, f"dense: expected to be faster than cpu, by {1 / ratio:.1f} times")


def _by_winograd(conv: nn.Conv2d, side: int, quartered: bool) -> Lowered:
    layer = PackedConv2d.from_dense(conv, quartered=quartered, winograd=side)
    tiles = f"{side}x{side}"
    why = f"computes tiles of {tiles} by Winograd's filtering, zeros and all"
    return Lowered(layer, f"winograd {tiles}", why, _PRICES[side])


def shuffles_bytes() -> bool:
    """Whether kernels here are faster with quartered weights, where a pattern allows them."""
    loaded = engine.load()
    return loaded is not None and loaded.isa == _QUARTERED


def predicted_ratio(layer: nn.Module, pattern: Pattern, isa: str) -> float:
    """The time of the dense layer over that of the packed one, where nothing can be measured.

    Fitted to the convs of ResNet-50 at 2:4, 1:4, 1:8 and 1:16 with AVX-512 and with AVX2. Layers
    with few channels do not fill the vectors of 16 outputs, nor pay for the packing of their input.
    """
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    outputs, inputs = weight.shape[0] // getattr(layer, "groups", 1), weight.shape[1]
    filled = min(1.0, outputs / 16) * min(1.0, inputs / 32)
    density = pattern.n / pattern.m
    return filled / (density / 0.7 if isa in _WITH_LONG_PERMUTES else 0.1 + 1.7 * density)


@cache
def processor() -> str:
    """The model of the CPU, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
