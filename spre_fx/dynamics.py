"""How masks move while a model trains: live taps and churn of every site, as data and a picture."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from spre_fx.dynamics_plot import plot_dynamics
from spre_fx.errors import ModelError, OptionError
from spre_fx.modules import NMLayer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ScalarWriter(Protocol):
    """What `torch.utils.tensorboard.SummaryWriter` is to us."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Note a number."""
        ...


@dataclass(frozen=True)
class MaskRow:
    """The masks of one layer at one step.

    Attributes:
        step: The step the user gave.
        site: The layer's name.
        live_taps: Which taps of the SpRe branch are live, in row-major order; None without branch.
        flips: Taps that became live or ceased to be since the record before; None in the first
            record, and without branch.
        churn: Weights the mask B keeps now and did not at the record before, over all it keeps: 0
            where the mask stood still, 1 where it was replaced. None in the first record.
    """

    step: int
    site: str
    live_taps: tuple[bool, ...] | None
    flips: int | None
    churn: float | None

    @property
    def live_tap_count(self) -> int | None:
        """How many taps are live."""
        return None if self.live_taps is None else sum(self.live_taps)


class MaskDynamics:
    """A record of the masks of a prepared model, taken whenever you ask for it.

        tracker = spre_fx.MaskDynamics(gm)
        for step, (images, labels) in enumerate(loader):
            ...
            if step % 100 == 0:
                tracker.record(step)
        tracker.plot("mask_dynamics.png")

    Nothing is hung on the model or the loop. Between records only the last masks are kept, a bit
    per weight. The state of the tracker resumes with `load_state_dict`, next to the model's.

    Args:
        model: A prepared model, at any moment of its training. Never modified.

    Attributes:
        rows: A row per site and record, in order.

    Raises:
        ModelError: If the model has no N:M layer in training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {
            name: module for name, module in model.named_modules() if isinstance(module, NMLayer)
        }
        if not self._layers:
            raise ModelError(
                "MaskDynamics: expected a prepared model, found a "
                f"{type(model).__name__} without N:M layers in training. Call prepare on it first."
            )
        self.rows: list[MaskRow] = []
        self._masks: dict[str, Tensor] = {}  # bits of B, packed, at the last record

    @torch.no_grad()
    def record(self, step: int) -> list[MaskRow]:
        """Note the masks in force.

        Args:
            step: Where training is; larger than at the record before.

        Returns:
            The new rows, one per site.

        Raises:
            OptionError: If step does not grow.
        """
        last = self.rows[-1].step if self.rows else None
        if last is not None and step <= last:
            raise OptionError(f"record({step}): expected a step after {last}, the last recorded.")
        before = {row.site: row.live_taps for row in self.last}
        new = [self._row(step, name, layer, before) for name, layer in self._layers.items()]
        self.rows += new
        return new

    @property
    def last(self) -> list[MaskRow]:
        """The rows of the last record."""
        return self.rows[-len(self._layers) :] if self.rows else []

    def write(self, writer: ScalarWriter, step: int) -> None:
        """Record at `step`, unless that is done, and hand the numbers to TensorBoard.

        Tags are `live_taps/SITE`, `live_tap_flips/SITE` and `mask_churn/SITE`.

        Args:
            writer: A `torch.utils.tensorboard.SummaryWriter`, or anything with its `add_scalar`.
            step: As in `record`.
        """
        if not self.rows or self.rows[-1].step != step:
            self.record(step)
        for row in self.last:
            values = {
                "live_taps": row.live_tap_count,
                "live_tap_flips": row.flips,
                "mask_churn": row.churn,
            }
            for tag, value in values.items():
                if value is not None:
                    writer.add_scalar(f"{tag}/{row.site}", value, step)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw live taps and mask churn of every site over the steps recorded.

        Needs matplotlib: `pip install 'spre_fx[plot]'`.

        Args:
            path: A file to write as well, in the format of its suffix.

        Raises:
            ModelError: If fewer than two records were made.
        """
        return plot_dynamics(self.rows, path)

    def to_dict(self) -> list[dict[str, Any]]:
        """The rows as plain data, for JSON or a data frame."""
        return [asdict(row) | {"live_tap_count": row.live_tap_count} for row in self.rows]

    def state_dict(self) -> dict[str, Any]:
        """The rows and the last masks: plain data and tensors, which `torch.save` takes."""
        return {"rows": [asdict(row) for row in self.rows], "masks": dict(self._masks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another tracker of the same model was.

        Raises:
            ModelError: If the state is that of a model with other layers.
        """
        if state["masks"] and set(state["masks"]) != set(self._layers):
            other = sorted(set(state["masks"]) ^ set(self._layers))
            raise ModelError(
                "MaskDynamics: expected the state of a tracker of this model, found one whose "
                f"layers differ in {', '.join(other)}."
            )
        self.rows = [MaskRow(**row) for row in state["rows"]]
        self._masks = dict(state["masks"])

    def _row(
        self,
        step: int,
        name: str,
        layer: NMLayer,
        before: Mapping[str, tuple[bool, ...] | None],
    ) -> MaskRow:
        mask = layer.masked_weight()[1]
        bits = _pack(mask)
        churn = _churn(self._masks.get(name), bits)
        self._masks[name] = bits
        if layer.live_taps is None:
            return MaskRow(step, name, None, None, churn)
        live = tuple(layer.live_taps(layer.weight, None).flatten().tolist())
        old = before.get(name)
        flips = None if old is None else _differences(old, live)
        return MaskRow(step, name, live, flips, churn)


def _pack(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def _churn(before: Tensor | None, now: Tensor) -> float | None:
    """The fraction of the bits set now that were not set before."""
    if before is None:
        return None
    return _ones(now & ~before) / max(_ones(now), 1)


def _ones(bits: Tensor) -> int:
    return int(np.unpackbits(bits.numpy()).sum(dtype=np.int64))


def _differences(before: Iterable[bool], now: Iterable[bool]) -> int:
    return sum(a != b for a, b in zip(before, now, strict=True))
