"""Lets lowered layers do what follows them: an addition, then an activation.

    activation(layer(x) + residual)   ->   layer(x, residual), with the activation as an attribute

A layer's output is then written once instead of up to three times. What does nothing in evaluation,
such as dropout, goes first, for it may stand between. Graphs without lowered layers stay as they
are.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from spre_fx.backends import is_layer, is_lowered
from spre_fx.passes.activations import activation_of, does_nothing, in_place
from spre_fx.passes.base import Account, Pass, Reason, Skip
from spre_fx.passes.edit import erase_unused
from spre_fx.passes.graph_view import Candidate, GraphView
from spre_fx.subclasses import has_hooks

_ADDS: tuple[Any, ...] = (operator.add, torch.add, "add")
_ADDS_IN_PLACE: tuple[Any, ...] = (operator.iadd, "add_")


@dataclass(frozen=True)
class FuseEpilogues(Pass):
    """Fuse additions and activations into the lowered layers before them."""

    def rewrite(self, graph_module: GraphModule) -> Account:
        """Edit the graph; the layers that took nothing up are skipped."""
        view = GraphView(graph_module)
        if any(is_lowered(candidate.module) for candidate in view.candidates.values()):
            _remove_what_does_nothing(view)
        order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
        found: dict[str, Skip | None] = {}
        for candidate in _last_first(view, order):
            found[candidate.name] = _refuse(candidate) or _fuse(view, candidate, order)
        skipped = {name: skip for name in view.candidates if (skip := found[name]) is not None}
        return Account(tuple(name for name in view.candidates if name not in skipped), skipped)


def _last_first(view: GraphView, order: dict[Node, int]) -> list[Candidate]:
    """The candidates such that, of two that are added, the later takes up the earlier."""
    position = {
        name: max((order[call] for call in candidate.calls), default=-1)
        for name, candidate in view.candidates.items()
    }
    names = sorted(position, key=position.__getitem__, reverse=True)
    return [view.candidates[name] for name in names]


def _remove_what_does_nothing(view: GraphView) -> None:
    nodes = [node for node in view.graph_module.graph.nodes if does_nothing(view, node)]
    for node in nodes:
        node.replace_all_uses_with(node.all_input_nodes[0])
    erase_unused(view.graph_module, nodes)


def _refuse(candidate: Candidate) -> Skip | None:
    name, layer = candidate.name, cast(Any, candidate.module)
    if not is_lowered(layer):
        return Skip(Reason.NOT_LOWERED, f"{name}: runs dense")
    if len(candidate.calls) != 1:
        return Skip(Reason.CALLED_TWICE, f"{name}: is called {len(candidate.calls)} times")
    if has_hooks(layer):
        return Skip(Reason.HAS_HOOKS, f"{name}: its hooks expect its own output")
    if layer.activation is not None or len(candidate.calls[0].args) > 1:
        return Skip(Reason.ALREADY_DONE, f"{name}: has taken up what follows")
    return None


def _fuse(view: GraphView, candidate: Candidate, order: dict[Node, int]) -> Skip | None:
    layer: Any = candidate.module
    (call,) = candidate.calls
    residual = _residual(view, call, order)
    end = call if residual is None else next(iter(call.users))
    activation = _only_user(end)
    if activation is not None and (name := activation_of(view, activation)) is not None:
        layer.activation, end = name, activation
    if end is call:
        return _why_not(candidate, call)
    if residual is not None:
        call.args = (*call.args, residual)
    end.replace_all_uses_with(call)
    erase_unused(view.graph_module, [end])
    return None


def _why_not(candidate: Candidate, call: Node) -> Skip:
    name, users = candidate.name, [user.name for user in call.users]
    if len(users) > 1:
        return Skip(Reason.OTHER_USERS, f"{name}: {', '.join(users)} take its output")
    detail = f"{users[0]} takes its output" if users else "nothing takes its output"
    return Skip(Reason.NO_EPILOGUE, f"{name}: {detail}")


def _only_user(node: Node) -> Node | None:
    """The only node that takes a value, and takes it once."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].all_input_nodes.count(node) == 1 else None


def _residual(view: GraphView, call: Node, order: dict[Node, int]) -> Node | None:
    """What is added to the output of a call, if that is there before the call; None if nothing."""
    add = _only_user(call)
    if add is None or add.kwargs or len(add.args) != 2:
        return None
    if add.target not in (*_ADDS, *_ADDS_IN_PLACE):
        return None
    other = add.args[1] if add.args[0] is call else add.args[0]
    if not isinstance(other, Node) or other is call or order[other] > order[call]:
        return None
    rest = [user for user in other.users if user is not add]
    between = [user for user in rest if order[call] < order[user] < order[add]]
    if any(in_place(view, user) for user in between):
        return None
    if add.target in _ADDS_IN_PLACE and add.args[1] is call:
        seen = any(order[user] > order[add] for user in rest)
        return None if seen or not _is_new(view, other) else other
    return other


def _is_new(view: GraphView, node: Node) -> bool:
    """Whether a value is a tensor of its own, which no other name stands for."""
    return is_layer(view.module_of(node)) or node.target in _ADDS
