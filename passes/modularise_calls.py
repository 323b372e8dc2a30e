"""Turns function calls on the parameters of a module into calls of an ordinary torch layer.

    y = F.conv2d(x, <p>.weight, <p>.bias, stride=2)   ->   y = <p>(x), an nn.Conv2d

So for `F.conv1d` to `F.conv3d`, `F.linear` and `F.batch_norm`. The layer takes the place of the
module that holds the parameters, and holds the very same ones: their names stay. A batch norm
whose class also applies an activation becomes two calls this way, and the activation a node of its
own behind it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from spre_fx.modules import TrainingFlag
from spre_fx.passes.base import Account, Pass, Reason, Skip
from spre_fx.passes.edit import erase_unused, replace_module
from spre_fx.passes.functional_calls import (
    BATCH_NORM,
    FunctionalCall,
    arguments_of,
    counts_batches,
    read_call,
)
from spre_fx.passes.graph_view import Candidate, GraphView, input_of

_NORMS: dict[int, type[nn.Module]] = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass(frozen=True)
class ModulariseCalls(Pass):
    """Make modules of the functional convs, linears and batch norms that can be one."""

    def rewrite(self, graph_module: GraphModule) -> Account:
        """Put layers where the parameters are and call them."""
        view = GraphView(graph_module)
        found = {name: _read(view, candidate) for name, candidate in view.candidates.items()}
        norms = read_batch_norms(view)
        for name, call in found.items():
            if isinstance(call, FunctionalCall):
                replace_module(graph_module, call.owner, _new_layer(graph_module, call))
                _call(graph_module, call.owner, view.candidates[name].calls)
        for norm, nodes in norms:
            replace_module(graph_module, norm.owner, _new_norm(view, norm, nodes))
            counts = [n for b in _trackers(view, norm.owner) for n in b.users if counts_batches(n)]
            checks = [check for node in nodes for check in _checks_of_rank(input_of(node))]
            _call(graph_module, norm.owner, nodes, [*counts, *checks])
        skipped = {name: skip for name, skip in found.items() if isinstance(skip, Skip)}
        return Account(tuple(name for name in found if name not in skipped), skipped)


def _read(view: GraphView, candidate: Candidate) -> FunctionalCall | Skip:
    if candidate.module is not None:
        return Skip(Reason.ALREADY_DONE, f"{candidate.name}: is a module already")
    if not candidate.calls:
        detail = f"{candidate.name}: is a parameter of {candidate.inside}, which is kept whole"
        return Skip(Reason.OPAQUE, detail)
    return read_layer(view, candidate)


def read_layer(view: GraphView, candidate: Candidate) -> FunctionalCall | Skip:
    """What module could make the calls of a functional conv or linear, or why none can."""
    calls = [read_call(view.graph_module, node) for node in candidate.calls]
    for call in calls:
        if isinstance(call, str):
            return Skip(Reason.FUNCTIONAL, f"{candidate.name}: {call}")
    first = calls[0]
    assert isinstance(first, FunctionalCall)
    if any(call != first for call in calls):
        detail = f"its weight is used in {len(calls)} calls that differ in bias or settings"
        return Skip(Reason.SHARED_PARAMETER, f"{candidate.name}: {detail}")
    other = _other_use(view, first.owner, ("weight", "bias"), candidate.calls)
    if other is not None:
        return Skip(Reason.SHARED_PARAMETER, f"{candidate.name}: {other}")
    return first


def _other_use(
    view: GraphView, owner: str, names: tuple[str, ...], calls: tuple[Node, ...]
) -> str | None:
    if id(view.modules[owner]) in view.calls:
        return f"its weight is used by a function, and {owner} is called as a module as well"
    for name in names:
        for user in view.users_of(f"{owner}.{name}"):
            if user not in calls:
                return f"its {name} is also read by {user.name}"
    return None


def read_batch_norms(view: GraphView) -> list[tuple[FunctionalCall, tuple[Node, ...]]]:
    """The functional batch norms that a module could make, each with its calls."""
    found: dict[str, list[tuple[Node, FunctionalCall]]] = {}
    for node in view.graph_module.graph.nodes:
        call = read_call(view.graph_module, node) if node.target is BATCH_NORM else None
        if isinstance(call, FunctionalCall):
            found.setdefault(call.owner, []).append((node, call))
    plans = []
    for pairs in found.values():
        nodes, calls = (tuple(each) for each in zip(*pairs, strict=True))
        if all(call == calls[0] for call in calls) and _is_norm(view, calls[0], nodes):
            plans.append((calls[0], nodes))
    return plans


_STATE = ("weight", "bias", "running_mean", "running_var")


def _is_norm(view: GraphView, call: FunctionalCall, nodes: tuple[Node, ...]) -> bool:
    assert call.flag is not None
    counts = [user for buffer in _trackers(view, call.owner) for user in buffer.users]
    return (
        isinstance(view.module_of(call.flag), TrainingFlag)
        and (call.has("weight") or not call.has("bias"))
        and all(map(counts_batches, counts))
        and len(counts) in (0, len(nodes))
        and _norm_kind(view, call, nodes) is not None
        and _other_use(view, call.owner, _STATE, nodes) is None
    )


def _trackers(view: GraphView, owner: str) -> list[Node]:
    return view.attributes.get(f"{owner}.num_batches_tracked", [])


def _norm_kind(
    view: GraphView, call: FunctionalCall, nodes: tuple[Node, ...]
) -> type[nn.Module] | None:
    """The class of torch for the rank of the input: what its owner is, or what the conv makes."""
    owner = view.modules[call.owner]
    known = next((kind for kind in _NORMS.values() if isinstance(owner, kind)), None)
    weights = []
    for maker in map(input_of, nodes):
        layer = view.module_of(maker)
        weight = getattr(layer, "weight", None)
        if layer is None and maker.op == "call_function":
            target = getattr(arguments_of(maker).get("weight"), "target", None)
            weight = view.tensor(target) if isinstance(target, str) else None
        is_conv = layer is None or isinstance(layer, nn.modules.conv._ConvNd)
        weights.append(weight.dim() if is_conv and isinstance(weight, torch.Tensor) else None)
    return known or (_NORMS.get(weights[0] or 0) if len(set(weights)) == 1 else None)


def _new_layer(graph_module: GraphModule, call: FunctionalCall) -> nn.Module:
    owner, kind = graph_module.get_submodule(call.owner), call.kind
    assert kind is not None
    weight: Any = owner._parameters["weight"]
    bias = owner._parameters["bias"] if call.has("bias") else None
    settings = dict(call.settings)
    if kind is nn.Linear:
        sizes = {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    else:
        sizes = {
            "in_channels": weight.shape[1] * settings.get("groups", 1),
            "out_channels": weight.shape[0],
            "kernel_size": tuple(weight.shape[2:]),
        }
        settings = {name: _each(value, weight.dim() - 2) for name, value in settings.items()}
    new = kind(**sizes, **settings, bias=bias is not None, device="meta")
    new._parameters |= {"weight": weight, "bias": bias}
    return new.train(owner.training)


def _each(value: Any, rank: int) -> Any:
    """A setting as torch's layers take it: a list of one counts for every axis."""
    if not isinstance(value, list | tuple):
        return value
    return tuple(value) * (rank if len(value) == 1 else 1)


