"""Measurements as lines of JSON in a file, written as they come, so that a run can be resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path, key: Callable[[Row], str]) -> dict[str, Row]:
    """The rows written so far, by key; the last of a key counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # a kill cuts the last short
    return {key(row): row for row in rows}


def append(path: Path, row: Row) -> None:
    """Add a row, on a line of its own even after one that was cut short."""
    before = path.read_text() if path.exists() else ""
    with path.open("a") as file:
        file.write(("\n" if before and not before.endswith("\n") else "") + json.dumps(row) + "\n")
