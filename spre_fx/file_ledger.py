"""What `save` wrote, in bytes: how much of a dense file it takes, and which part takes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate


@dataclass(frozen=True)
class LedgerLine:
    """The bytes of one N:M weight.

    Attributes:
        name: The layer.
        pattern: "N:M".
        shape: `(C_out, C_in/groups, *kernel)`.
        dense: Its bytes were it stored dense.
        values: Bytes of its values, zeros and all where it could not be packed.
        indices: Bytes of their positions; 0 where it could not be packed.
    """

    name: str
    pattern: str
    shape: tuple[int, ...]
    dense: int
    values: int
    indices: int

    @property
    def packed(self) -> bool:
        """Whether it is stored as values and positions."""
        return self.indices > 0


@dataclass(frozen=True)
class SavedFile:
    """A file that `save` wrote. Print it for the ledger.

    Attributes:
        path: Where it is.
        lines: Every layer with an N:M pattern.
        other: Bytes of all other tensors, which are stored as they are.
        size: Bytes of the file.
    """

    path: Path
    lines: tuple[LedgerLine, ...]
    other: int
    size: int

    @property
    def dense(self) -> int:
        """Bytes of all tensors, were each stored dense."""
        return sum(line.dense for line in self.lines) + self.other

    def __str__(self) -> str:
        return f"{self.layers()}\n\n{self.totals()}"

    def layers(self) -> str:
        """The N:M layers as a plain text table."""
        rows = [
            (
                line.name,
                "x".join(map(str, line.shape)),
                line.pattern if line.packed else f"{line.pattern}, kept dense",
                f"{line.dense:,}",
                f"{line.values:,}",
                f"{line.indices:,}",
                _share(line.values + line.indices, line.dense),
            )
            for line in self.lines
        ]
        headers = ("layer", "weight", "pattern", "dense bytes", "values", "indices", "of dense")
        return tabulate(rows, headers, colalign=_align(3, 4), disable_numparse=True)

    def totals(self) -> str:
        """The parts of the file as a plain text table."""
        weights = sum(line.dense for line in self.lines)
        values = sum(line.values for line in self.lines)
        indices = sum(line.indices for line in self.lines)
        rest = self.size - values - indices - self.other
        rows = [
            ("N:M weights: values", weights, values, weights),
            ("N:M weights: indices", 0, indices, weights),
            ("all other tensors", self.other, self.other, self.other),
            ("graph, names, checksums", 0, rest, self.dense),
            ("file", self.dense, self.size, self.dense),
        ]
        text = [
            (name, f"{dense:,}" if dense else "", f"{stored:,}", _share(stored, whole))
            for name, dense, stored, whole in rows
        ]
        headers = ("part", "dense bytes", "bytes", "of dense")
        return tabulate(text, headers, colalign=_align(1, 3), disable_numparse=True)


def _align(left: int, right: int) -> tuple[str, ...]:
    return ("left",) * left + ("right",) * right


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else ""
