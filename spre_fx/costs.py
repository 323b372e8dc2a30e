"""`cost`: parameters and FLOPs of a model, in training and at test, against the dense model.

What Table 9 of Zhang et al., 2306.05612v3 counts. The paper states no rule; the one here gives its
SR-STE and test columns (`benchmarks/table9.py` sets all of them side by side).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import floor, prod
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from spre_fx import records
from spre_fx.inspection import as_view
from spre_fx.modules import NMLayer
from spre_fx.passes.branches import spre_mask
from spre_fx.passes.graph_view import Candidate, GraphView
from spre_fx.passes.matcher import Site, match_site
from spre_fx.passes.positions import Runs, count_runs
from spre_fx.passes.specialise_to_eval import SpecialiseToEval


@dataclass(frozen=True)
class Amount:
    """So many parameters, or so many FLOPs.

    Attributes:
        dense_train: In training, were the layer dense.
        train: In training as it is; None for a deployed layer, which is not trained.
        dense_test: At test, were the layer dense.
        test: At test, the branches folded.
    """

    dense_train: int
    train: int | None
    dense_test: int
    test: int

    @property
    def train_ratio(self) -> Fraction | None:
        """`train` relative to dense, exactly; None where there is nothing to compare."""
        if self.train is None or not self.dense_train:
            return None
        return Fraction(self.train, self.dense_train)

    @property
    def test_ratio(self) -> Fraction | None:
        """`test` relative to dense, exactly; None where there is nothing to compare."""
        return Fraction(self.test, self.dense_test) if self.dense_test else None

    def to_dict(self) -> dict[str, int | float | None]:
        """Counts and ratios as plain numbers."""
        ratios = {"train_ratio": self.train_ratio, "test_ratio": self.test_ratio}
        floats = {name: None if r is None else float(r) for name, r in ratios.items()}
        return asdict(self) | floats


@dataclass(frozen=True)
class SiteCost:
    """What one conv or linear costs.

    Attributes:
        name: Its qualified name (the node's name for a functional call).
        pattern: "N:M", or None for a dense layer.
        weight_shape: `(C_out, C_in/groups, *kernel)`.
        live_taps: Live taps of the SpRe branch and taps of the kernel, or None.
        calls: How often a forward runs it. 0 where that cannot be seen: never called, or its
            weight read by a module that is kept whole; its FLOPs are then 0.
        parameters: Its weights.
        flops: Its FLOPs for the example input.
    """

    name: str
    pattern: str | None
    weight_shape: tuple[int, ...]
    live_taps: tuple[int, int] | None
    calls: int
    parameters: Amount
    flops: Amount


@dataclass(frozen=True)
class Totals:
    """Sums over some of the sites."""

    parameters: Amount
    flops: Amount


@dataclass(frozen=True)
class Cost:
    """What a model costs. Print it, or take `to_dict()`.

    Attributes:
        sites: Every conv and linear, in the order of the model's modules.
        sparse: Totals over the layers that carry a pattern, which is what Table 9 counts.
        model: Totals over every conv and linear.
    """

    sites: tuple[SiteCost, ...]
    sparse: Totals
    model: Totals

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """Plain text tables."""
        totals = [
            _total_row("N:M layers", self.sparse),
            _total_row("all convs and linears", self.model),
        ]
        left, right = ("left",), ("right",)
        sites = tabulate(
            [_site_row(site) for site in self.sites],
            _SITE_HEADERS,
            colalign=3 * left + 8 * right,
            disable_numparse=True,
        )
        sums = tabulate(totals, _TOTAL_HEADERS, colalign=left + 7 * right, disable_numparse=True)
        return f"{sites}\n\n{sums}\n\n{_LEGEND}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        sites = [
            {
                "name": site.name,
                "pattern": site.pattern,
                "weight_shape": list(site.weight_shape),
                "live_taps": site.live_taps and list(site.live_taps),
                "calls": site.calls,
            }
            | _plain(site)
            for site in self.sites
        ]
        return {"sites": sites, "sparse": _plain(self.sparse), "model": _plain(self.model)}


@torch.no_grad()
def cost(model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> Cost:
    """Count parameters and FLOPs of a dense, prepared or deployed model, from its actual masks.

    The rule:

    - Counted are the weights of convs and linears; biases and batch norms are not.
    - A FLOP is a multiplication or an addition: two for each weight that is not masked, at each
      position of the output (of the input for a transposed conv), for every image of the batch.
      Positions in the padding count.
    - A training step is a forward and two products of the same size: the gradients of the input and
      of the weight. The forward runs under the mask, both gradients dense, for the transposed mask
      is not N:M, and removed weights receive gradients. That is (N/M + 2)/3 of dense.
    - The SpRe branch costs what B^S keeps, in all three products: weights outside it take no
      gradient.
    - In training W counts whole, since any weight can return; W^S counts at the live taps, with all
      channels there. At test what counts is the merged kernel: the weights that B or B^S keeps; for
      a deployed layer, those that are not zero.

    No layer is computed: sizes come from a run on fake tensors, in evaluation mode.

    Args:
        model: A GraphModule, or a module to trace first. Never modified.
        example_input: What the model is called with, or a tuple of its positional arguments. Only
            shapes and types matter.

    Raises:
        TraceError: If `torch.fx` cannot follow the model.
        ModelError: If the model cannot take the input.
    """
    view = as_view(model)
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    runs = count_runs(view, inputs)
    at_test = GraphView(SpecialiseToEval()(view.graph_module).graph_module).candidates
    sites = [
        _site_cost(view, candidate, runs[name], tested=name in at_test)
        for name, candidate in view.candidates.items()
    ]
    return Cost(
        sites=tuple(sites),
        sparse=_total(site for site in sites if site.pattern is not None),
        model=_total(sites),
    )


def _site_cost(view: GraphView, candidate: Candidate, runs: Runs, *, tested: bool) -> SiteCost:
    pattern, size = _pattern(candidate.module), prod(runs.weight_shape)
    trained = pattern is None or isinstance(candidate.module, NMLayer)
    kept = _kept(view, candidate, size)
    live, taps = kept.live_taps or (0, 1)
    forward = 2 * runs.positions  # FLOPs of one weight
    return SiteCost(
        name=candidate.name,
        pattern=pattern,
        weight_shape=runs.weight_shape,
        live_taps=kept.live_taps,
        calls=runs.calls,
        parameters=Amount(
            dense_train=size,
            train=size + size * live // taps if trained else None,
            dense_test=size * tested,
            test=kept.merged * tested,
        ),
        flops=Amount(
            dense_train=3 * forward * size,
            train=forward * (kept.main + 2 * size + 3 * kept.spre) if trained else None,
            dense_test=forward * size * tested,
            test=forward * kept.merged * tested,
        ),
    )


@dataclass(frozen=True)
class _Kept:
    """How many weights of a layer B keeps, B^S, and either; the live taps of B^S, and all taps."""

    main: int
    spre: int
    merged: int
    live_taps: tuple[int, int] | None


def _kept(view: GraphView, candidate: Candidate, size: int) -> _Kept:
    layer = candidate.module
    if layer is None or _pattern(layer) is None:
        return _Kept(size, 0, size, None)
    if not isinstance(layer, NMLayer):
        count = int(layer.weight.count_nonzero())
        return _Kept(count, 0, count, None)
    mask = layer.masked_weight()[1]
    count = int(mask.count_nonzero())
    site = match_site(view, candidate)
    spre = spre_mask(site) if isinstance(site, Site) else None
    if spre is None:
        return _Kept(count, 0, count, None)
    live = spre.flatten(2).any(1).any(0)
    return _Kept(
        main=count,
        spre=int(spre.count_nonzero()),
        merged=int((mask | spre).count_nonzero()),
        live_taps=(int(live.count_nonzero()), live.numel()),
    )


def _pattern(layer: nn.Module | None) -> str | None:
    if layer is None:
        return None
    return str(layer.pattern) if isinstance(layer, NMLayer) else records.read(layer).get("pattern")


def _plain(part: SiteCost | Totals) -> dict[str, Any]:
    return {"parameters": part.parameters.to_dict(), "flops": part.flops.to_dict()}


def _total(sites: Iterable[SiteCost]) -> Totals:
    parts = list(sites)
    return Totals(_sum([s.parameters for s in parts]), _sum([s.flops for s in parts]))


def _sum(amounts: Sequence[Amount]) -> Amount:
    """Sums; no training figure where one of the layers has none, and none at all without layers."""
    train = [amount.train for amount in amounts if amount.train is not None]
    return Amount(
        dense_train=sum(amount.dense_train for amount in amounts),
        train=sum(train) if len(train) == len(amounts) else None,
        dense_test=sum(amount.dense_test for amount in amounts),
        test=sum(amount.test for amount in amounts),
    )


def times(ratio: Fraction | None) -> str:
    """A ratio as the paper prints it: two decimals, halves up (1/8 is 0.13)."""
    if ratio is None:
        return "-"
    hundredths = floor(100 * ratio + Fraction(1, 2))
    return f"{hundredths / 100:.2f}x"


def _short(count: int) -> str:
    """Three digits and a unit."""
    power = min(max(len(str(count)) - 1, 0) // 3, len(_UNITS) - 1)
    return f"{count / 1000**power:.3g}{_UNITS[power]}"


_UNITS = ("", " k", " M", " G", " T", " P")
_LEGEND = (
    "train, test: relative to dense.  FLOPs of a layer: one dense forward; training takes three."
)
_SITE_HEADERS = (
    "site",
    "weight",
    "pattern",
    "live taps",
    "calls",
    "parameters",
    "train",
    "test",
    "FLOPs",
    "train",
    "test",
)
_TOTAL_HEADERS = (
    "total",
    "parameters",
    "train",
    "test",
    "FLOPs to train",
    "train",
    "FLOPs at test",
    "test",
)


def _site_row(site: SiteCost) -> Sequence[str]:
    return (
        site.name,
        "x".join(map(str, site.weight_shape)),
        site.pattern or "",
        "{}/{}".format(*site.live_taps) if site.live_taps else "",
        str(site.calls),
        f"{site.parameters.dense_train:,}",
        times(site.parameters.train_ratio),
        times(site.parameters.test_ratio),
        _short(site.flops.dense_train // 3),
        times(site.flops.train_ratio),
        times(site.flops.test_ratio),
    )


def _total_row(name: str, total: Totals) -> Sequence[str]:
    return (
        name,
        f"{total.parameters.dense_train:,}",
        times(total.parameters.train_ratio),
        times(total.parameters.test_ratio),
        _short(total.flops.dense_train),
        times(total.flops.train_ratio),
        _short(total.flops.dense_test),
        times(total.flops.test_ratio),
    )
