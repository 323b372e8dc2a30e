"""Backends: the sparse ways to run a folded N:M layer on some kind of machine.

A backend is asked once per layer for the ways it has, or refuses with a sentence. Which of them
runs, or the dense layer after all, is chosen by measuring (`choice`), or by the backend's own rule
where there is nothing to measure with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard, runtime_checkable

from torch import Tensor, nn

from spre_fx.modules import Layer
from spre_fx.patterns import Pattern


@runtime_checkable
class LoweredLayer(Protocol):
    """A module that runs an N:M layer, and can give back the dense layer that it stands for.

    Called with `(x, residual=None)` it computes `activation(layer(x) + residual)`, whatever can be
    added to the layer's output.

    Attributes:
        activation: What it applies to its output: "relu", "relu6", "silu", "hardswish" or None.
    """

    activation: str | None

    def to_dense(self) -> Layer:
        """The ordinary torch layer with the same weights, without the activation."""
        ...


@runtime_checkable
class Tunable(Protocol):
    """A module that can fit what its library leaves open, such as an algorithm, to its input."""

    def tune(self, x: Tensor) -> None:
        """Choose for inputs like x, on their device."""
        ...


def is_lowered(module: nn.Module | None) -> bool:
    """Whether `module` is what a backend made of a layer, other than that layer itself."""
    return isinstance(module, LoweredLayer)


def is_layer(module: nn.Module | None) -> TypeGuard[Layer]:
    """Whether `module` is a conv or linear, or what a backend made of one.

    The latter has the `weight` of the dense layer, shape and values, as a property.
    """
    return isinstance(module, Layer) or is_lowered(module)


@dataclass(frozen=True)
class Lowered:
    """One way to run a layer.

    Attributes:
        module: What runs in its place; for the dense way, the layer itself.
        kind: What it is called: "dense", "cpu", "cusparselt" and so on.
        why: The reason for the choice, for people.
        price: How many times as fast as the others it has to be, for the memory that it takes.
    """

    module: nn.Module
    kind: str
    why: str
    price: float = 1.0


def dense(layer: nn.Module, why: str) -> Lowered:
    """The ordinary torch layer, zeros and all."""
    return Lowered(layer, "dense", why)


class Backend(Protocol):
    """Knows the sparse ways to run folded N:M layers."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def machine(self) -> str:
        """The machine and the version of the kernels: times are those of both."""
        ...

    def candidates(self, layer: nn.Module, pattern: Pattern) -> list[Lowered] | str:
        """The sparse ways to run a layer, or a sentence that refuses it.

        Args:
            layer: An ordinary conv or linear whose weight obeys `pattern`, in evaluation mode.
            pattern: The N:M pattern.
        """
        ...

    def rule(
        self,
        layer: nn.Module,
        pattern: Pattern,
        candidates: Sequence[Lowered],
        input_shape: tuple[int, ...] | None,
    ) -> Lowered:
        """The choice without measuring: one of the candidates, or the dense layer.

        Args:
            layer: The dense layer.
            pattern: The N:M pattern.
            candidates: What `candidates` returned for it.
            input_shape: The shape of its input, None where that is unknown.
        """
        ...


@dataclass(frozen=True)
class DenseBackend:
    """No sparse way at all: every layer is an ordinary torch layer, which runs everywhere.

    Attributes:
        why: The reason, for people.
    """

    why: str = "runs as an ordinary dense layer"
    name: str = "dense"
    machine: str = ""

    def candidates(self, layer: nn.Module, pattern: Pattern) -> list[Lowered]:  # noqa: ARG002
        """None, whatever the layer."""
        return []

    def rule(
        self,
        layer: nn.Module,
        pattern: Pattern,  # noqa: ARG002
        candidates: Sequence[Lowered],  # noqa: ARG002
        input_shape: tuple[int, ...] | None,  # noqa: ARG002
    ) -> Lowered:
        """The layer as it is."""
        return dense(layer, self.why)
