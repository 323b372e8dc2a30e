"""The table of what run.py measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import machine
import targets
from contenders import CONTENDERS, DENSE
from setting import MODES, SIZES, Setting
from tabulate import tabulate
from timing import quartiles, ratios

from spre_fx import Pattern

Row = dict[str, Any]
_HEADERS = (
    *("threads", "mode", "pattern", "contender", "step, ms", "over dense"),
    *("mask updates", "peak memory over dense", "live taps"),
)


@dataclass(frozen=True)
class Figure:
    """A number with what it should be.

    Attributes:
        value: The number.
        text: The same with its spread and unit.
        target: The most it may be, if that is set.
    """

    value: float
    text: str
    target: targets.Target | None

    @property
    def is_met(self) -> bool:
        """Whether it is within its target."""
        return self.target is None or self.value <= self.target.most

    def __str__(self) -> str:
        if self.target is None:
            return self.text
        return f"{self.text}; {self.target} {'met' if self.is_met else '**missed**'}"


def setting_of(row: Row) -> Setting:
    """The setting of a row."""
    return Setting(**row["setting"])


def figures(row: Row, contender: str) -> dict[str, Figure]:
    """What is measured relative to dense, and the share of mask updates; no more than there is."""
    found: dict[str, tuple[float, str]] = {}
    times, peaks, shares = row["milliseconds"], row["peak_bytes"], row["mask_share"]
    if contender != DENSE and {contender, DENSE} <= times.keys():
        low, median, high = quartiles(ratios(times[contender], times[DENSE]))
        found[targets.RATIO] = (median, f"{median:.3f}x ({low:.3f}-{high:.3f})")
    if contender != DENSE and {contender, DENSE} <= peaks.keys():
        ratio = peaks[contender] / peaks[DENSE]
        found[targets.MEMORY] = (ratio, f"{ratio:.2f}x")
    if contender in shares:
        found[targets.MASKS] = (shares[contender], f"{100 * shares[contender]:.2f}%")
    setting = setting_of(row)
    return {
        name: Figure(value, text, targets.find(name, contender, setting))
        for name, (value, text) in found.items()
    }


def result_line(row: Row) -> str:
    """What came out, for the terminal."""
    found = ((name, figures(row, name).get(targets.RATIO)) for name in row["contenders"])
    said = ", ".join(f"{name} {figure}" for name, figure in found if figure is not None)
    return f"{setting_of(row)}: over dense: {said or 'nothing'}"


def document(rows: Iterable[Row]) -> str:
    """The Markdown of all rows: a section for each machine, a table for each network in it."""
    machines: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=_order):
        machines[machine.sentence(row["machine"])].append(row)
    sections = "\n".join(_section(title, found) for title, found in machines.items())
    return f"""# Training

What a training step costs. A step is zero_grad, forward, cross-entropy, backward and SGD with
momentum and weight decay. All contenders of a line's setting took turns in one process, step by
step, on the same random images. "step" and "over dense" are medians (quartiles) of the rounds; the
latter of the ratios to the dense step of the same round, in the same mode. "reference" is SR-STE +
SpRe as Algorithm 1 has it, in operations of torch. Mask updates are the share of a step, which
torch.profiler saw in steps of their own, in eager mode. Peak memory is that of processes that train
nothing else, above what was there before the model, in eager mode: of one, or the median of three.
Targets are those of {_networks()}.

{sections}"""


def _networks() -> str:
    sizes = (f"{model} (batch {batch}, {px} px)" for model, (batch, px) in SIZES.items())
    return " and ".join(sizes)


def _order(row: Row) -> tuple[Any, ...]:
    setting = setting_of(row)
    density = -Pattern.parse(setting.pattern).density
    return (setting.network, setting.threads, MODES.index(setting.mode), density)


def _section(title: str, rows: list[Row]) -> str:
    networks: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        networks[setting_of(row).network].append(row)
    parts = [f"## {title}", _commands(rows), _verdict(rows)]
    for network, found in networks.items():
        parts += [f"### {network}", _table(found)]
    parts.append(_failures(rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def _commands(rows: list[Row]) -> str:
    days: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        days[row["command"]].add(row["date"])
    return "\n".join(f"- {', '.join(sorted(dates))}: `{name}`" for name, dates in days.items())


def _verdict(rows: list[Row]) -> str:
    """How many targets are met, and which are not."""
    found = [(row, name, what, figure) for row, name, what, figure in _with_targets(rows)]
    missed = [
        f"- {setting_of(row)}: {name}: {what} {figure.text}, target {figure.target}"
        for row, name, what, figure in found
        if not figure.is_met
    ]
    if not found:
        return ""
    met = f"{len(found) - len(missed)} of {len(found)} targets are met"
    return "\n".join([f"{met}; these are not:\n", *missed]) if missed else f"{met}."


def _with_targets(rows: list[Row]) -> Iterator[tuple[Row, str, str, Figure]]:
    for row in rows:
        for name in row["contenders"]:
            for what, figure in figures(row, name).items():
                if figure.target is not None:
                    yield row, name, what, figure


def _table(rows: list[Row]) -> str:
    cells = [
        _cells(row, contender)
        for row in rows
        for contender in CONTENDERS
        if contender in row["milliseconds"]
    ]
    return tabulate(cells, _HEADERS, "github", disable_numparse=True)


def _cells(row: Row, contender: str) -> tuple[object, ...]:
    setting, found = setting_of(row), figures(row, contender)
    low, median, high = quartiles(row["milliseconds"][contender])
    live = row["live_taps"].get(contender)
    return (
        *(setting.threads, setting.mode, setting.pattern, contender),
        f"{median:.4g} ({low:.4g}-{high:.4g})",
        *(found.get(name, "") for name in (targets.RATIO, targets.MASKS, targets.MEMORY)),
        "" if live is None else f"{100 * live:.0f}%",
    )


def _failures(rows: list[Row]) -> str:
    return "\n".join(
        f"- {setting_of(row)}: {name} failed: {reason}"
        for row in rows
        for name, reason in row["failed"].items()
    )
