"""A read-only view of a traced model: its graph as a networkx DiGraph, its convs and its calls."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import torch
from torch import nn
from torch.fx import GraphModule, Node

from spre_fx import records
from spre_fx.modules import Layer, NMLayer, SpReConv

_FUNCTIONAL = {
    function
    for name in ("conv1d", "conv2d", "conv3d", "linear")
    for function in (getattr(nn.functional, name), getattr(torch, name, None))
    if function is not None
} | {
    getattr(module, f"conv_transpose{rank}d")
    for rank in (1, 2, 3)
    for module in (nn.functional, torch)
}


@dataclass(frozen=True)
class Candidate:
    """A conv or linear of the model.

    Attributes:
        name: The module's qualified name, or the node's name for a functional call.
        module: The module; None for a functional call.
        calls: The nodes that call it.
        inside: The module, kept whole by the tracer, that it is a part of; None for most.
    """

    name: str
    module: Layer | None
    calls: tuple[Node, ...]
    inside: str | None


class GraphView:
    """What the passes ask about a graph. Made once, in time linear in the graph; never edits.

    Args:
        graph_module: The traced model.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        self.graph_module = graph_module
        self.modules = dict(graph_module.named_modules(remove_duplicate=False))

    @cached_property
    def digraph(self) -> nx.DiGraph[Node]:
        """The nodes in execution order, an edge from each value to each of its users."""
        digraph: nx.DiGraph[Node] = nx.DiGraph()
        digraph.add_nodes_from(self.graph_module.graph.nodes)
        digraph.add_edges_from(
            (value, node)
            for node in self.graph_module.graph.nodes
            for value in node.all_input_nodes
        )
        return digraph

    @cached_property
    def calls(self) -> dict[int, list[Node]]:
        """The nodes that call each module, by the module's id: one module can have two names."""
        calls = defaultdict(list)
        for node in self.graph_module.graph.nodes:
            if node.op == "call_module":
                calls[id(self.modules[str(node.target)])].append(node)
        return calls

    @cached_property
    def owners(self) -> dict[int, list[str]]:
        """The names of the modules that hold each parameter, by the parameter's id."""
        owners = defaultdict(list)
        for name, module in self.graph_module.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners[id(parameter)].append(name)
        return owners

    @cached_property
    def readers(self) -> dict[int, list[str]]:
        """The names of the nodes that read each parameter or buffer by themselves, by its id."""
        readers = defaultdict(list)
        for node in self.graph_module.graph.nodes:
            if node.op == "get_attr":
                parent, _, leaf = str(node.target).rpartition(".")
                readers[id(getattr(self.modules[parent], leaf))].append(node.name)
        return readers

    def shared(self, module: nn.Module) -> str | None:
        """What else uses a parameter of `module`, in words; None where nothing does."""
        for name, parameter in module.named_parameters(recurse=False):
            owners, readers = self.owners[id(parameter)], self.readers[id(parameter)]
            if len(owners) > 1:
                return f"its {name} is shared by {', '.join(owners)}"
            if readers:
                return f"its {name} is also read by {', '.join(readers)}"
        return records.read(module).get("shared")

    @cached_property
    def candidates(self) -> dict[str, Candidate]:
        """Every conv and linear, module or functional call, by name. SpRe branches are no sites.

        Those in a part with a graph of its own belong to that graph.
        """
        found = {}
        for name, module in self.graph_module.named_modules():
            if isinstance(module, Layer) and not isinstance(module, SpReConv):
                calls = tuple(self.calls.get(id(module), ()))
                inside = self.enclosing_leaf(name)
                if inside is None or not _is_divided(self.modules[inside]):
                    found[name] = Candidate(name, module, calls, inside)
        for node in self.graph_module.graph.nodes:
            if node.op == "call_function" and node.target in _FUNCTIONAL:
                name = f"{node.name} (function)" if node.name in found else node.name
                found[name] = Candidate(name, None, (node,), None)
        return found

    def enclosing_leaf(self, name: str) -> str | None:
        """The name of the module, a single node of the graph, that a module is inside of."""
        parts = name.split(".")
        parents = (".".join(parts[:end]) for end in range(1, len(parts)))
        return next((p for p in parents if id(self.modules[p]) in self.calls), None)

    def module_of(self, node: Node) -> nn.Module | None:
        """The module a node calls, None if it calls none."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def producers(self, node: Node) -> list[Node]:
        """The nodes whose values `node` takes."""
        return list(self.digraph.predecessors(node))

    def users(self, node: Node) -> list[Node]:
        """The nodes that take the value of `node`."""
        return list(self.digraph.successors(node))

    def feature_map(self, conv: Node) -> Node:
        """The node that carries y: `conv` itself, or item 0 of what a conv with masks returns."""
        module = self.module_of(conv)
        if isinstance(module, NMLayer) and module.live_taps is not None:
            return next(user for user in self.users(conv) if is_item(user, 0))
        return conv


def _is_divided(module: nn.Module) -> bool:
    """Whether a node calls a module that has a graph, or parts with graphs, of its own."""
    return isinstance(module, GraphModule) or bool(records.read(module).get("divided"))


def is_item(node: Node, index: int) -> bool:
    """Whether `node` takes item `index` of a tuple."""
    return node.target is operator.getitem and bool(node.args[1] == index)


def input_of(layer: Node) -> Node:
    """The node that a conv or linear takes its input from."""
    value = layer.args[0] if layer.args else next(iter(layer.kwargs.values()))
    assert isinstance(value, Node)
    return value
