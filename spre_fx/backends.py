"""Backends: what a folded N:M layer is lowered to.

A backend is asked once per layer and says what it makes of it and why. The next ones (sparse CPU
kernels, semi-structured tensors on GPUs) choose per layer among candidates; `dense` takes them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from spre_fx.patterns import Pattern


@dataclass(frozen=True)
class Lowered:
    """What a backend made of a layer.

    Attributes:
        module: What runs in its place.
        why: The reason for the choice, for people.
    """

    module: nn.Module
    why: str


class Backend(Protocol):
    """Lowers folded N:M layers."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    def lower(self, layer: nn.Module, pattern: Pattern) -> Lowered | str:
        """Lower one layer, or refuse it with a sentence.

        Args:
            layer: An ordinary conv or linear whose weight obeys `pattern`.
            pattern: The N:M pattern.
        """
        ...


@dataclass(frozen=True)
class DenseBackend:
    """The ordinary torch layer, zeros and all: runs everywhere, and no faster than dense."""

    name: str = "dense"

    def lower(self, layer: nn.Module, pattern: Pattern) -> Lowered:  # noqa: ARG002
        """The layer as it is."""
        return Lowered(layer, "runs as an ordinary dense layer")
