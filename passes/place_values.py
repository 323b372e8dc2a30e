"""Where the values that the engine computes lie in memory.

A root is memory for one value, or for several: operands of a concatenation lie side by side in its
root, and a sum lies where its residual did. Roots that leave the graph become tensors of their own;
all others share one arena, in which those that are alive at one time do not overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from spre_fx.engine import Kind
from spre_fx.liveness import Lifetime, assign_offsets
from spre_fx.passes.activations import in_place
from spre_fx.passes.divide_work import Alias, Concatenation, Work
from spre_fx.passes.graph_view import GraphView
from spre_fx.passes.native_steps import Operation, Value, Values, copy_step
from spre_fx.passes.values_in_planes import plane_stride, values_in_planes
from spre_fx.planned import ARENA


@dataclass(eq=False)
class Root:
    """Memory for the pixels of one value, or of several that lie in it; or for its planes.

    Attributes:
        count: How many pixels, or planes.
        stride: Elements from one to the next.
        dtype: Their type.
        planes: Whether they are planes.
        first: The first item that writes it; -1 where none does.
        last: The last item that reads or writes it.
        leaves: Whether it leaves the graph.
        buffer: Its number; the arena until it has one of its own.
        offset: Bytes from the start of the buffer.
    """

    count: int
    stride: int
    dtype: torch.dtype
    planes: bool = False
    first: int = -1
    last: int = -1
    leaves: bool = False
    buffer: int = ARENA
    offset: int = 0

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * self.stride * self.dtype.itemsize

    def fits(self, other: Root) -> bool:
        """Whether what lies in another root can lie in this one, pixel by pixel."""
        ours, theirs = ((r.count, r.stride, r.dtype, r.planes) for r in (self, other))
        return ours == theirs


@dataclass(frozen=True, eq=False)
class Place:
    """Where a value lies in a root: from which channel on."""

    root: Root
    channel: int = 0

    @property
    def offset(self) -> int:
        """Bytes from the start of the buffer."""
        return self.root.offset + self.channel * self.root.dtype.itemsize


@dataclass(eq=False)
class Item:
    """A step, or a node that torch runs.

    Attributes:
        node: The node whose value it computes or copies.
        reads: The nodes whose values it reads.
        operation: The step; None for what torch runs.
        copied_to: Where a copy goes; other steps write to the place of their node.
    """

    node: Node
    reads: tuple[Node, ...]
    operation: Operation | None = None
    copied_to: Place | None = None


@dataclass(frozen=True, eq=False)
class Placement:
    """What runs, and where its values lie.

    Attributes:
        items: What runs, in order.
        places: Of the values that the engine computes.
        arena: Bytes.
        leaving: How many roots leave the graph. Their buffers follow the arena's.
    """

    items: tuple[Item, ...]
    places: dict[Node, Place]
    arena: int
    leaving: int

    def written(self, item: Item) -> Place | None:
        """Where a step writes; None for what torch runs."""
        return _written(item, self.places)


def place_values(view: GraphView, values: Values, work: Sequence[Work]) -> Placement:
    """Find a place for each value that the engine computes.

    Args:
        view: The graph.
        values: The values of one run.
        work: What becomes of each node, in order.
    """
    leaving = view.graph_module.graph.output_node().all_input_nodes
    pinned = _pinned(view, work, leaving)
    in_planes = values_in_planes(values, work, pinned)
    sharing = _Sharing(values, _made_by_steps(work), pinned, in_planes)
    for each in reversed(work):  # readers decide
        sharing.place(each)
    places = sharing.places
    for node in leaving:
        if node in places:
            places[node].root.leaves = True
    items = tuple(_items(work, values, sharing.copies))
    _find_lifetimes(items, places)
    _reuse_residuals(items, places, values)
    roots = list(dict.fromkeys(place.root for place in places.values()))
    own = [root for root in roots if root.leaves]
    for buffer, root in enumerate(own, start=ARENA + 1):
        root.buffer = buffer
    return Placement(items, places, _assign_arena(roots), len(own))


# Which values share a root


def _made_by_steps(work: Sequence[Work]) -> set[Node]:
    return {each.result for each in work if isinstance(each, Operation | Concatenation)}


def _pinned(view: GraphView, work: Sequence[Work], leaving: Sequence[Node]) -> set[Node]:
    """Values that lie by themselves: others see or write them, or know them by another name."""
    aliases = [each for each in work if isinstance(each, Alias)]
    written = [each for each in work if isinstance(each, Node) and in_place(view, each)]
    pinned = {*leaving, *(node for alias in aliases for node in (alias.source, alias.result))}
    return pinned.union(*(node.all_input_nodes[:1] for node in written))


@dataclass(eq=False)
class _Sharing:
    """Gives each value a place in a root, from the last to the first.

    Attributes:
        values: The values of one run.
        made: Nodes that could be written to any place.
        pinned: Those that lie in a root of their own nevertheless.
        in_planes: Those that lie in planes.
        places: What was found.
        copies: Operands of concatenations that have to be copied, and where to.
    """

    values: Values
    made: set[Node]
    pinned: set[Node]
    in_planes: AbstractSet[Node]
    places: dict[Node, Place] = field(default_factory=dict)
    copies: dict[Concatenation, list[tuple[Node, Place]]] = field(default_factory=dict)

    def place(self, work: Work) -> None:
        """Place what a piece of work computes, and what it takes along."""
        if isinstance(work, Concatenation):
            self._place_concatenation(work)
        elif isinstance(work, Alias):
            known = self.places.get(work.source)  # where another name of it has put it
            self.places[work.source] = known or self._place_of(work.result)
            self.places[work.result] = self.places[work.source]
        elif isinstance(work, Operation):
            self._place_of(work.result)

    def _place_of(self, node: Node) -> Place:
        if node not in self.places:
            self.places[node] = Place(_root(self.values[node], in_planes=node in self.in_planes))
        return self.places[node]

    def _place_concatenation(self, work: Concatenation) -> None:
        operands, start = work.operands, self.places.get(work.operands[0])
        free = work.result not in self.places and work.result not in self.pinned
        if free and start is not None and self._side_by_side(operands, start):
            self.places[work.result] = start  # the operands lie so in a larger concatenation
            return
        whole = self._place_of(work.result)
        channel = whole.channel
        for operand in operands:
            place = Place(whole.root, channel)
            taken = operand in self.places or operand in self.pinned
            if operand in self.made and not taken and operands.count(operand) == 1:
                self.places[operand] = place
            else:
                self.copies.setdefault(work, []).append((operand, place))
            channel += self.values[operand].channels

    def _side_by_side(self, operands: tuple[Node, ...], start: Place) -> bool:
        channel = start.channel
        for operand in operands:
            place = self.places.get(operand)
            if place is None or (place.root, place.channel) != (start.root, channel):
                return False
            channel += self.values[operand].channels
        return True


def _root(value: Value, *, in_planes: bool) -> Root:
    if not in_planes:
        return Root(value.pixels, value.channels, value.dtype)
    images, channels, height, width = value.shape
    return Root(images * channels, plane_stride(height * width), value.dtype, planes=True)


# What runs, and how long roots are alive


def _items(
    work: Sequence[Work], values: Values, copies: dict[Concatenation, list[tuple[Node, Place]]]
) -> Iterator[Item]:
    """Steps and nodes; a concatenation is gone, but for what has to be copied."""
    for each in work:
        if isinstance(each, Operation):
            reads = (each.x,) if each.residual is None else (each.x, each.residual)
            yield Item(each.result, reads, each)
        elif isinstance(each, Concatenation):
            for operand, place in copies.get(each, []):
                copied = Operation(copy_step(values[operand]), operand, operand)
                yield Item(operand, (operand,), copied, place)
        elif isinstance(each, Node):
            yield Item(each, tuple(each.all_input_nodes))


def _written(item: Item, places: dict[Node, Place]) -> Place | None:
    return None if item.operation is None else item.copied_to or places[item.node]


def _find_lifetimes(items: Sequence[Item], places: dict[Node, Place]) -> None:
    for index, item in enumerate(items):
        written = _written(item, places)
        roots = [places[node].root for node in item.reads if node in places]
        for root in roots if written is None else [*roots, written.root]:
            root.first = index if root.first < 0 else root.first
            root.last = index
    for place in places.values():
        if place.root.leaves:
            place.root.last = len(items)


def _reuse_residuals(items: Sequence[Item], places: dict[Node, Place], values: Values) -> None:
    """Let a sum lie where its residual did, if that is its last use."""
    for index, item in enumerate(items):
        for operation in _orders(item.operation):
            old = _own_root(operation.residual, places, values)
            new = _own_root(item.node, places, values)
            source = places.get(operation.x)
            if old is None or new is None or (source is not None and source.root is old):
                continue
            if old.fits(new) and old.last == index and new.first == index:
                _move(new, old, places)
                item.operation = operation
                break


def _orders(operation: Operation | None) -> Iterator[Operation]:
    """The operation where it adds something, and with its terms exchanged if they are alike."""
    if operation is not None and operation.residual is not None:
        yield operation
        if operation.step.kind == Kind.AFFINE and operation.weight is None:
            yield replace(operation, x=operation.residual, residual=operation.x)


def _own_root(node: Node | None, places: dict[Node, Place], values: Values) -> Root | None:
    """The root that a value, which stays in the graph, fills by itself; None of any other value."""
    place = None if node is None else places.get(node)
    if node is None or place is None or place.root.leaves:
        return None
    alone = place.root.planes or place.root.stride == values[node].channels
    return place.root if alone else None


def _move(gone: Root, root: Root, places: dict[Node, Place]) -> None:
    """Put all that lies in one root into another, behind what lay there."""
    root.last = gone.last
    for node, place in places.items():
        if place.root is gone:
            places[node] = Place(root, place.channel)


def _assign_arena(roots: Sequence[Root]) -> int:
    """Give roots that stay their offsets in the arena; its bytes."""
    inner = [root for root in roots if not root.leaves and root.first >= 0]
    offsets, size = assign_offsets([Lifetime(root.size, root.first, root.last) for root in inner])
    for root, offset in zip(inner, offsets, strict=True):
        root.offset = offset
    return size
