"""Traces a model into a GraphModule that is right in training and in evaluation.

A `torch.fx` trace fixes every `self.training` at its value during the trace. The model is therefore
traced in both modes and the two graphs are merged: a flag that differs becomes a value of the
graph, and a value that differs goes through a switch. `finalize` takes them out again.
"""

from __future__ import annotations

import copy
import itertools
import operator
import os
import traceback
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
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
    _Merge(root, training, evaluation, modes).run()
    graph_module = GraphModule(root, training, type(model).__name__)
    for name, module in graph_module.named_modules():
        module.training = modes[root.get_submodule(name)]
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
        where = tracer.path
        way_out = "Write that line without control flow on tensor values"
        if where:
            way_out += f", or keep the module whole with exclude=[{where!r}]: its layers stay dense"
        raise TraceError(
            f"{where or type(root).__name__}: expected a forward that torch.fx can follow, found "
            f"at {_line(error)}: {error}. {way_out}."
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
    module always do. Nodes that only evaluation has are copied, in the order of evaluation.

    Args:
        root: The traced model, which receives flags and switches.
        training: The graph traced in training, edited.
        evaluation: The graph traced in evaluation.
        modes: The training mode of each module; those added here are entered.
    """

    def __init__(
        self,
        root: nn.Module,
        training: Graph,
        evaluation: Graph,
        modes: dict[nn.Module, bool],
    ) -> None:
        self.root = root
        self.graph = training
        self.evaluation = evaluation
        self.modes = modes
        self.counterpart: dict[Node, Node] = {}
        self.waiting: dict[tuple[str, Any], list[Node]] = {}
        for node in training.nodes:
            self.waiting.setdefault((node.op, node.target), []).append(node)
        self.flags: dict[str, Node] = {}
        self.last = next(iter(training.nodes))  # of the counterparts so far

    def run(self) -> None:
        """Edit the training graph."""
        for node in self.evaluation.nodes:
            theirs = self._find(node)
            if theirs is None:
                self.counterpart[node] = self._adopt(node)
            else:
                self.waiting[theirs.op, theirs.target].remove(theirs)
                self.counterpart[node] = theirs
                theirs.args = self._unify(theirs, theirs.args, node.args)
                theirs.kwargs = self._unify(theirs, theirs.kwargs, node.kwargs)
            self.last = max(self.last, self.counterpart[node])
        shared = set(self.counterpart.values())
        for node in itertools.chain(*self.waiting.values()):
            if any(producer in shared for producer in node.all_input_nodes):
                self._refuse_in_place(node)

    def _find(self, node: Node) -> Node | None:
        waiting = self.waiting.get((node.op, node.target), [])
        for theirs in waiting:
            if self._agree(theirs.args, node.args) and self._agree(theirs.kwargs, node.kwargs):
                return theirs
        if node.op == "get_attr":
            return self._find_constant(node)
        # A module or the output is itself whatever comes in; what differs goes through a switch.
        return waiting[0] if waiting and node.op in ("call_module", "output") else None

    def _find_constant(self, node: Node) -> Node | None:
        """A tensor written in the forward gets a name of its own in each trace."""
        value = getattr(self.root, str(node.target), None)
        for (op, target), waiting in self.waiting.items():
            if op == "get_attr" and waiting and isinstance(value, Tensor):
                other = getattr(self.root, target, None)
                if isinstance(other, Tensor) and torch.equal(other, value):
                    return waiting[0]
        return None

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
        if isinstance(ours, Tensor) or isinstance(theirs, Tensor):
            return ours is theirs
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
            return self._training_flag(node)
        return ours if self._agree(ours, theirs) else self._switch(node, ours, theirs)

    def _training_flag(self, node: Node) -> Node:
        owner = _owner(node)
        if owner not in self.flags:
            first = next(n for n in self.graph.nodes if n.op != "placeholder")
            self.flags[owner] = self._call(TrainingFlag(), "training_flag", owner, first, ())
        return self.flags[owner]

    def _switch(self, node: Node, ours: Any, theirs: Any) -> Node:
        values = (ours, map_arg(theirs, self.counterpart.__getitem__))
        return self._call(TrainingSwitch(), "training_switch", _owner(node), node, values)

    def _call(
        self, module: nn.Module, name: str, owner: str, before: Node, values: tuple[Any, ...]
    ) -> Node:
        """Call a new module, which follows the mode of the module called `owner`."""
        self.modes[module] = self.modes[self.root.get_submodule(owner)]
        target = add_module(self.root, f"{owner}.{name}" if owner else name, module)
        with self.graph.inserting_before(before):
            return self.graph.call_module(target, values)

    def _adopt(self, node: Node) -> Node:
        """Copy a node that only evaluation has."""
        if node.op == "call_module" and _has_buffers(self.root, node):
            raise TraceError(
                f"{node.target}: expected training and evaluation to run it as often, found a call "
                "that only evaluation makes. Its buffers would change in training. Keep the module "
                "that holds it whole with `exclude`."
            )
        inputs = [self.counterpart[producer] for producer in node.all_input_nodes]
        if any(producer in self.counterpart for producer in node.all_input_nodes):
            self._refuse_in_place(node)
        with self.graph.inserting_after(max([self.last, *inputs])):
            return self.graph.node_copy(node, self.counterpart.__getitem__)

    def _refuse_in_place(self, node: Node) -> None:
        if _is_in_place(self.root, node):
            raise TraceError(
                f"{_owner(node) or type(self.root).__name__}: expected training and evaluation to "
                f"differ in values, found {node.name}, which changes one in place in one mode "
                "alone. Write that operation out of place, or keep the module whole with `exclude`."
            )


def _owner(node: Node) -> str:
    """The name of the module whose forward made a node, "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [name for name in stack if not (node.op == "call_module" and name == node.target)]
    return str(names[-1]) if names else ""


def _has_buffers(root: nn.Module, call: Node) -> bool:
    return next(root.get_submodule(str(call.target)).buffers(), None) is not None


def _is_in_place(root: nn.Module, node: Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else node.target.__name__
    written = name.endswith("_") and not name.endswith("__")
    return written or node.target in _IN_PLACE or node.kwargs.get("inplace") is True


_IN_PLACE = {
    getattr(operator, name)
    for name in ("iadd", "iand", "ior", "imul", "ipow", "isub", "itruediv", "ixor", "setitem")
}
