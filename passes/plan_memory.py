"""Plans how a deployed graph runs on the engine: as few calls as can be, over one block of memory.

1. Each node becomes a step of the engine, a call of torch, or nothing but another name.
2. A concatenation is taken apart: what makes its operands writes straight into their places in it.
3. Values get buffers: those that leave the graph tensors of their own, all others a place in one
   arena, where values that are alive at one time do not overlap.
4. Neighbouring steps become one call of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from spre_fx.engine import Engine, Kind, Step, program
from spre_fx.liveness import ALIGNMENT, Lifetime, assign_offsets
from spre_fx.packed_ops import ACTIVATIONS
from spre_fx.passes.activations import in_place
from spre_fx.passes.graph_view import GraphView
from spre_fx.passes.native_steps import (
    Operation,
    Value,
    concatenated,
    copy_step,
    is_alias,
    operation_of,
    with_activation,
)
from spre_fx.planned import ARENA, Call, Location, Native, Plan, PlannedProgram, PlanRow

_ACTIVATIONS = {number: name for name, (number, _) in ACTIVATIONS.items() if name}


@torch.no_grad()
def values_of(graph_module: GraphModule, inputs: tuple[Any, ...]) -> dict[Node, Value]:
    """Shapes and types of all tensors that the nodes of a graph compute, from one run of it."""
    found: dict[Node, Value] = {}

    class Recorder(Interpreter):
        def run_node(self, n: Node) -> Any:
            arguments = tree_leaves(self.fetch_args_kwargs_from_env(n))
            result = super().run_node(n)
            if type(result) in (Tensor, torch.nn.Parameter) and result.layout == torch.strided:
                is_view = any(_share_memory(result, each) for each in arguments)
                found[n] = Value(tuple(result.shape), result.dtype, is_view)
            return result

    copies = (value.clone() if isinstance(value, Tensor) else value for value in inputs)
    Recorder(graph_module).run(*copies)
    return found


def _share_memory(one: Tensor, other: object) -> bool:
    if not isinstance(other, Tensor) or other.layout != torch.strided:
        return False
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def plan_memory(
    graph_module: GraphModule, values: Mapping[Node, Value], engine: Engine, threads: int
) -> PlannedProgram | None:
    """The program of a graph for inputs of the shapes of one run; None where it has no steps.

    Args:
        graph_module: The graph, in evaluation mode.
        values: What `values_of` found.
        engine: What is to run it.
        threads: On how many threads.
    """
    view = GraphView(graph_module)
    work = list(_divide(view, values, engine))
    if not any(isinstance(each, Operation) for each in work) or _writes_through_view(
        view, values, work
    ):
        return None
    return _Layout(view, values, work).program(engine, threads)


@dataclass(frozen=True, eq=False)
class _Alias:
    """A node that names the pixels of `source` in another way."""

    result: Node
    source: Node


@dataclass(frozen=True, eq=False)
class _Concatenation:
    """A node whose value is its operands side by side."""

    result: Node
    operands: tuple[Node, ...]


_Work = Operation | _Alias | _Concatenation | Node  # a node: torch runs it


def _divide(view: GraphView, values: Mapping[Node, Value], engine: Engine) -> Iterator[_Work]:
    """What becomes of each node, in order."""
    native: set[Node] = set()
    done: set[Node] = set()
    for node in view.graph_module.graph.nodes:
        if node in done or node.op in ("placeholder", "output"):
            continue
        work = _work(view, node, values, engine, native)
        if not isinstance(work, Node):
            done |= {node, work.result}
            native.add(work.result)
        yield work


def _writes_through_view(view: GraphView, values: Mapping[Node, Value], work: list[_Work]) -> bool:
    """Whether torch writes over a view of something, which is a copy of it in a program."""
    by_torch = {each for each in work if isinstance(each, Node)}
    written = [each.all_input_nodes[0] for each in by_torch if in_place(view, each)]
    return any(node in by_torch and node in values and values[node].is_view for node in written)


def _work(
    view: GraphView, node: Node, values: Mapping[Node, Value], engine: Engine, native: set[Node]
) -> _Work:
    operation = operation_of(view, node, values)
    if operation is not None and _pays(operation, native):
        operation = with_activation(view, operation, values)
        if engine.takes(operation.step):
            return operation
    if is_alias(view, node, values) and node.args[0] in native:
        (source,) = node.all_input_nodes
        return _Alias(node, source)
    operands = concatenated(node, values)
    if operands and any(operand in native for operand in operands):
        return _Concatenation(node, tuple(operands))
    return node


def _pays(operation: Operation, native: set[Node]) -> bool:
    """Pointwise steps do only where their input is there already."""
    inputs = (operation.x, operation.residual)
    return operation.step.kind != Kind.AFFINE or any(each in native for each in inputs)


@dataclass(eq=False)
class _Root:
    """Memory for the pixels of one value, or of several that lie in it.

    Attributes:
        pixels: How many.
        stride: Elements of a pixel.
        dtype: Their type.
        first: The first item that writes it.
        last: The last item that reads or writes it.
        leaves: Whether it leaves the graph.
        buffer: Its number; the arena until it has one of its own.
        offset: Bytes from the start of the buffer.
    """

    pixels: int
    stride: int
    dtype: torch.dtype
    first: int = -1
    last: int = -1
    leaves: bool = False
    buffer: int = ARENA
    offset: int = 0

    @property
    def size(self) -> int:
        """Bytes."""
        return self.pixels * self.stride * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a value lies in a root: from which channel on."""

    root: _Root
    channel: int = 0


