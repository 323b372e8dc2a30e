"""What was measured: rows that are printed as they come, and written as JSON and as Markdown."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision

Row = Mapping[str, Any]


@dataclass
class Report:
    """Tables of rows, and notes on what failed or was left out.

    Attributes:
        environment: Hardware and versions.
        tables: Title -> rows.
        notes: Sentences.
    """

    environment: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, table: str, row: Row) -> None:
        """Append a row and print it."""
        self.tables.setdefault(table, []).append(row)
        print("  " + "  ".join(f"{key}={text(value)}" for key, value in row.items()), flush=True)

    def note(self, sentence: str) -> None:
        """Append a note and print it."""
        self.notes.append(sentence)
        print(f"  NOTE: {sentence}", flush=True)

    def markdown(self) -> str:
        """All of it."""
        parts = ["# 2:4 on this GPU", markdown_table([self.environment])]
        parts += [f"## {title}\n\n{markdown_table(rows)}" for title, rows in self.tables.items()]
        if self.notes:
            parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(parts) + "\n"

    def write(self, out: Path) -> None:
        """Write `out`.json and `out`.md."""
        content = {"environment": self.environment, "tables": self.tables, "notes": self.notes}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(content, indent=1))
        out.with_suffix(".md").write_text(self.markdown())


def markdown_table(rows: Sequence[Row]) -> str:
    """A table with the columns of all rows, in the order they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[text(row.get(column)) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text(value: object) -> str:
    """A cell: numbers to three digits, nothing for None."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


def spread(times: Sequence[float]) -> str:
    """Median and quartiles of milliseconds."""
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.4g} ({low:.4g} to {high:.4g})"


def environment() -> dict[str, Any]:
    """The current GPU and the versions of what runs on it."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "GPU": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory GiB": round(properties.total_memory / 2**30),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "cuSPARSELt": torch.backends.cusparselt.version(),
        "Python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
