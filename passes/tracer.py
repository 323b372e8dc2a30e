"""Traces a model into a GraphModule that is right in training and in evaluation.

A `torch.fx` trace fixes every `self.training` at its value during the trace. The model is therefore
traced in both modes and the two graphs are merged: a flag that differs becomes a value of the
graph, and a value that differs goes through a switch. `finalize` takes them out again.
"""

from __future__ import annotations

import copy
import os
import traceback
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx import Tracer as FxTracer
from torch.fx.node import map_arg

from spre_fx.batch_norm import is_batch_norm
from spre_fx.errors import ModelError, TraceError
from spre_fx.modules import (
    MaskSchedule,
    NMLayer,
    SpReConv,
    TrainingFlag,
    TrainingSwitch,
)
from spre_fx.passes.edit import add_module

_LEAVES = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.Linear,
    MaskSchedule,
    NMLayer,
    SpReConv,
    TrainingFlag,
    TrainingSwitch,
)


class Tracer(FxTracer):
    """Keeps convs, batch norms, linears and our own modules whole, and whatever is named.

    Args:
        leaves: More modules to keep whole: names, globs or types.
    """

    def __init__(self, leaves: Sequence[str | type[nn.Module]] = ()) -> None:
        super().__init__()
        self._names = [leaf for leaf in leaves if isinstance(leaf, str)]
        self._types = tuple(leaf for leaf in leaves if isinstance(leaf, type))
        self.path = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether `m` stays one node."""
        return (
            isinstance(m, _LEAVES + self._types)
            or is_batch_norm(m)
            or any(fnmatchcase(module_qualified_name, name) for name in self._names)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """As usual, remembering where the trace is, for error messages."""
        outer, self.path = self.path, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.path = outer
        return result


def trace(model: nn.Module, leaves: Sequence[str | type[nn.Module]] = ()) -> GraphModule:
    """Trace a copy of `model`. Module names, parameters, buffers and training modes survive.

    Args:
        model: The model, which is not touched.
        leaves: Modules to keep whole: names, globs or types.

    Raises:
        TraceError: If `torch.fx` cannot follow the forward; it names the module and the line.
        ModelError: If the model cannot be copied.
    """
    root = _copy(model)
    modes = {module: module.training for module in root.modules()}
    training = _trace_graph(root.train(), leaves)
    evaluation = _trace_graph(root.eval(), leaves)
    _Merge(root, training, evaluation).run()
    graph_module = GraphModule(root, training, type(model).__name__)
    for module in graph_module.modules():
        module.training = modes.get(module, model.training)
    return graph_module


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__}: expected a model that copy.deepcopy can copy, found: {error} "
            "The input model is never modified, so a copy is needed."
        ) from error


def _trace_graph(root: nn.Module, leaves: Sequence[str | type[nn.Module]]) -> Graph:
    tracer = Tracer(leaves)
    try:
        return tracer.trace(root)
    except Exception as error:
        where = tracer.path or type(root).__name__
        raise TraceError(
            f"{where}: expected a forward that torch.fx can follow, found at {_line(error)}: "
            f"{error}. Keep the module whole with exclude=[{where!r}] (its layers then stay "
            "dense), or write that line without control flow on tensor values."
        ) from error


def _line(error: Exception) -> str:
    """The innermost line of the user's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    not_theirs = (os.path.dirname(torch.__file__), __file__)
    theirs = [frame for frame in frames if not frame.filename.startswith(not_theirs)]
    frame = (theirs or frames)[-1]
    return f"{frame.filename}:{frame.lineno} `{frame.line}`"