@dataclass(eq=False)
class _Layout:
    """Decides where all values lie, and puts the program together."""

    view: GraphView
    values: Mapping[Node, Value]
    work: list[_Work]
    places: dict[Node, _Place] = field(default_factory=dict)
    copies: dict[_Concatenation, list[tuple[Node, _Place]]] = field(default_factory=dict)
    buffers: list[int] = field(default_factory=lambda: [0])
    keep: list[Tensor] = field(default_factory=list)

    def program(self, engine: Engine, threads: int) -> PlannedProgram:
        """The program."""
        output = self.view.graph_module.graph.output_node()
        self._place_values(set(output.all_input_nodes))
        items = list(self._items())
        self._find_lifetimes(items)
        self._reuse_residuals(items)
        arena = self._assign()
        native = [n for n in output.all_input_nodes if n in self.places]
        grouped = list(self._grouped(items))
        steps = [item.steps for item in grouped if isinstance(item, Native)]
        inputs = tuple(n for n in self.view.graph_module.graph.nodes if n.op == "placeholder")
        return PlannedProgram(
            engine=engine,
            threads=threads,
            inputs=inputs,
            items=tuple(grouped),
            drops=tuple(_drops(grouped, set(output.all_input_nodes))),
            outputs=tuple(self._outputs(native)),
            results={node: self._location(node) for node in native},
            result=output.args[0],
            arena=arena,
            scratch=max((engine.scratch(each, threads) for each in steps), default=0),
            buffers=tuple(self.buffers),
            keep=tuple(self.keep),
            plan=self._plan(items, arena, len(steps)),
        )

    # Where values lie

    def _place_values(self, leaving: set[Node]) -> None:
        """Give each value of the engine a root; backwards, so that readers decide."""
        aliases = [each for each in self.work if isinstance(each, _Alias)]
        written = [n for n in self.work if isinstance(n, Node) and in_place(self.view, n)]
        pinned = leaving | {n for alias in aliases for n in (alias.source, alias.result)}
        pinned |= {node.all_input_nodes[0] for node in written}
        for each in reversed(self.work):
            if isinstance(each, _Concatenation):
                self._place_concatenation(each, pinned)
            elif isinstance(each, _Alias):
                known = self.places.get(each.source)  # where another name of it has put it
                self.places[each.source] = known or self._place(each.result)
                self.places[each.result] = self.places[each.source]
            elif isinstance(each, Operation):
                self._place(each.result)
        for node in leaving:
            if node in self.places:
                self.places[node].root.leaves = True

    def _place(self, node: Node) -> _Place:
        if node not in self.places:
            value = self.values[node]
            self.places[node] = _Place(_Root(value.pixels, value.channels, value.dtype))
        return self.places[node]

    def _place_concatenation(self, each: _Concatenation, pinned: set[Node]) -> None:
        operands, start = each.operands, self.places.get(each.operands[0])
        free = each.result not in self.places and each.result not in pinned
        if free and start is not None and self._side_by_side(operands, start):
            self.places[each.result] = start  # a prefix of a larger concatenation
            return
        whole = self._place(each.result)
        channel, made = whole.channel, self._made_by_steps()
        for operand in operands:
            place = _Place(whole.root, channel)
            taken = operand in self.places or operand in pinned
            if operand in made and not taken and operands.count(operand) == 1:
                self.places[operand] = place
            else:
                self.copies.setdefault(each, []).append((operand, place))
            channel += self.values[operand].channels

    def _side_by_side(self, operands: tuple[Node, ...], start: _Place) -> bool:
        channel = start.channel
        for operand in operands:
            place = self.places.get(operand)
            if place is None or (place.root, place.channel) != (start.root, channel):
                return False
            channel += self.values[operand].channels
        return True

    def _made_by_steps(self) -> set[Node]:
        kinds = (Operation, _Concatenation)
        return {each.result for each in self.work if isinstance(each, kinds)}

    # In which order things run, and how long values are alive

    def _items(self) -> Iterator[_Item]:
        """Steps and nodes; a concatenation is gone, but for what has to be copied."""
        for each in self.work:
            if isinstance(each, Operation):
                reads = [each.x, *([each.residual] if each.residual is not None else [])]
                yield _Item(each.result, tuple(reads), each)
            elif isinstance(each, _Concatenation):
                for operand, place in self.copies.get(each, []):
                    copied = Operation(copy_step(self.values[operand]), operand, operand)
                    yield _Item(operand, (operand,), copied, place)
            elif isinstance(each, Node):
                yield _Item(each, tuple(each.all_input_nodes))

    def _written(self, item: _Item) -> _Place | None:
        """Where a step writes; None for what torch runs."""
        return None if item.operation is None else item.place or self.places[item.node]

    def _find_lifetimes(self, items: list[_Item]) -> None:
        for index, item in enumerate(items):
            written = self._written(item)
            roots = [self.places[node].root for node in item.reads if node in self.places]
            for root in roots if written is None else [*roots, written.root]:
                root.first = index if root.first < 0 else root.first
                root.last = index
        for place in self.places.values():
            if place.root.leaves:
                place.root.last = len(items)

    def _reuse_residuals(self, items: list[_Item]) -> None:
        """Let a sum lie where its residual did, if that is its last use."""
        for index, item in enumerate(items):
            operation = item.operation
            if operation is None or operation.residual is None:
                continue
            if self._take_place(operation.residual, operation.x, item.node, index):
                continue
            sum_only = operation.step.kind == Kind.AFFINE and operation.weight is None
            if sum_only and self._take_place(operation.x, operation.residual, item.node, index):
                item.operation = replace(operation, x=operation.residual, residual=operation.x)

    def _take_place(self, residual: Node, x: Node, result: Node, index: int) -> bool:
        """Put the result where the residual lies; whether that could be done."""
        before, after = self.places.get(residual), self.places[result].root
        source = self.places.get(x)
        if before is None or before.root.last != index or after.first != index:
            return False
        if (source is not None and source.root is before.root) or not _alike(before.root, after):
            return False
        whole = before.root.stride == self.values[residual].channels
        if not whole or after.stride != self.values[result].channels:
            return False  # a part of a concatenation
        before.root.last = after.last
        self._merge(after, before.root)
        return True

    def _merge(self, gone: _Root, root: _Root) -> None:
        for node, place in self.places.items():
            if place.root is gone:
                self.places[node] = _Place(root, place.channel)

    def _assign(self) -> int:
        """Offsets in the arena, and buffers of what leaves; the bytes of the arena."""
        roots = list(dict.fromkeys(place.root for place in self.places.values()))
        for root in roots:
            if root.leaves:
                root.buffer = self._buffer(0)
        inner = [root for root in roots if not root.leaves and root.first >= 0]
        lifetimes = [Lifetime(root.size, root.first, root.last) for root in inner]
        offsets, size = assign_offsets(lifetimes)
        for root, offset in zip(inner, offsets, strict=True):
            root.offset = offset
        return size

    def _buffer(self, address: int) -> int:
        self.buffers.append(address)
        return len(self.buffers) - 1

    def _location(self, node: Node) -> Location:
        place, value = self.places[node], self.values[node]
        offset = place.root.offset + place.channel * value.dtype.itemsize
        return Location(place.root.buffer, offset, value.shape, value.dtype, place.root.stride)

    def _outputs(self, leaving: list[Node]) -> Iterator[Location]:
        """One tensor for each buffer that leaves."""
        seen = set()
        for node in leaving:
            location = self._location(node)
            if location.buffer not in seen:
                seen.add(location.buffer)
                yield location

    # The program

    def _grouped(self, items: list[_Item]) -> Iterator[Native | Call]:
        waiting: list[_Item] = []
        for item in items:
            if item.operation is not None:
                waiting.append(item)
                continue
            if waiting:
                yield self._native(waiting)
                waiting = []
            views = {n: self._location(n) for n in item.reads if n in self.places}
            yield Call(item.node, _runner(self.view, item.node), views)
        if waiting:
            yield self._native(waiting)

    def _native(self, items: list[_Item]) -> Native:
        feeds: dict[Node, tuple[int, Node, Location]] = {}
        steps = []
        for item in items:
            for node in item.reads:
                if node not in self.places and node not in feeds:
                    value, buffer = self.values[node], self._buffer(0)
                    fed = Location(buffer, 0, value.shape, value.dtype, value.channels)
                    feeds[node] = (buffer, node, fed)
            steps.append(self._located(item, feeds))
        return Native(program(steps), tuple(feeds.values()))

    def _located(self, item: _Item, feeds: Mapping[Node, tuple[int, Node, Location]]) -> Step:
        operation, place = item.operation, self._written(item)
        assert operation is not None
        assert place is not None
        step = operation.step

        def located(node: Node) -> tuple[int, int, int]:
            found = self._location(node) if node in self.places else feeds[node][2]
            return found.buffer, found.offset, found.stride

        step.x, step.x_offset, step.x_stride = located(operation.x)
        item_size = self.values[operation.x].dtype.itemsize
        step.y, step.y_stride = place.root.buffer, place.root.stride
        step.y_offset = place.root.offset + place.channel * item_size
        step.residual = step.weight = step.bias = -1
        if operation.residual is not None:
            residual = located(operation.residual)
            step.residual, step.residual_offset, step.residual_stride = residual
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

    def _plan(self, items: list[_Item], arena: int, calls: int) -> Plan:
        rows, sizes = [], {}
        for item in items:
            value, place = self.values.get(item.node), self._written(item)
            shape = None if value is None else value.shape
            if place is None or item.operation is None:
                rows.append(PlanRow(item.node.name, "torch", shape, None, "torch", None))
                continue
            item_size = place.root.dtype.itemsize
            size, kind = prod(shape or ()) * item_size, _kind(item.operation.step)
            where = "output" if place.root.leaves else "arena"
            offset = place.root.offset + place.channel * item_size
            rows.append(PlanRow(item.node.name, kind, shape, size, where, offset))
            sizes[item.node] = 0 if place.root.leaves else size
        return Plan(tuple(rows), arena, sum(sizes.values()), calls)