def _new_norm(view: GraphView, call: FunctionalCall, nodes: tuple[Node, ...]) -> nn.Module:
    owner = view.graph_module.get_submodule(call.owner)
    kind: Any = _norm_kind(view, call, nodes)
    assert call.flag is not None
    flag = view.module_of(call.flag)
    assert flag is not None
    mean: Any = owner._buffers["running_mean"]
    new: nn.Module = kind(
        len(mean), **dict(call.settings), affine=call.has("weight"), device="meta"
    )
    tracked = owner._buffers["num_batches_tracked"] if _trackers(view, call.owner) else None
    new._parameters |= {
        n: owner._parameters[n] if call.has(n) else None for n in ("weight", "bias")
    }
    new._buffers |= {name: owner._buffers[name] for name in ("running_mean", "running_var")}
    new._buffers["num_batches_tracked"] = tracked
    return new.train(flag.training)


def _call(
    graph_module: GraphModule, owner: str, nodes: tuple[Node, ...], more: list[Node] | None = None
) -> None:
    """Let the module make the calls, and erase what only the functions needed."""
    for node in nodes:
        with graph_module.graph.inserting_before(node):
            new = graph_module.graph.call_module(owner, (input_of(node),))
        node.replace_all_uses_with(new)
    erase_unused(graph_module, [*nodes, *(more or [])])


def _checks_of_rank(x: Node) -> list[Node]:
    """What asserts how many axes a value has, which torch's batch norms do by themselves."""
    ranks = [user for user in x.users if user.target is getattr and user.args[1] == "ndim"]
    equal = [user for rank in ranks for user in rank.users if user.target is operator.eq]
    return [n for each in equal for n in each.users if n.target is torch._assert] + ranks
