"""Pictures of spatial sparsity, as Fig. 2 of Zhang et al., 2306.05612v3."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from spre_fx import masks, records
from spre_fx.errors import ModelError
from spre_fx.modules import NMLayer
from spre_fx.patterns import Pattern
from spre_fx.unstructured import UnstructuredMethod

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_MAP = "Blues_r"
_LIVE = "tab:orange"
_PANEL = 1.35  # inches, at least
_CELL = 0.18  # inches a tap needs for its value to be written in it
_LINE = 22  # characters of a title that fit above a panel


Models: TypeAlias = "nn.Module | Mapping[str, nn.Module]"


def plot_spatial_sparsity(models: Models, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw the spatial sparsity SS(B^U, u, v) of every N:M conv with more than one tap (Eq. 4).

    One heat map per site: the fraction of zeros at each tap of B^U, the unstructured mask of the
    main weights at rate 1 - N/M. The taps where it is below 1 - N/M are those where the SpRe branch
    works (Eq. 8); the live taps of a site with a branch are outlined, as the masks in force have
    them. Of a layer that an unstructured baseline trains, its own mask is drawn. Kernels of 3-D
    convs are shown as slices side by side, those of 1-D convs as a row.

    Several models are drawn as in the paper, method under method, in one scale of colours:
    `plot_spatial_sparsity({"SR-STE": first, "ASP": second})`.

    Needs matplotlib: `pip install 'spre_fx[plot]'`. The figure belongs to no window; in a notebook,
    `%matplotlib inline` shows it.

    Args:
        models: A prepared model, at any moment of its training, or several by label. Never
            modified.
        path: A file to write as well, in the format of its suffix.

    Raises:
        ModelError: If a model has no N:M conv in training with more than one tap.
        ImportError: If matplotlib is not installed.
    """
    labelled = models if isinstance(models, Mapping) else {"": models}
    methods = {label: _sites(model) for label, model in labelled.items()}
    if not methods:
        raise ModelError("plot_spatial_sparsity: expected a model, found an empty mapping.")
    require_matplotlib("plot_spatial_sparsity")
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    sites = [site for found in methods.values() for site in found.values()]
    names = list(dict.fromkeys(site.name for site in sites))
    columns, bands = _grid(len(names), len(methods))
    panel, height = _panel_size(sites)
    patterns = sorted({site.pattern for site in sites}, key=lambda pattern: pattern.density)
    titles = 0.25 if len(patterns) == 1 else 0.15 + 0.15 * len(methods)
    size = (max(panel * columns, 4), (height * len(methods) + titles) * bands + 0.7)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    colours = ScalarMappable(cmap=_MAP)
    colours.set_clim(*_limits(sites))
    axes = figure.subplots(bands * len(methods), columns, squeeze=False)
    for place, name in enumerate(names):
        for row, found in enumerate(methods.values()):
            ax = axes[place // columns * len(methods) + row, place % columns]
            if name in found:
                _draw(ax, found[name], colours, panel)
            heading = [*(_title(name) if row == 0 else []), *_pattern(found.get(name), patterns)]
            ax.set_title("\n".join(heading), fontsize=7)
    _tidy(axes, list(methods), len(names))
    _draw_scale(figure, axes, colours, patterns)
    if path is not None:
        figure.savefig(path)
    return figure


def require_matplotlib(caller: str) -> None:
    """Refuse to draw without matplotlib, with the command that installs it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{caller}: expected matplotlib, found it missing. Run: pip install 'spre_fx[plot]'"
        ) from error


@dataclass(frozen=True)
class _Site:
    """What is drawn of one conv: its spatial sparsity and its live taps, of the kernel's shape."""

    name: str
    pattern: Pattern
    sparsity: Tensor
    live: Tensor


@torch.no_grad()
def _sites(model: nn.Module) -> dict[str, _Site]:
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, NMLayer) or layer.weight.shape[2:].numel() == 1:
            continue
        sparsity = masks.spatial_sparsity(_unstructured_mask(layer))
        no_taps = torch.zeros_like(sparsity, dtype=torch.bool)
        live = no_taps if layer.live_taps is None else layer.live_taps(layer.weight, None)
        found[name] = _Site(name, layer.pattern, sparsity.cpu(), live.cpu())
    if not found:
        raise ModelError(
            "plot_spatial_sparsity: expected a prepared model with an N:M conv of more than one "
            f"tap, found {_found_instead(model)}"
        )
    return found


def _unstructured_mask(layer: NMLayer) -> Tensor:
    """B^U, or the very mask of a layer that is sparse without a pattern."""
    if isinstance(layer.method, UnstructuredMethod):
        return layer.masked_weight()[1]
    return masks.unstructured_mask(layer.weight, layer.pattern)


