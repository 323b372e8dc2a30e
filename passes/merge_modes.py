"""Merges the trace of a model in evaluation into the one in training.

A flag that differs becomes a value of the graph, and a value that differs goes through a switch.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from spre_fx.errors import TraceError
from spre_fx.modules import TrainingFlag, TrainingSwitch
from spre_fx.passes.edit import add_module


def merge_modes(
    root: nn.Module, training: Graph, evaluation: Graph, modes: dict[nn.Module, bool]
) -> None:
    """Edit the graph traced in training until it is right in evaluation too.

    Args:
        root: The traced model, which receives flags and switches.
        training: The graph traced in training, edited.
        evaluation: The graph traced in evaluation.
        modes: The training mode of each module; those added here are entered.

    Raises:
        TraceError: If the two cannot be one graph, as where one changes a tensor in place.
    """
    _Merge(root, training, evaluation, modes).run()


class _Merge:
    """Merges the trace made in evaluation into the one made in training.

    Nodes of the two correspond when they do the same to corresponding values; calls of the same
    module always do. Nodes that only evaluation has are copied, in the order of evaluation.
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
        self.adopted: set[Node] = set()  # nodes that only evaluation has
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
            if _may_be_view_of(node, shared):
                self._refuse_in_place(node)
        self._check_order()

    def _check_order(self) -> None:
        seen: set[Node] = set()
        for node in self.graph.nodes:
            late = [producer.name for producer in node.all_input_nodes if producer not in seen]
            if late:
                raise TraceError(
                    f"{type(self.root).__name__}: expected training and evaluation to run layers "
                    f"in the same order, found {', '.join(late)} later in one than in the other."
                )
            seen.add(node)

    def _find(self, node: Node) -> Node | None:
        waiting = self.waiting.get((node.op, node.target), [])
        for theirs in waiting:
            if self._agree(theirs.args, node.args) and self._agree(theirs.kwargs, node.kwargs):
                return theirs
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
            return self._find_constant(node)
        # A module or the output is itself whatever comes in; what differs goes through a switch.
        return waiting[0] if waiting and node.op in ("call_module", "output") else None

    def _find_constant(self, node: Node) -> Node | None:
        """A tensor written in the forward gets a name of its own in each trace."""
        value = getattr(self.root, str(node.target))
        for (op, target), waiting in self.waiting.items():
            if op == "get_attr" and waiting and str(target).startswith("_tensor_constant"):
                other = getattr(self.root, target)
                if torch.equal(other, value):
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
                "that only evaluation makes. Its buffers would change in training.",
                _owner(node),
            )
        inputs = [self.counterpart[producer] for producer in node.all_input_nodes]
        if _may_be_view_of(node, set(self.counterpart) - self.adopted):
            self._refuse_in_place(node)
        self.adopted.add(node)
        with self.graph.inserting_after(max([self.last, *inputs])):
            return self.graph.node_copy(node, self.counterpart.__getitem__)

    def _refuse_in_place(self, node: Node) -> None:
        if _is_in_place(self.root, node):
            raise TraceError(
                f"{_owner(node) or type(self.root).__name__}: expected training and evaluation to "
                f"differ in values, found {node.name}, which changes one in place in one mode "
                "alone. Write that operation out of place.",
                _owner(node),
            )


def _owner(node: Node) -> str:
    """The name of the module whose forward made a node, "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    # A second run of a module is marked as name@1.
    names = [str(name).partition("@")[0] for name in stack]
    names = [name for name in names if not (node.op == "call_module" and name == node.target)]
    return names[-1] if names else ""


def _may_be_view_of(node: Node, others: Container[Node]) -> bool:
    """Whether an input of `node` is one of `others`, or may share its memory."""
    stack = list(node.all_input_nodes)
    while stack:
        producer = stack.pop()
        if producer in others:
            return True
        if _name(producer) in _VIEWS:
            stack += producer.all_input_nodes
    return False


def _has_buffers(root: nn.Module, call: Node) -> bool:
    return next(root.get_submodule(str(call.target)).buffers(), None) is not None


def _is_in_place(root: nn.Module, node: Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    name = _name(node)
    written = name.endswith("_") and not name.endswith("__")
    return written or node.target in _IN_PLACE or node.kwargs.get("inplace") is True


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else node.target.__name__


_VIEWS = frozenset(
    [
        "chunk",
        "detach",
        "expand",
        "flatten",
        "getattr",
        "getitem",
        "movedim",
        "narrow",
        "permute",
        "reshape",
        "select",
        "split",
        "squeeze",
        "swapaxes",
        "transpose",
        "unbind",
        "unflatten",
        "unsqueeze",
        "view",
        "view_as",
    ]
)
_IN_PLACE = {
    getattr(operator, name)
    for name in ("iadd", "iand", "ior", "imul", "ipow", "isub", "itruediv", "ixor", "setitem")
}