@dataclass(eq=False)
class _Item:
    """A step, or a node that torch runs.

    Attributes:
        node: The node whose value it computes or copies.
        reads: The nodes whose values it reads.
        operation: The step; None for what torch runs.
        place: Where a copy goes; other steps write to the place of their node.
    """

    node: Node
    reads: tuple[Node, ...]
    operation: Operation | None = None
    place: _Place | None = None


def _alike(one: _Root, other: _Root) -> bool:
    """Whether one can lie where the other did."""
    same = (one.pixels, one.stride, one.dtype) == (other.pixels, other.stride, other.dtype)
    return same and not one.leaves and not other.leaves


def _kind(step: Step) -> str:
    kind = Kind(step.kind).name.lower().replace("_", " ")
    residual = " + residual" if step.residual >= 0 else ""
    activation = _ACTIVATIONS.get(step.activation)
    return f"{kind}{residual}{f' + {activation}' if activation else ''}"


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


def _drops(items: list[Native | Call], leaving: set[Node]) -> Iterator[tuple[Node, ...]]:
    """The values of torch that no item reads after each."""
    last: dict[Node, int] = {}
    for index, item in enumerate(items):
        if isinstance(item, Native):
            read = [node for _, node, _ in item.feeds]
        else:
            read = [item.node, *(n for n in item.node.all_input_nodes if n not in item.views)]
        last.update(dict.fromkeys(read, index))
    ends: dict[int, list[Node]] = {}
    for node, index in last.items():
        if node not in leaving:
            ends.setdefault(index, []).append(node)
    for index in range(len(items)):
        yield tuple(ends.get(index, ()))
