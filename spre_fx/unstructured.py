"""The unstructured baselines of Fig. 2, 3 and Table 6: GMP and RigL; GraNet is in granet.py.

They zero single weights, in no N:M groups and with no SpRe branch, in the layers that N:M methods
would take, so that the two compare. The fraction of zeros aimed at is 1 - N/M of each layer's
pattern, or the method's own `sparsity`. All of these read dL/d(B * W) and |W| only.

Where the papers' code edits the optimizer and the loop, this does not: momentum of removed weights
is left alone, so W outside the mask may drift, and is not looked at (RigL, GraNet); weights that
come back start at 0 as there. The gradient that decides which come back is that of the last
backward before the update, whose step of the optimizer is not skipped.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from spre_fx.errors import OptionError
from spre_fx.methods import MaskMethod
from spre_fx.patterns import Pattern
from spre_fx.scheduled_mask import KeptMask
from spre_fx.schedules import CubicRamp, Freeze, Schedule
from spre_fx.selection import grow, rows_of, shrink, top, unrows


@dataclass
class LayerState:
    """One layer as an unstructured method sees it. Its tensors are updated in place.

    Attributes:
        weight: W, `(C_out, C_in/groups, *kernel)`.
        mask: B, bool, of the same shape.
        gradient: dL/d(B * W) of the last backward, or None where the method needs none.
        density: Fraction of weights to be left in the end.
    """

    weight: Tensor
    mask: Tensor
    gradient: Tensor | None
    density: float


@dataclass(frozen=True)
class UnstructuredMethod(MaskMethod):
    """An unstructured baseline: `prepare(model, pattern, method=..., schedule=...)`, branch None.

    Attributes:
        sparsity: Fraction of zeros in the end; None: 1 - N/M of each layer's pattern.

    Raises:
        OptionError: Unless 0 < sparsity < 1.
    """

    sparsity: float | None = None
    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise OptionError(
                f"{type(self).__name__}(sparsity={self.sparsity}): expected 0 < sparsity < 1."
            )

    def density(self, pattern: Pattern) -> float:
        """Fraction of weights left in the end in a layer with this pattern."""
        return pattern.density if self.sparsity is None else 1 - self.sparsity

    def mask_module(self, weight: Tensor, pattern: Pattern, *, keep: bool) -> nn.Module:  # noqa: ARG002
        """A mask that the node for all layers updates."""
        return KeptMask(weight)

    def masked(self, weight: Tensor, mask: Tensor) -> Tensor:
        """B * W, with the ordinary gradient B * g."""
        return weight * mask

    @abstractmethod
    def start(self, layers: Sequence[LayerState]) -> None:
        """Set the masks that training starts with; they are all ones before."""

    @abstractmethod
    def update(self, layers: Sequence[LayerState], schedule: Schedule, step: int) -> None:
        """Change masks, and weights where the method does, at an update step after step 0."""

    def is_update(self, schedule: Schedule, step: Tensor) -> Tensor:
        """Whether `update` is due at `step`."""
        return schedule.is_update(step) & (step > 0)


def ramp_of(method: MaskMethod, schedule: Schedule) -> CubicRamp:
    """The schedule, refused unless it is a ramp."""
    if not isinstance(schedule, CubicRamp):
        raise OptionError(
            f"{type(method).__name__}: expected schedule=CubicRamp(start, end, every), the steps "
            f"over which sparsity grows, found {schedule}."
        )
    return schedule


def sparsity_at(ramp: CubicRamp, step: int, final: float, initial: float = 0.0) -> float:
    """Sparsity of the ramp at a step."""
    return float(ramp.sparsity(torch.tensor(step), final, initial))


@dataclass(frozen=True)
class GMP(UnstructuredMethod):
    """Gradual magnitude pruning (Zhu & Gupta, 2017): the smallest of each layer, ever more.

    Layer-wise, the same sparsity in each, along `schedule=CubicRamp(start, end, every)`. Removed
    weights keep their value and no longer change but by momentum and decay, as in the paper.
    """

    kept_gradient: ClassVar[bool] = True

    def check(self, patterns: Collection[Pattern], schedule: Schedule) -> None:  # noqa: ARG002
        """Refuse a schedule that is no ramp."""
        ramp_of(self, schedule)

    def start(self, layers: Sequence[LayerState]) -> None:
        """Dense."""

    def update(self, layers: Sequence[LayerState], schedule: Schedule, step: int) -> None:
        """Keep the largest magnitudes of each layer."""
        for layer in layers:
            sparsity = sparsity_at(ramp_of(self, schedule), step, 1 - layer.density)
            count = round((1 - sparsity) * layer.weight.numel())
            kept = top(layer.weight.abs().reshape(1, -1), count)
            layer.mask.copy_(kept.view(layer.mask.shape))


@dataclass(frozen=True)
class RigL(UnstructuredMethod):
    """RigL (Evci et al., ICML 2020): drop the smallest, grow where the gradient is largest.

    Each layer keeps its sparsity: that of an Erdos-Renyi-kernel distribution, or uniform. At the
    update steps of `schedule=Freeze(at=T_end, before=EveryK(dT))` (paper: dT = 100, T_end = 3/4 of
    all steps), a fraction `drop / 2 * (1 + cos(pi * t / T_end))` of each layer's weights is dropped
    by magnitude, and as many grown by the magnitude of the dense gradient; those start at 0. The
    first mask is that of the largest of the initial weights, not a random one, so that it is the
    same on every rank.

    Attributes:
        drop: Fraction replaced at first (alpha).
        distribution: "erk" or "uniform".

    Raises:
        OptionError: Unless 0 < drop < 1.
    """

    drop: float = 0.3
    distribution: Literal["erk", "uniform"] = "erk"
    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.drop < 1:
            raise OptionError(f"RigL(drop={self.drop}): expected 0 < drop < 1.")
        if self.distribution not in ("erk", "uniform"):
            raise OptionError(
                f"RigL(distribution={self.distribution!r}): expected 'erk' or 'uniform'."
            )

    def check(self, patterns: Collection[Pattern], schedule: Schedule) -> None:  # noqa: ARG002
        """Refuse a schedule without an end."""
        if not isinstance(schedule, Freeze) or schedule.at < 1:
            raise OptionError(
                "RigL: expected schedule=Freeze(at=T_end, before=EveryK(dT)), with the step T_end "
                f"from which on masks stay, found {schedule}."
            )

    def start(self, layers: Sequence[LayerState]) -> None:
        """The largest magnitudes, at the sparsity of each layer."""
        start_sparse(layers, erk=self.distribution == "erk")

    def update(self, layers: Sequence[LayerState], schedule: Schedule, step: int) -> None:
        """Drop and grow, layer by layer."""
        assert isinstance(schedule, Freeze)
        fraction = self.drop / 2 * (1 + math.cos(math.pi * step / schedule.at))
        for layer in layers:
            drop_and_grow(layer, None, lambda active: int(fraction * active))


def drop_and_grow(layer: LayerState, rule: str | None, count: Callable[[int], int]) -> None:
    """Drop `count(active)` of the active weights of each row, grow as many; new ones start at 0."""
    assert layer.gradient is not None
    before = rows_of(layer.mask, rule)
    active = int(before[0].sum())
    number = min(count(active), active)
    survivors = shrink(before, rows_of(layer.weight.abs(), rule), active - number)
    after = grow(survivors, rows_of(layer.gradient.abs(), rule), number)
    mask = unrows(after, layer.mask.shape, rule)
    layer.weight.mul_(mask & layer.mask)
    layer.mask.copy_(mask)


def start_sparse(layers: Sequence[LayerState], *, erk: bool, density: float | None = None) -> None:
    """Keep the largest magnitudes of each layer, at the densities aimed at or at `density`."""
    sizes = [layer.weight.numel() for layer in layers]
    densities = [layer.density if density is None else density for layer in layers]
    if erk:
        densities = erdos_renyi_kernel([tuple(x.weight.shape) for x in layers], densities)
    for layer, size, share in zip(layers, sizes, densities, strict=True):
        kept = top(layer.weight.abs().reshape(1, -1), max(1, round(share * size)))
        layer.mask.copy_(kept.view(layer.mask.shape))


def erdos_renyi_kernel(
    shapes: Sequence[tuple[int, ...]], densities: Sequence[float]
) -> list[float]:
    """Density of each layer, in proportion to (n_in + n_out + kernel sizes) / their product.

    Sec. 3 of Evci et al., 2020. A layer that would get more than all of its weights is dense, and
    the others share what is left.

    Args:
        shapes: `(C_out, C_in/groups, *kernel)` of each layer.
        densities: The density each would have in a uniform distribution; the number of weights
            left over all layers is the same.
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    budget = sum(d * size for d, size in zip(densities, sizes, strict=True))
    dense: set[int] = set()
    while True:
        others = [i for i in range(len(shapes)) if i not in dense]
        left = budget - sum(sizes[i] for i in dense)
        scale = left / sum(raw[i] * sizes[i] for i in others) if others else 0.0
        over = {i for i in others if scale * raw[i] > 1}
        if not over:
            return [1.0 if i in dense else scale * raw[i] for i in range(len(shapes))]
        dense.add(max(over, key=lambda i: raw[i]))
