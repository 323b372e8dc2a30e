"""GraNet, the unstructured baseline of Fig. 3, with the constraints of Eq. 6 and Eq. 7."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from spre_fx.errors import OptionError
from spre_fx.patterns import Pattern
from spre_fx.schedules import CubicRamp, Schedule
from spre_fx.selection import rows_of, shrink, unrows
from spre_fx.unstructured import (
    LayerState,
    UnstructuredMethod,
    drop_and_grow,
    ramp_of,
    sparsity_at,
    start_sparse,
)


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
        ramp = ramp_of(self, schedule)
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
        ramp = ramp_of(self, schedule)
        later = (step > ramp.end) & (step <= self._until(ramp))
        return super().is_update(ramp, step) | (later & ((step - ramp.start) % ramp.every == 0))

    def _until(self, ramp: CubicRamp) -> int:
        return ramp.end if self.until is None else self.until

    def start(self, layers: Sequence[LayerState]) -> None:
        """Dense, or sparse at the initial sparsity."""
        if not self.initial_sparsity:
            return
        if self.constraint is None:
            start_sparse(layers, erk=True, density=1 - self.initial_sparsity)
        else:
            self._prune_rows(layers, [self.initial_sparsity] * len(layers))

    def update(self, layers: Sequence[LayerState], schedule: Schedule, step: int) -> None:
        """Prune to the sparsity of this step, then drop and grow in each layer."""
        ramp = ramp_of(self, schedule)
        targets = [
            sparsity_at(ramp, step, 1 - layer.density, self.initial_sparsity) for layer in layers
        ]
        if self.constraint is None:
            sizes = [layer.weight.numel() for layer in layers]
            kept = sum((1 - s) * size for s, size in zip(targets, sizes, strict=True))
            _prune_globally(layers, round(kept))
        else:
            self._prune_rows(layers, targets)
        fraction = self.regenerate / 2 * (1 + math.cos(math.pi * step / self._until(ramp)))
        for layer in layers:
            drop_and_grow(layer, self.constraint, lambda active: math.ceil(fraction * active))

    def _prune_rows(self, layers: Sequence[LayerState], targets: Sequence[float]) -> None:
        for layer, sparsity in zip(layers, targets, strict=True):
            mask = rows_of(layer.mask, self.constraint)
            count = math.floor(round((1 - sparsity) * mask.shape[1], 6))
            kept = shrink(mask, rows_of(layer.weight.abs(), self.constraint), count)
            layer.mask.copy_(unrows(kept, layer.mask.shape, self.constraint))


def _prune_globally(layers: Sequence[LayerState], count: int) -> None:
    """Keep the `count` largest active weights of all layers together."""
    magnitudes = torch.cat([layer.weight.abs().flatten() for layer in layers])
    active = torch.cat([layer.mask.flatten() for layer in layers])
    kept = shrink(active[None], magnitudes[None], min(count, int(active.sum())))[0]
    for layer, part in zip(layers, kept.split([x.mask.numel() for x in layers]), strict=True):
        layer.mask.copy_(part.view(layer.mask.shape))