def _found_instead(model: nn.Module) -> str:
    if any(isinstance(module, NMLayer) for module in model.modules()):
        return "only linears and convs of one tap, which have no spatial sparsity."
    if any("pattern" in records.read(module) for module in model.modules()):
        return (
            "a deployed one, whose kernels are final and hold no dense weights to prune. Draw the "
            "prepared model that finalize was given."
        )
    return f"a dense {type(model).__name__}. Call prepare on it first."


def _grid(sites: int, methods: int) -> tuple[int, int]:
    """Columns and bands: somewhat wider than high, with few places left over."""
    most = max(4, math.ceil(math.sqrt(1.6 * sites * methods)))
    bands = math.ceil(sites / most)
    return math.ceil(sites / bands), bands


def _panel_size(sites: list[_Site]) -> tuple[float, float]:
    """Width and height of a panel in inches, with room for a value per tap."""
    images = [_image(site.sparsity) for site in sites]
    width = max(_PANEL, max(image.shape[1] for image in images) * _CELL)
    return width, width * max(image.shape[0] / max(image.shape) for image in images) + 0.05


def _limits(sites: list[_Site]) -> tuple[float, float]:
    """The range of the colours: all that is shown, and 1 - N/M, with a little to spare."""
    values = torch.cat([site.sparsity.flatten() for site in sites]).tolist()
    values += [1 - site.pattern.density for site in sites]
    spare = 0.02 * (max(values) - min(values)) or 0.005
    return min(values) - spare, max(values) + spare


def _image(taps: Tensor) -> Tensor:
    """A value per tap as `(rows, columns)`: slices of a 3-D kernel in a row, NaN between them."""
    slices = taps.double().reshape(-1, *(1, *taps.shape)[-2:])
    padded = nn.functional.pad(slices, (0, 1), value=math.nan)
    return padded.transpose(0, 1).flatten(1)[:, :-1]


def _draw(ax: Axes, site: _Site, colours: ScalarMappable, panel: float) -> None:
    from matplotlib.patches import Rectangle

    image, live = _image(site.sparsity), _image(site.live)
    norm: Any = colours.norm
    ax.imshow(image.numpy(), cmap=colours.cmap, norm=norm)
    ax.set_anchor("N")
    for row, column in (live == 1).nonzero().tolist():
        corner = (column - 0.45, row - 0.45)
        ax.add_patch(Rectangle(corner, 0.9, 0.9, fill=False, edgecolor=_LIVE, linewidth=1.5))
    if panel / max(image.shape) < _CELL:
        return
    digits = 1 if max(image.shape) <= 3 else 0
    for row, column in (~image.isnan()).nonzero().tolist():
        value = image[row, column].item()
        ink = "white" if norm(value) < 0.5 else "black"
        text = f"{100 * value:.{digits}f}"
        ax.text(column, row, text, color=ink, fontsize=6, ha="center", va="center")


def _title(name: str) -> list[str]:
    """The end of a site's name, in two lines broken at a dot."""
    lines = textwrap.wrap(name.replace(".", ". "), _LINE, break_long_words=False)
    if len(lines) > 2:
        lines = [f"…{lines[-2]}", lines[-1]]
    lines = [line.replace(". ", ".") for line in lines]
    return [line if len(line) <= _LINE else f"…{line[1 - _LINE :]}" for line in lines]


def _pattern(site: _Site | None, patterns: list[Pattern]) -> list[str]:
    """The pattern of a site, where there are several."""
    return [str(site.pattern)] if site is not None and len(patterns) > 1 else []


def _tidy(axes: NDArray[Any], labels: list[str], sites: int) -> None:
    """Hide every frame, drop the places left over, and write the labels before their rows."""
    columns = axes.shape[1]
    for (row, column), ax in np.ndenumerate(axes):
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        if column == 0:
            ax.set_ylabel(labels[row % len(labels)], fontsize=8)
        if row // len(labels) * columns + column >= sites:
            ax.remove()


def _draw_scale(
    figure: Figure, axes: NDArray[Any], colours: ScalarMappable, patterns: list[Pattern]
) -> None:
    """The colour bar under the panels, with 1 - N/M marked for each pattern."""
    from matplotlib.ticker import PercentFormatter

    left = [ax for ax in axes.flat if ax.figure is not None]
    bar = figure.colorbar(colours, ax=left, location="bottom", panchor=False, aspect=40, pad=0.03)
    bar.ax.xaxis.set_major_formatter(PercentFormatter(1))
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    bar.set_label(
        "spatial sparsity: zeros at a tap of the unstructured mask;  outlined: live taps",
        fontsize=7,
    )
    for pattern in patterns:
        threshold = 1 - pattern.density
        bar.ax.axvline(threshold, color=_LIVE, linewidth=2)
        bar.ax.annotate(
            f"$1-N/M$ of {pattern}",
            (threshold, 1),
            (0, 2),
            xycoords=bar.ax.get_xaxis_transform(),
            textcoords="offset points",
            fontsize=7,
            ha="center",
        )
