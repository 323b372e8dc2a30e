"""The table and the plot of what run.py measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import engines
import machine
import networks
from tabulate import tabulate

Row = dict[str, Any]
_AXES = ("model", "pixels", "batch", "threads")


def setting_name(setting: dict[str, Any]) -> str:
    """A setting on one line."""
    threads = f"{setting['threads']} thread{'s' * (setting['threads'] != 1)}"
    return (
        f"{setting['model']} {setting['pixels']} px, batch {setting['batch']}, {threads}, "
        f"{setting['dtype']}"
    )


def result_line(row: Row) -> str:
    """What came out, for the terminal."""
    ours = [
        f"{name} {_speedup(found['speedup'])}"
        for name, found in row["summary"].items()
        if "speedup" in found
    ]
    return f"{setting_name(row['setting'])}: over {row['fastest'] or 'nothing'}: {', '.join(ours)}"


def document(rows: Iterable[Row]) -> str:
    """The Markdown of all rows: a section for each machine, a table for each type in it."""
    machines: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        backend = f"backend {row['backend']!r}"
        machines[f"{machine.sentence(row['machine'])}; {backend}"].append(row)
    sections = "\n".join(_section(title, found) for title, found in machines.items())
    return f"""# Inference

Written by `python benchmarks/inference/run.py`. Milliseconds of a call, median (quartiles); after
them, for N:M networks, how many times faster than the fastest dense engine of the line, in bold:
the median (quartiles) of the ratios of each round. All engines of a line took turns in one process,
on the same input; all outputs agree with float64. More percentiles are in the rows (.jsonl).

{sections}"""


def _section(title: str, rows: list[Row]) -> str:
    parts = [f"## {title}"]
    for dtype in engines.DTYPES:
        typed = [row for row in rows if row["setting"]["dtype"] == dtype]
        if typed:
            parts += [f"### {dtype}", _worst(typed), _table(typed, rows)]
    parts.append(_reasons(rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def _worst(rows: list[Row]) -> str:
    """The least speed-up of all, and how many are below 1."""
    found = [
        (row["summary"][name]["speedup"][2], f"{name} on {setting_name(row['setting'])}")
        for row in rows
        for name in networks.PATTERNS
        if "speedup" in row["summary"].get(name, {})
    ]
    if not found:
        return ""
    ratio, where = min(found)
    below = sum(ratio < 1 for ratio, _ in found)
    return f"{below} of {len(found)} medians are below 1.0x; the least is {ratio:.2f}x, {where}."


def _table(rows: list[Row], all_rows: list[Row]) -> str:
    own = {tuple(row["setting"].values()): row for row in all_rows}
    cells = [
        (
            *(row["setting"][axis] for axis in _AXES),
            *(_peer_cell(row, name) for name in engines.PEERS),
            *(_own_cell(row, name, own) for name in networks.PATTERNS),
        )
        for row in sorted(rows, key=_order)
    ]
    headers = (*_AXES, *engines.PEERS, *networks.PATTERNS)
    return tabulate(cells, headers, "github", disable_numparse=True)


def _order(row: Row) -> tuple[int, ...]:
    setting = row["setting"]
    model = setting["model"]
    place = networks.MODELS.index(model) if model in networks.MODELS else len(networks.MODELS)
    return (place, *(setting[axis] for axis in _AXES[1:]))


def _peer_cell(row: Row, name: str) -> str:
    cell = _milliseconds(row, name)
    return f"**{cell}**" if name == row["fastest"] else cell


def _own_cell(row: Row, name: str, rows: dict[tuple[Any, ...], Row]) -> str:
    parts = [_milliseconds(row, name)]
    if ratios := row["summary"].get(name, {}).get("speedup"):
        parts.append(_speedup(ratios))
    single = rows.get(tuple((row["setting"] | {"dtype": "float32"}).values()), {})
    if row["setting"]["dtype"] != "float32" and name in single.get("summary", {}):
        gain = single["summary"][name]["ms"][2] / row["summary"][name]["ms"][2]
        parts.append(f"{gain:.2f}x our float32")
    return ", ".join(parts)


def _milliseconds(row: Row, name: str) -> str:
    if name not in row["summary"]:
        return "failed" if name in row["failed"] else "-"
    _, low, median, high, _ = row["summary"][name]["ms"]
    return f"{median:.4g} ({low:.4g}-{high:.4g})"


def _speedup(ratios: Sequence[float]) -> str:
    _, low, median, high, _ = ratios
    return f"{median:.2f}x ({low:.2f}-{high:.2f})"


def _reasons(rows: list[Row]) -> str:
    """Every cell without a time, by engine and reason."""
    where: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in rows:
        for kind in ("left_out", "failed"):
            for name, reason in row[kind].items():
                where[kind.replace("_", " "), name, reason].append(setting_name(row["setting"]))
    lines = []
    for (kind, name, reason), names in where.items():
        place = names[0] if len(names) == 1 else f"{len(names)} settings"
        lines.append(f"- {name} {kind} ({place}): {reason}")
    return "\n".join(lines)


def plot(rows: Iterable[Row], path: Path) -> None:
    """Draw the speed-ups over pattern, one line a setting, one panel for each type."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    rows = list(rows)
    dtypes = [d for d in engines.DTYPES if any(row["setting"]["dtype"] == d for row in rows)]
    figure, panels = plt.subplots(
        1, len(dtypes), sharey=True, squeeze=False, layout="constrained", figsize=(7, 4)
    )
    for dtype, panel in zip(dtypes, panels[0], strict=True):
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(title=dtype, yscale="log", ylabel="times faster than the fastest dense engine")
        for row in rows:
            if row["setting"]["dtype"] == dtype:
                _draw(panel, row)
        handles = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
        panel.legend(handles.values(), handles.keys(), fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw(panel: Any, row: Row) -> None:
    drawn = [p for p in networks.PATTERNS if "speedup" in row["summary"].get(p, {})]
    medians = [row["summary"][p]["speedup"][2] for p in drawn]
    places = [networks.PATTERNS.index(p) for p in drawn]
    model = row["setting"]["model"]
    color = f"C{networks.MODELS.index(model) % 10}" if model in networks.MODELS else "gray"
    panel.plot(places, medians, marker=".", alpha=0.6, color=color, label=model)
    panel.set_xticks(range(len(networks.PATTERNS)), networks.PATTERNS)
