"""The unstructured baselines of Fig. 2, 3 and Table 6: GMP, RigL and GraNet.

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


def _ramp(method: MaskMethod, schedule: Schedule) -> CubicRamp:
    if not isinstance(schedule, CubicRamp):
        raise OptionError(
            f"{type(method).__name__}: expected schedule=CubicRamp(start, end, every), the steps "
            f"over which sparsity grows, found {schedule}."
        )
    return schedule


def _sparsity(ramp: CubicRamp, step: int, final: float, initial: float = 0.0) -> float:
    return float(ramp.sparsity(torch.tensor(step), final, initial))


@dataclass(frozen=True)
class GMP(UnstructuredMethod):
    """Gradual magnitude pruning (Zhu & Gupta, 2017): the smallest of each layer, ever more.

    Layer-wise, the same sparsity in each, along `schedule=CubicRamp(start, end, every)`. Removed
    weights keep their value and no longer change but by momentum and decay, as in the paper.
    """

    def check(self, patterns: Collection[Pattern], schedule: Schedule) -> None:  # noqa: ARG002
        """Refuse a schedule that is no ramp."""
        _ramp(self, schedule)

    def start(self, layers: Sequence[LayerState]) -> None:
        """Dense."""

    def update(self, layers: Sequence[LayerState], schedule: Schedule, step: int) -> None:
        """Keep the largest magnitudes of each layer."""
        for layer in layers:
            sparsity = _sparsity(_ramp(self, schedule), step, 1 - layer.density)
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
        _start_sparse(layers, erk=self.distribution == "erk")

    def update(self, layers: Sequence[LayerState], schedule: Schedule, step: int) -> None:
        """Drop and grow, layer by layer."""
        assert isinstance(schedule, Freeze)
        fraction = self.drop / 2 * (1 + math.cos(math.pi * step / schedule.at))
        for layer in layers:
            _replace(layer, None, lambda active: int(fraction * active))


@dataclass(frozen=True)
class GraNet(UnstructuredMethod):
    """GraNet (Liu et al., NeurIPS 2021): prune gradually, and regenerate as many as are dropped.

    At each update step the smallest magnitudes of all layers together go until the sparsity of
    `schedule=CubicRamp(start, end, every)` is reached (global, as in the authors' code); then each
    layer drops a further fraction, `regenerate` with a cosine decay to 0 at step `until`, and grows
    as many by the magnitude of the dense gradient. Regeneration goes on after the ramp.

    `constraint` gives the two ablations of Fig. 3 of Zhang et al., 2306.05612v3, where all
    selections happen within rows of C_out * C_in/groups weights, each row with the same number:

    - "spatial": a row is a kernel tap, so spatial sparsity is the same at each (Eq. 6);
    - "equal": a row is a run of the flattened weight, as W' of shape `(K, K, C_out, C_in)` is a
      reshape (not a transpose) of W: as many rows of the same size, but across taps (Eq. 7).

    Both write `floor(P * ...)` for what is kept, with P the "sparsity rate"; that bounds what is
    kept only if P is the density, which is how it is read here. With a constraint the sparsity of
    all layers is the same.

    Attributes:
        initial_sparsity: 0 starts dense, more starts sparse with an Erdos-Renyi-kernel distribution
            (the paper has both, 0.5 for the latter).
        regenerate: Fraction dropped and grown at first.
        until: Last step of regeneration; None: the end of the ramp.
        constraint: None, "spatial" or "equal".

    Raises:
        OptionError: If a fraction is not in [0, 1), or the constraint unknown.
    """

    initial_sparsity: float = 0.0
    regenerate: float = 0.5
    until: int | None = None
    constraint: Literal["spatial", "equal"] | None = None
    needs_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("initial_sparsity", "regenerate"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(
                    f"GraNet({name}={getattr(self, name)}): expected 0 <= {name} < 1."
                )
        if self.constraint not in (None, "spatial", "equal"):
            raise OptionError(
                f"GraNet(constraint={self.constraint!r}): expected None, 'spatial' or 'equal'."
            )

    def check(self, patterns: Collection[Pattern], schedule: Schedule) -> None:
        """Refuse a schedule that is no ramp, or a start that is sparser than the end."""
        ramp = _ramp(self, schedule)
        if self.until is not None and self.until < ramp.end:
            raise OptionError(
                f"GraNet(until={self.until}): expected a step from the end of the ramp on, "
                f"{ramp.end}."
            )
        for pattern in patterns:
            if self.initial_sparsity > 1 - self.density(pattern):
                raise OptionError(
                    f"GraNet(initial_sparsity={self.initial_sparsity}): expected at most the final "
                    f"one, {1 - self.density(pattern):.4g}."
                )

    def is_update(self, schedule: Schedule, step: Tensor) -> Tensor:
        """The steps of the ramp, and its rhythm until regeneration ends."""
        ramp = _ramp(self, schedule)
        later = (step > ramp.end) & (step <= self._until(ramp))
        return super().is_update(ramp, step) | (later & ((step - ramp.start) % ramp.every == 0))

    def _until(self, ramp: CubicRamp) -> int:
        return ramp.end if self.until is None else self.until

    def start(self, layers: Sequence[LayerState]) -> None:
        """Dense, or sparse at the initial sparsity."""
        if not self.initial_sparsity:
            return
        if self.constraint is None:
            _start_sparse(layers, erk=True, density=1 - self.initial_sparsity)
        else:
            self._prune_rows(layers, [self.initial_sparsity] * len(layers))

    def update(self, layers: Sequence[LayerState], schedule: Schedule, step: int) -> None:
        """Prune to the sparsity of this step, then drop and grow in each layer."""
        ramp = _ramp(self, schedule)
        targets = [
            _sparsity(ramp, step, 1 - layer.density, self.initial_sparsity) for layer in layers
        ]
        if self.constraint is None:
            sizes = [layer.weight.numel() for layer in layers]
            kept = sum((1 - s) * size for s, size in zip(targets, sizes, strict=True))
            _prune_globally(layers, round(kept))
        else:
            self._prune_rows(layers, targets)
        fraction = self.regenerate / 2 * (1 + math.cos(math.pi * step / self._until(ramp)))
        for layer in layers:
            _replace(layer, self.constraint, lambda active: math.ceil(fraction * active))

    def _prune_rows(self, layers: Sequence[LayerState], targets: Sequence[float]) -> None:
        for layer, sparsity in zip(layers, targets, strict=True):
            mask = rows_of(layer.mask, self.constraint)
            count = math.floor(round((1 - sparsity) * mask.shape[1], 6))
            kept = shrink(mask, rows_of(layer.weight.abs(), self.constraint), count)
            layer.mask.copy_(unrows(kept, layer.mask.shape, self.constraint))


def _replace(layer: LayerState, rule: str | None, count: Callable[[int], int]) -> None:
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


def _prune_globally(layers: Sequence[LayerState], count: int) -> None:
    """Keep the `count` largest active weights of all layers together."""
    magnitudes = torch.cat([layer.weight.abs().flatten() for layer in layers])
    active = torch.cat([layer.mask.flatten() for layer in layers])
    kept = shrink(active[None], magnitudes[None], min(count, int(active.sum())))[0]
    for layer, part in zip(layers, kept.split([x.mask.numel() for x in layers]), strict=True):
        layer.mask.copy_(part.view(layer.mask.shape))


def _start_sparse(layers: Sequence[LayerState], *, erk: bool, density: float | None = None) -> None:
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
