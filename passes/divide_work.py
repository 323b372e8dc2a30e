"""What becomes of each node of a planned graph: a step of the engine, or what torch runs.

Two kinds of node cost nothing in the end. One only names the pixels of its input in another way;
of a concatenation, the operands can be written side by side in the first place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch.fx import Node

from spre_fx.engine import Engine, Kind
from spre_fx.passes.activations import in_place
from spre_fx.passes.graph_view import GraphView
from spre_fx.passes.native_steps import (
    Operation,
    Values,
    concatenated,
    is_alias,
    operation_of,
    with_activation,
)


@dataclass(frozen=True, eq=False)
class Alias:
    """A node, `result`, that names the pixels of `source` in another way."""

    result: Node
    source: Node


@dataclass(frozen=True, eq=False)
class Concatenation:
    """A node, `result`, whose value is its operands side by side."""

    result: Node
    operands: tuple[Node, ...]


Work: TypeAlias = Operation | Alias | Concatenation | Node  # a node: torch runs it


def divide_work(view: GraphView, values: Values, engine: Engine) -> Iterator[Work]:
    """What becomes of each node, in order; inputs and the output are none.

    Args:
        view: The graph, in evaluation mode.
        values: The values of one run.
        engine: What takes steps, or leaves them to torch.
    """
    native: set[Node] = set()  # nodes whose values the engine computes
    done: set[Node] = set()
    for node in view.graph_module.graph.nodes:
        if node in done or node.op in ("placeholder", "output"):
            continue
        work = _work(view, node, values, engine, native)
        if not isinstance(work, Node):
            done |= {node, work.result}  # the activation behind it as well
            native.add(work.result)
        yield work


def writes_through_view(view: GraphView, values: Values, work: Sequence[Work]) -> bool:
    """Whether torch writes over a view of something, which is a copy of it in a program."""
    by_torch = {each for each in work if isinstance(each, Node)}
    written = {n for each in by_torch if in_place(view, each) for n in each.all_input_nodes[:1]}
    return any(node in values and values[node].is_view for node in written & by_torch)


def _work(view: GraphView, node: Node, values: Values, engine: Engine, native: set[Node]) -> Work:
    operation = operation_of(view, node, values)
    if operation is not None and _pays(operation, native):
        operation = with_activation(view, operation, values)
        if engine.takes(operation.step):
            return operation
    if is_alias(view, node, values) and node.args[0] in native:
        (source,) = node.all_input_nodes
        return Alias(node, source)
    operands = concatenated(node, values)
    if operands and any(operand in native for operand in operands):
        return Concatenation(node, tuple(operands))
    return node


def _pays(operation: Operation, native: set[Node]) -> bool:
    """Pointwise steps do only where their input is there already."""
    inputs = (operation.x, operation.residual)
    return operation.step.kind != Kind.AFFINE or any(each in native for each in inputs)
