"""What a model costs: the counts of `spre_fx.cost`, their sums, and the tables that show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import floor
from typing import Any

from tabulate import tabulate


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


def total(sites: Iterable[SiteCost]) -> Totals:
    """The sums over some sites."""
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


def _plain(part: SiteCost | Totals) -> dict[str, Any]:
    return {"parameters": part.parameters.to_dict(), "flops": part.flops.to_dict()}


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
