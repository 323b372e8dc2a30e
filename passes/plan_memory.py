"""Plans how a deployed graph runs on the engine: as few calls as can be, over one block of memory.

1. `divide_work`: each node becomes a step of the engine, a call of torch, or nothing but a name.
2. `place_values`: all values of the engine get places in memory.
3. `build_program`: steps learn where their operands lie, and neighbours become one call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from spre_fx.engine import Engine
from spre_fx.passes.build_program import build_program
from spre_fx.passes.divide_work import divide_work, writes_through_view
from spre_fx.passes.graph_view import GraphView
from spre_fx.passes.native_steps import Operation, Value, Values
from spre_fx.passes.place_values import place_values
from spre_fx.planned import PlannedProgram


def plan_memory(
    graph_module: GraphModule, values: Values, engine: Engine, threads: int
) -> PlannedProgram | None:
    """The program of a graph for inputs of the shapes of one run; None where it has no steps.

    Args:
        graph_module: The graph, in evaluation mode.
        values: What `values_of` found.
        engine: What is to run it.
        threads: On how many threads.
    """
    view = GraphView(graph_module)
    work = list(divide_work(view, values, engine))
    steps = any(isinstance(each, Operation) for each in work)
    if not steps or writes_through_view(view, values, work):
        return None
    return build_program(view, values, place_values(view, values, work), engine, threads)


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
    recorder = Recorder(graph_module)
    recorder.extra_traceback = False  # errors as the graph itself raises them
    recorder.run(*copies)
    return found


def _share_memory(one: Tensor, other: object) -> bool:
    if not isinstance(other, Tensor) or other.layout != torch.strided:
        return False
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