class _Merge:
    """Merges the trace made in evaluation into the one made in training.

    Nodes of the two correspond when they do the same to corresponding values; calls of the same
    module always do. Nodes that only evaluation has are copied, next to what they depend on.
    """

    def __init__(self, root: nn.Module, training: Graph, evaluation: Graph) -> None:
        self.root = root
        self.graph = training
        self.evaluation = evaluation
        self.counterpart: dict[Node, Node] = {}
        self.waiting: dict[tuple[str, Any], list[Node]] = {}
        for node in training.nodes:
            self.waiting.setdefault((node.op, node.target), []).append(node)
        self.flag: Node | None = None

    def run(self) -> None:
        """Edit the training graph."""
        for node in self.evaluation.nodes:
            theirs = self._find(node)
            if theirs is None:
                self.counterpart[node] = self._adopt(node)
            else:
                self.waiting[node.op, node.target].remove(theirs)
                self.counterpart[node] = theirs
                theirs.args = self._unify(theirs, theirs.args, node.args)
                theirs.kwargs = self._unify(theirs, theirs.kwargs, node.kwargs)

    def _find(self, node: Node) -> Node | None:
        waiting = self.waiting.get((node.op, node.target), [])
        for theirs in waiting:
            if self._agree(theirs.args, node.args) and self._agree(theirs.kwargs, node.kwargs):
                return theirs
        # A module or the output is itself whatever comes in; what differs goes through a switch.
        return waiting[0] if waiting and node.op in ("call_module", "output") else None

    def _agree(self, ours: Any, theirs: Any) -> bool:
        """Whether an argument in training is that in evaluation, or a flag that differs."""
        if isinstance(theirs, Node):
            return self.counterpart[theirs] is ours
        if isinstance(theirs, list | tuple) and type(ours) is type(theirs):
            return len(ours) == len(theirs) and all(map(self._agree, ours, theirs))
        if isinstance(theirs, dict) and isinstance(ours, dict):
            return ours.keys() == theirs.keys() and all(
                self._agree(ours[key], theirs[key]) for key in theirs
            )
        return bool(ours == theirs) or (ours is True and theirs is False)

    def _unify(self, node: Node, ours: Any, theirs: Any) -> Any:
        """The argument that is `ours` in training and `theirs` in evaluation."""
        if (
            isinstance(theirs, list | tuple)
            and type(ours) is type(theirs)
            and len(ours) == len(theirs)
        ):
            items = [self._unify(node, *pair) for pair in zip(ours, theirs, strict=True)]
            return ours._make(items) if hasattr(ours, "_make") else type(ours)(items)
        if isinstance(theirs, dict) and isinstance(ours, dict) and ours.keys() == theirs.keys():
            return {key: self._unify(node, ours[key], theirs[key]) for key in ours}
        if ours is True and theirs is False:
            return self._training_flag()
        return ours if self._agree(ours, theirs) else self._switch(node, ours, theirs)

    def _training_flag(self) -> Node:
        if self.flag is None:
            self.flag = self._call_first(TrainingFlag(), "training_flag")
        return self.flag

    def _call_first(self, module: nn.Module, name: str) -> Node:
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        with self.graph.inserting_before(first):
            return self.graph.call_module(add_module(self.root, name, module))

    def _switch(self, node: Node, ours: Any, theirs: Any) -> Node:
        evaluation = map_arg(theirs, self.counterpart.__getitem__)
        with self.graph.inserting_before(node):
            name = add_module(self.root, "training_switch", TrainingSwitch())
            return self.graph.call_module(name, (ours, evaluation))

    def _adopt(self, node: Node) -> Node:
        """Copy a node that only evaluation has to behind the last of its inputs."""
        if node.op == "call_module" and any(self.root.get_submodule(str(node.target)).buffers()):
            raise TraceError(
                f"{node.target}: expected training and evaluation to run it as often, found a call "
                "that only evaluation makes. Its buffers would change in training. Keep the module "
                f"that holds it whole with `exclude`."
            )
        inputs = [self.counterpart[producer] for producer in node.all_input_nodes]
        last = max(inputs) if inputs else next(iter(self.graph.nodes))
        with self.graph.inserting_after(last):
            return self.graph.node_copy(node, self.counterpart.__getitem__)
