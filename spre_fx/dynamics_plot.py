"""The picture of `MaskDynamics`: live taps and mask churn of every site over training."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spre_fx.errors import ModelError
from spre_fx.plots import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from spre_fx.dynamics import MaskRow

_LIVE, _DEAD, _LINE = "tab:orange", "#ececec", "tab:blue"
_CHURN_MAP = "Blues"
_STRIP = {True: 0.30, False: 0.12}  # inches a site takes, with and without a SpRe branch
_GAP = 0.05


def plot_dynamics(rows: Sequence[MaskRow], path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw what a tracker recorded.

    On the left a strip per site with a row per tap, coloured while the tap is live: a tap that
    settles is an unbroken bar, one that wavers is not. On the right the churn of its mask B since
    the record before. Above each column the mean over all sites.

    Args:
        rows: A row per site and record.
        path: A file to write as well, in the format of its suffix.

    Raises:
        ModelError: If there are fewer than two records.
    """
    steps = sorted({row.step for row in rows})
    if len(steps) < 2:
        raise ModelError(
            f"MaskDynamics.plot: expected two records or more, found {len(steps)}. Call record "
            "while the model trains."
        )
    require_matplotlib("MaskDynamics.plot")
    from matplotlib.figure import Figure

    sites = _Sites(rows, steps)
    figure = Figure(figsize=(10, 2.4 + sites.height), dpi=150, layout="constrained")
    grid = figure.subplots(
        2,
        2,
        sharex=True,
        gridspec_kw={"height_ratios": [1.0, sites.height], "width_ratios": [1, 1]},
    )
    (mean_taps, mean_churn), (strips, churn) = grid
    _draw_mean(mean_taps, steps, sites.mean_live(), "live taps, mean over sites")
    _draw_mean(mean_churn, steps[1:], sites.mean_churn(), "mask churn, mean over sites")
    _draw_strips(strips, sites)
    _draw_churn(figure, churn, sites)
    for ax in (strips, churn):
        ax.set_xlabel("step", fontsize=8)
    if path is not None:
        figure.savefig(path)
    return figure


class _Sites:
    """The rows by site, and where each site is drawn: its top and bottom in inches."""

    def __init__(self, rows: Sequence[MaskRow], steps: list[int]) -> None:
        self.steps = steps
        self.rows: dict[str, list[MaskRow]] = {}
        for row in rows:
            self.rows.setdefault(row.site, []).append(row)
        self.extent: dict[str, tuple[float, float]] = {}
        self.height = 0.0
        for name, own in self.rows.items():
            top = self.height
            self.height += _STRIP[own[0].live_taps is not None]
            self.extent[name] = (top, self.height)
            self.height += _GAP

    def live(self, name: str) -> Tensor | None:
        """Live taps `(taps, records)`."""
        taps = [row.live_taps for row in self.rows[name]]
        return None if taps[0] is None else torch.tensor(taps).T

    def churn(self, name: str) -> Tensor:
        """Churn `(1, records - 1)`."""
        return torch.tensor([[row.churn for row in self.rows[name][1:]]])

    def mean_live(self) -> Tensor:
        """Mean fraction of live taps at each record."""
        found = [live for name in self.rows if (live := self.live(name)) is not None]
        means = [live.double().mean(0) for live in found]
        return torch.stack(means).mean(0) if means else torch.full((len(self.steps),), math.nan)

    def mean_churn(self) -> Tensor:
        """Mean churn at each record but the first."""
        return torch.cat([self.churn(name) for name in self.rows]).mean(0)


def _draw_mean(ax: Axes, steps: list[int], values: Tensor, title: str) -> None:
    from matplotlib.ticker import PercentFormatter

    ax.plot(steps, values.tolist(), color=_LINE, linewidth=1.5)
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_ylim(bottom=0)
    ax.margins(x=0)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    ax.tick_params(labelsize=7)
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _draw_strips(ax: Axes, sites: _Sites) -> None:
    """A row per tap, coloured while it is live; each record stands until the next one."""
    from matplotlib.colors import ListedColormap

    colours = ListedColormap([_DEAD, _LIVE])
    _label(ax, sites, "live taps: a row per tap, coloured while live")
    for name, (top, bottom) in sites.extent.items():
        live = sites.live(name)
        if live is not None:
            edges = torch.linspace(top, bottom, len(live) + 1)
            # The last record has no next one: it is drawn up to its own step, in no width.
            image = live[:, :-1].double().numpy()
            ax.pcolormesh(sites.steps, edges.numpy(), image, cmap=colours, vmin=0, vmax=1)
            between = edges[1:-1].tolist()
            ax.hlines(between, sites.steps[0], sites.steps[-1], color="white", linewidth=0.5)


def _draw_churn(figure: Figure, ax: Axes, sites: _Sites) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import PercentFormatter

    values = torch.cat([sites.churn(name) for name in sites.rows])
    norm = PowerNorm(0.5, 0, max(values.max().item(), 1e-3))  # most of the interest is near zero
    _label(ax, sites, "mask churn: share of kept weights that are new")
    ax.tick_params(labelleft=False)
    for (top, bottom), row in zip(sites.extent.values(), values, strict=True):
        ax.pcolormesh(sites.steps, [top, bottom], row[None].numpy(), cmap=_CHURN_MAP, norm=norm)
    bar = figure.colorbar(ScalarMappable(norm, _CHURN_MAP), ax=ax, fraction=0.04, pad=0.02)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def _label(ax: Axes, sites: _Sites, title: str) -> None:
    """The names of the sites at their strips, first on top."""
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_ylim(sites.height, 0)
    centres = [(top + bottom) / 2 for top, bottom in sites.extent.values()]
    ax.set_yticks(centres, list(sites.extent))
    ax.tick_params(labelsize=7)
    ax.tick_params(axis="y", length=0)
    ax.spines[:].set_visible(False)
