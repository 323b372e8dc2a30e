"""Puts a program together: where its values lie is known, and what runs in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from spre_fx.engine import Engine, Kind, Step, program
from spre_fx.liveness import ALIGNMENT
from spre_fx.packed_ops import ACTIVATIONS
from spre_fx.passes.graph_view import GraphView
from spre_fx.passes.native_steps import Values
from spre_fx.passes.place_values import Item, Placement
from spre_fx.planned import Call, Location, Native, Plan, PlannedProgram, PlanRow

_ACTIVATIONS = {number: name for name, (number, _) in ACTIVATIONS.items() if name}


def build_program(
    view: GraphView, values: Values, placement: Placement, engine: Engine, threads: int
) -> PlannedProgram:
    """The program of a graph.

    Args:
        view: The graph.
        values: The values of one run.
        placement: Where they lie, and what runs.
        engine: What is to run it.
        threads: On how many threads.
    """
    graph = view.graph_module.graph
    output = graph.output_node()
    builder = _Builder(view, values, placement)
    items = tuple(builder.grouped())
    results = {n: builder.location(n) for n in output.all_input_nodes if n in placement.places}
    natives = [item.steps for item in items if isinstance(item, Native)]
    return PlannedProgram(
        engine=engine,
        threads=threads,
        inputs=tuple(node for node in graph.nodes if node.op == "placeholder"),
        items=items,
        drops=tuple(_drops(items, set(output.all_input_nodes))),
        outputs=tuple({each.buffer: each for each in results.values()}.values()),
        results=results,
        result=output.args[0],
        arena=placement.arena,
        scratch=max((engine.scratch(steps, threads) for steps in natives), default=0),
        buffers=tuple(builder.buffers),
        keep=tuple(builder.keep),
        plan=_plan(placement, values, len(natives)),
    )


@dataclass(eq=False)
class _Builder:
    """Makes steps of items, and numbers the buffers that they read beside those of values.

    Attributes:
        view: The graph.
        values: The values of one run.
        placement: Where they lie, and what runs.
        buffers: Addresses of all buffers, 0 for those that each call fills in.
        keep: The tensors behind those addresses.
    """

    view: GraphView
    values: Values
    placement: Placement
    buffers: list[int] = field(default_factory=list)
    keep: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.buffers = [0] * (1 + self.placement.leaving)

    def grouped(self) -> Iterator[Native | Call]:
        """What runs, neighbouring steps in one call of the engine."""
        waiting: list[Item] = []
        for item in self.placement.items:
            if item.operation is not None:
                waiting.append(item)
                continue
            if waiting:
                yield self._native(waiting)
                waiting = []
            places = self.placement.places
            views = {node: self.location(node) for node in item.reads if node in places}
            yield Call(item.node, _runner(self.view, item.node), views)
        if waiting:
            yield self._native(waiting)

    def location(self, node: Node) -> Location:
        """Where the value of a node lies."""
        place, value = self.placement.places[node], self.values[node]
        root = place.root
        return Location(root.buffer, place.offset, value.shape, value.dtype, root.stride)

    def _native(self, items: Sequence[Item]) -> Native:
        """Steps in one call; what torch computed is fed to it."""
        feeds: dict[Node, Location] = {}
        for node in (node for item in items for node in item.reads):
            if node not in self.placement.places and node not in feeds:
                value = self.values[node]
                buffer = self._buffer(0)
                feeds[node] = Location(buffer, 0, value.shape, value.dtype, value.channels)
        steps = [self._located(item, feeds) for item in items]
        return Native(program(steps), feeds)

    def _located(self, item: Item, feeds: Mapping[Node, Location]) -> Step:
        """The step of an item, and where its operands lie."""
        operation, place = item.operation, self.placement.written(item)
        assert operation is not None
        assert place is not None
        step = operation.step

        def located(node: Node) -> tuple[int, int, int, bool]:
            found = feeds[node] if node in feeds else self.location(node)
            in_planes = node not in feeds and self.placement.places[node].root.planes
            return found.buffer, found.offset, found.stride, in_planes

        root = place.root
        step.x, step.x_offset, step.x_stride, step.x_planes = located(operation.x)
        step.y, step.y_offset, step.y_stride = root.buffer, place.offset, root.stride
        step.y_planes = root.planes
        step.residual = step.weight = step.bias = -1
        if operation.residual is not None:
            residual = located(operation.residual)
            step.residual, step.residual_offset, step.residual_stride = residual[:3]
            step.residual_planes = residual[3]
        if operation.weight is not None:
            step.weight = self._constant(operation.weight)
        if operation.bias is not None:
            step.bias = self._constant(operation.bias)
        return step

    def _constant(self, tensor: Tensor) -> int:
        if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
            tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
        self.keep.append(tensor.detach())  # the memory stays, whatever becomes of the tensor
        return self._buffer(tensor.data_ptr())

    def _buffer(self, address: int) -> int:
        self.buffers.append(address)
        return len(self.buffers) - 1


def _runner(view: GraphView, node: Node) -> Callable[..., Any]:
    """What computes a node from its arguments."""
    module = view.module_of(node)
    if module is not None:
        return module
    if node.op == "get_attr":
        owner, _, leaf = str(node.target).rpartition(".")
        holder = view.modules[owner]
        return lambda: getattr(holder, leaf)
    if node.op == "call_method":
        name = str(node.target)
        return lambda value, *args, **kwargs: getattr(value, name)(*args, **kwargs)
    assert callable(node.target)
    return node.target


def _drops(items: Sequence[Native | Call], leaving: set[Node]) -> Iterator[tuple[Node, ...]]:
    """The values of torch that no item reads after each."""
    last: dict[Node, int] = {}
    for index, item in enumerate(items):
        if isinstance(item, Native):
            read = list(item.feeds)
        else:
            read = [item.node, *(n for n in item.node.all_input_nodes if n not in item.views)]
        last.update(dict.fromkeys(read, index))
    ends: dict[int, list[Node]] = {}
    for node, index in last.items():
        if node not in leaving:
            ends.setdefault(index, []).append(node)
    for index in range(len(items)):
        yield tuple(ends.get(index, ()))


def _plan(placement: Placement, values: Values, calls: int) -> Plan:
    rows, sizes = [], {}
    for item in placement.items:
        value, place = values.get(item.node), placement.written(item)
        shape = None if value is None else value.shape
        if place is None or item.operation is None:
            rows.append(PlanRow(item.node.name, "torch", shape, None, "torch", None))
            continue
        size = prod(shape or ()) * place.root.dtype.itemsize
        kind, where = _kind(item.operation.step), "output" if place.root.leaves else "arena"
        where += ", planes" if place.root.planes else ""
        rows.append(PlanRow(item.node.name, kind, shape, size, where, place.offset))
        sizes[item.node] = 0 if place.root.leaves else size
    return Plan(tuple(rows), placement.arena, sum(sizes.values()), calls)


def _kind(step: Step) -> str:
    kind = Kind(step.kind).name.lower().replace("_", " ")
    residual = " + residual" if step.residual >= 0 else ""
    activation = _ACTIVATIONS.get(step.activation)
    return f"{kind}{residual}{f' + {activation}' if activation else ''}"
