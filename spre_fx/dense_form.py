"""`to_dense`: a lowered model as the ordinary torch layers that it stands for.

What a machine runs is made for that machine. Files, exporters, tables and a second lowering start
from the dense form: the same graph, the same names, the same weights bit for bit.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from spre_fx import records
from spre_fx.backends import is_lowered
from spre_fx.packed_ops import ACTIVATIONS
from spre_fx.subclasses import carry_hooks


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of a model in which every lowered layer is an ordinary torch layer again.

    Activations and additions that a layer had taken up are nodes of the graph again.

    Args:
        model: What `finalize`, `adopt` or `lower` returned, or any other model, which is copied.
    """
    dense = _restored(_copied(model))
    for module in dense.modules():
        if "backend" in (record := records.read(module)):
            records.write(module, records.without_choice(record))
    return dense


def dense_view(model: nn.Module) -> nn.Module:
    """The dense form of a model with records of what it is lowered to; itself where it is dense."""
    return _restored(_copied(model)) if any(map(is_lowered, model.modules())) else model


def _copied(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    for ours, theirs in zip(copied.modules(), model.modules(), strict=True):
        if isinstance(theirs, GraphModule):
            carry_hooks(theirs, ours)
    return copied


def _restored(model: nn.Module) -> nn.Module:
    """The dense form in place: the model itself, or the graph that takes its place."""
    dense: dict[nn.Module, nn.Module] = {}
    for module in reversed(list(model.modules())):  # the graphs inside a graph come behind it
        if isinstance(module, GraphModule) and _unfuse(module) | _is_planned(module):
            dense[module] = _plain(module)
        elif is_lowered(module):
            layer: Any = module
            dense[layer] = _dense(layer)
    return replace_everywhere(model, dense)


def replace_everywhere(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put other modules in the places of some, also inside those others; the model or its heir."""
    for root in (model, *new.values()):
        for module in list(root.modules()):
            for name, child in module._modules.items():
                if child is not None and child in new:
                    module._modules[name] = new[child]
    return new.get(model, model)


def _dense(lowered: Any) -> nn.Module:
    layer: nn.Module = lowered.to_dense().train(lowered.training)
    carry_hooks(lowered, layer)
    records.write(layer, records.read(lowered))
    return layer


def _is_planned(graph_module: GraphModule) -> bool:
    """Whether a graph is of a class of ours: torch makes a class for every single GraphModule."""
    return type(graph_module).__mro__[1] is not GraphModule


def _plain(graph_module: GraphModule) -> GraphModule:
    plain = GraphModule(graph_module, graph_module.graph, type(graph_module).__name__)
    plain.training = graph_module.training
    carry_hooks(graph_module, plain)
    if record := records.read(graph_module):
        records.write(plain, record)
    return plain


def _unfuse(graph_module: GraphModule) -> bool:
    """Give what lowered layers have taken up nodes of their own; whether there are such layers."""
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    calls = [n for n in graph_module.graph.nodes if n.op == "call_module"]
    lowered = [node for node in calls if is_lowered(modules[str(node.target)])]
    for node in lowered:
        layer: Any = modules[str(node.target)]
        residual = node.args[1] if len(node.args) > 1 else None
        node.args, end = node.args[:1], node
        if residual is not None:
            end = _append(end, node, operator.add, residual)
        if layer.activation is not None:
            _append(end, node, ACTIVATIONS[layer.activation][1])
    graph_module.recompile()
    return bool(lowered)


def _append(end: Node, layer: Node, function: Any, *more: Any) -> Node:
    """Put a call between `end` and whoever takes its value, named after the layer."""
    with end.graph.inserting_after(end):
        name = f"{layer.name}_{function.__name__}"
        new = end.graph.create_node("call_function", function, (), name=name)
    end.replace_all_uses_with(new)
    new.args = (end, *more)
    return new
