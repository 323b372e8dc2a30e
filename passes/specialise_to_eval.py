"""Fixes a graph in evaluation mode: training flags become False, training-only outputs go."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node
from torch.fx.node import Argument, map_arg

from spre_fx.modules import TrainingFlag, TrainingSwitch
from spre_fx.passes.base import Account, Pass, Reason, Skip
from spre_fx.passes.edit import erase_unused
from spre_fx.passes.graph_view import GraphView


@dataclass(frozen=True)
class SpecialiseToEval(Pass):
    """Drop what only training needs, such as auxiliary classifiers."""

    def rewrite(self, graph_module: GraphModule) -> Account:
        """Replace flags and switches by what they are in evaluation, then remove dead code."""
        before = GraphView(graph_module)
        candidates = list(before.candidates)
        modes = [node for node in graph_module.graph.nodes if _follows_mode(before, node)]
        for node in modes:
            flag = isinstance(before.module_of(node), TrainingFlag)
            _substitute(node, False if flag else node.args[1])
        erase_unused(graph_module, modes)
        kept = GraphView(graph_module).candidates
        skipped = {
            name: Skip(Reason.USED_IN_EVALUATION, f"{name}: evaluation needs it")
            for name in candidates
            if name in kept
        }
        return Account(tuple(name for name in candidates if name not in kept), skipped)


def _follows_mode(view: GraphView, node: Node) -> bool:
    return isinstance(view.module_of(node), TrainingFlag | TrainingSwitch)


def _substitute(node: Node, value: Argument) -> None:
    """Put `value` wherever the value of `node` is used, at any depth of an argument."""
    for user in list(node.users):
        user.args = map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = map_arg(user.kwargs, lambda n: value if n is node else n)
