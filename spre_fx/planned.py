"""Runs a planned graph: steps of the engine over one block of memory, and what torch runs itself.

A `PlannedProgram` is made for inputs of certain shapes and for a number of threads. It is never
changed once made; what a call needs for itself (activations, scratch, addresses) is in a
`Workspace`, which the call takes from a pool and puts back. So a second call allocates nothing but
its outputs, and calls at the same time do not meet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_map

from spre_fx.engine import Engine, Program
from spre_fx.liveness import ALIGNMENT

ARENA = 0  # the number of the buffer that holds activations
_CACHED = 12 << 20  # bytes of activations that a last-level cache keeps beside the weights


class ShapesChangedError(Exception):
    """A value that torch computes has another shape than in the run that was planned."""


@dataclass(frozen=True)
class Location:
    """Where a value lies.

    Attributes:
        buffer: The number of the buffer.
        offset: Bytes from its start.
        shape: `(N, C, H, W)` of an image, channels-last in memory, or `(..., C)` of rows.
        dtype: Its type.
        stride: Elements from one pixel to the next: C, or more within a concatenation.
    """

    buffer: int
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: int

    @property
    def strides(self) -> tuple[int, ...]:
        """As torch counts them, in elements."""
        sizes = (self.shape[0], *self.shape[2:]) if len(self.shape) == 4 else self.shape[:-1]
        found, step = [], self.stride
        for size in reversed(sizes):
            found.append(step)
            step *= size
        found.reverse()
        return (found[0], 1, *found[1:]) if len(self.shape) == 4 else (*found, 1)


@dataclass(frozen=True, eq=False)
class Native:
    """Steps that the engine runs in one call.

    Attributes:
        steps: The steps.
        feeds: The values of torch that they read, and the buffers that these are put in.
    """

    steps: Program
    feeds: Mapping[Node, Location]


@dataclass(frozen=True, eq=False)
class Call:
    """A node that torch runs.

    Attributes:
        node: The node.
        run: Computes it from its arguments.
        views: Where those of its arguments lie that the engine computed.
    """

    node: Node
    run: Callable[..., Any]
    views: Mapping[Node, Location]


@dataclass(frozen=True)
class PlanRow:
    """One step, for people: its name, what it is, its output, and where that lies."""

    step: str
    kind: str
    shape: tuple[int, ...] | None
    size: int | None
    place: str
    offset: int | None


@dataclass(frozen=True)
class Plan:
    """What runs in place of a graph, for inputs of certain shapes. Print it.

    Attributes:
        rows: The steps in their order.
        arena: Bytes of the block that holds all activations.
        activations: Bytes that all activations take one beside the other.
        engine_calls: How many runs of steps go to the engine in one call each.
        images: How many images of the batch this is for; None: for all of them.
    """

    rows: tuple[PlanRow, ...]
    arena: int
    activations: int
    engine_calls: int
    images: int | None = None

    def __str__(self) -> str:
        used: dict[object, int] = {}
        table = []
        for row in self.rows:
            place = (row.place, row.offset)
            times = used.get(place, 0) if row.offset is not None else None
            used[place] = (times or 0) + 1
            shape = None if row.shape is None else "x".join(map(str, row.shape))
            table.append((row.step, row.kind, shape, row.size, row.place, row.offset, times))
        headers = ("step", "kind", "shape", "bytes", "in", "offset", "place used before")
        together = "" if self.images is None else f" for every {self.images} images of the batch"
        share = f" ({self.arena / self.activations:.0%})" if self.activations else ""
        calls = "1 call" if self.engine_calls == 1 else f"{self.engine_calls} calls"
        return (
            f"{tabulate(table, headers, intfmt=',')}\n\n"
            f"{calls} of the engine{together}. Activations take {self.arena:,} "
            f"bytes of memory{share}, each in a place of its own {self.activations:,}."
        )


@dataclass(eq=False)
class Workspace:
    """What one call needs for itself."""

    arena: Tensor
    scratch: Tensor
    addresses: list[int]


@dataclass(frozen=True, eq=False)
class PlannedProgram:
    """A planned graph for inputs of certain shapes.

    Attributes:
        engine: What runs its steps.
        threads: On how many threads.
        inputs: The nodes of the inputs.
        items: What to run, in order.
        drops: For each item, the values of torch that nothing reads after it.
        outputs: The tensors that each call makes for the values that leave, one for each buffer.
        results: Where the values lie that the engine computed and that leave.
        result: What the graph returns, with nodes in place of values.
        arena: Bytes of activations.
        scratch: Bytes of scratch.
        buffers: The addresses of all buffers, 0 for those that each call fills in.
        keep: The tensors behind those addresses.
        plan: All of it for people.
    """

    engine: Engine
    threads: int
    inputs: tuple[Node, ...]
    items: tuple[Native | Call, ...]
    drops: tuple[tuple[Node, ...], ...]
    outputs: tuple[Location, ...]
    results: Mapping[Node, Location]
    result: Any
    arena: int
    scratch: int
    buffers: tuple[int, ...]
    keep: tuple[Tensor, ...]
    plan: Plan
    pool: deque[Workspace] = field(default_factory=deque)

    def __call__(self, inputs: Sequence[Any]) -> Any:
        """Run on inputs of the shapes that this was planned for.

        Raises:
            ShapesChangedError: If what torch computes on the way has other shapes than planned.
        """
        try:
            workspace = self.pool.pop()
        except IndexError:
            workspace = self._new_workspace()
        try:
            return self._run(workspace, inputs)
        finally:
            self.pool.append(workspace)

    def _new_workspace(self) -> Workspace:
        with torch.inference_mode(mode=False):  # what is made here serves calls of either mode
            arena, scratch = (
                torch.empty(size + ALIGNMENT, dtype=torch.uint8, device="cpu")
                for size in (self.arena, self.scratch)
            )
        addresses = list(self.buffers)
        addresses[ARENA] = arena.data_ptr()
        return Workspace(arena, scratch, addresses)

    def _run(self, workspace: Workspace, inputs: Sequence[Any]) -> Any:
        values: dict[Node, Any] = dict(zip(self.inputs, inputs, strict=True))
        leaving: dict[int, Tensor] = {}
        for each in self.outputs:
            y = torch.empty_strided(each.shape, each.strides, dtype=each.dtype, device="cpu")
            leaving[each.buffer], workspace.addresses[each.buffer] = y, y.data_ptr()
        for item, drops in zip(self.items, self.drops, strict=True):
            if isinstance(item, Native):
                self._run_steps(item, workspace, values)
            else:
                self._run_call(item, workspace, values, leaving)
            for node in drops:
                del values[node]
        for node, location in self.results.items():
            values[node] = _view(leaving[location.buffer], location)
        return _returned(self.result, values)

    def _run_steps(self, item: Native, workspace: Workspace, values: dict[Node, Any]) -> None:
        fed = []  # alive until the engine has read them
        for node, expected in item.feeds.items():
            value = values[node]
            if value.shape != expected.shape or value.dtype != expected.dtype:
                raise ShapesChangedError
            layout = torch.channels_last if value.ndim == 4 else torch.contiguous_format
            value = value.contiguous(memory_format=layout)
            workspace.addresses[expected.buffer] = value.data_ptr()
            fed.append(value)
        scratch = workspace.scratch.data_ptr()
        self.engine.run(item.steps, workspace.addresses, scratch, self.threads)

    def _run_call(
        self,
        item: Call,
        workspace: Workspace,
        values: dict[Node, Any],
        leaving: Mapping[int, Tensor],
    ) -> None:
        def load(node: Node) -> Any:
            location = item.views.get(node)
            if location is None:
                return values[node]
            if location.buffer == ARENA:
                return _view(workspace.arena.view(location.dtype), location)
            return _view(leaving[location.buffer], location)

        node = item.node
        result = item.run(*torch.fx.map_arg(node.args, load), **torch.fx.map_arg(node.kwargs, load))
        start = workspace.arena.untyped_storage().data_ptr()

        def own(value: Any) -> Any:
            """A copy of what lies in the arena, where it would be written over."""
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == start:
                return value.clone()
            return value

        values[node] = tree_map(own, result)


@dataclass(frozen=True, eq=False)
class PlannedBatches:
    """A batch that goes through the network a few images at a time, whose activations stay cached.

    Attributes:
        program: For `images` images.
        rest: For those that are left over; None where none are.
        images: How many go together.
    """

    program: PlannedProgram
    rest: PlannedProgram | None
    images: int

    @property
    def plan(self) -> Plan:
        """What runs for each `images` images."""
        return replace(self.program.plan, images=self.images)

    def __call__(self, inputs: Sequence[Any]) -> Any:
        """Run on a batch. Raises as `PlannedProgram` does."""
        parts = []
        for start in range(0, len(inputs[0]), self.images):
            part = [x[start : start + self.images] for x in inputs]
            rest = None if len(part[0]) == self.images else self.rest
            parts.append((rest or self.program)(part))
        return tree_map(_joined, *parts)


def _joined(*results: Any) -> Any:
    """One result of all parts of a batch; what is no tensor is the same for each part."""
    return torch.cat(results) if isinstance(results[0], Tensor) else results[0]


def images_at_a_time(batch: int, *, weights: int, activations: int, arena: int) -> int:
    """How many images of a batch to run together.

    All, where their activations fit in a cache. Otherwise as few as can be: activations are then
    read from the cache instead of from memory; but so many that the weights, which each part of the
    batch reads again, are no more than the activations.

    Args:
        batch: How many there are.
        weights: Bytes of all weights.
        activations: Bytes of all activations of the batch, each in a place of its own.
        arena: Bytes of those that are alive at one time, the most there are.
    """
    an_image = max(1, activations // batch)
    fitting = _CACHED * batch // max(1, arena)
    return min(batch, max(1, fitting, -(-weights // an_image)))


def _returned(result: Any, values: Mapping[Node, Any]) -> Any:
    """What a graph returns: its nodes' values, in the lists, tuples and dicts they stand in."""
    if isinstance(result, Node):
        return values[result]
    if isinstance(result, dict):
        return {key: _returned(each, values) for key, each in result.items()}
    if isinstance(result, list):
        return [_returned(each, values) for each in result]
    if isinstance(result, tuple):
        parts = [_returned(each, values) for each in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
    return result


def _view(memory: Tensor, location: Location) -> Tensor:
    if location.shape == memory.shape and location.offset == 0:
        return memory
    offset = location.offset // memory.itemsize
    return memory.as_strided(location.shape, location.strides, offset)
