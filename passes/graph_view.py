"""A read-only view of a traced model: its graph as a networkx DiGraph, its convs and its calls."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from spre_fx import records
from spre_fx.backends import is_layer
from spre_fx.batch_norm import is_batch_norm
from spre_fx.modules import SPARSIFIABLE, Layer, NMLayer, SpReConv
from spre_fx.passes.functional_calls import LAYER_FUNCTIONS, owner_of, reads_metadata
from spre_fx.subclasses import plain_base

_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Candidate:
    """A conv or linear of the model.

    Attributes:
        name: The module's qualified name. For a functional call, that of the module whose
            `weight` it takes, or the node's name; for a weight of `nn.MultiheadAttention`, its own.
        module: The module; None for a functional call and for a weight of an attention.
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
        self.chains: dict[Node, Any] = {}  # what the matcher has followed from a conv already

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
    def attributes(self) -> dict[str, list[Node]]:
        """The nodes that read each parameter or buffer, by its name."""
        attributes = defaultdict(list)
        for node in self.graph_module.graph.nodes:
            if node.op == "get_attr":
                attributes[str(node.target)].append(node)
        return dict(attributes)

    def users_of(self, name: str) -> list[Node]:
        """The nodes that use the values of a parameter or buffer which the graph itself reads."""
        return [
            user
            for attribute in self.attributes.get(name, ())
            for user in self.users(attribute)
            if not reads_metadata(user)
        ]

    @cached_property
    def readers(self) -> dict[int, list[Node]]:
        """The nodes that use the values of each tensor the graph reads, by the tensor's id."""
        return {
            id(self.tensor(name)): users
            for name in self.attributes
            if (users := self.users_of(name))
        }

    def tensor(self, name: str) -> Tensor | None:
        """The parameter or buffer of that name."""
        owner, _, attribute = name.rpartition(".")
        tensor = getattr(self.modules.get(owner), attribute, None)
        return tensor if isinstance(tensor, Tensor) else None

    def shared(self, module: nn.Module) -> str | None:
        """What else uses a parameter of `module`, in words; None where nothing does."""
        for name, parameter in module.named_parameters(recurse=False):
            owners = self.owners[id(parameter)]
            if len(owners) > 1:
                return f"its {name} is shared by {', '.join(owners)}"
        return self.read_elsewhere(module) or records.read(module).get("shared")

    def read_elsewhere(self, module: nn.Module) -> str | None:
        """What else in the graph reads a parameter or buffer of `module`, in words."""
        for name, tensor in {**module._parameters, **module._buffers}.items():
            readers = [] if tensor is None else self.readers.get(id(tensor), [])
            if readers:
                return f"its {name} is also read by {', '.join(node.name for node in readers)}"
        return None

    @cached_property
    def candidates(self) -> dict[str, Candidate]:
        """Every conv and linear, module or functional call, by name. SpRe branches are no sites.

        Those in a part with a graph of its own belong to that graph.
        """
        found = {}
        for name, module in self.graph_module.named_modules():
            if is_layer(module) and not isinstance(module, SpReConv):
                calls = tuple(self.calls.get(id(module), ()))
                inside = self.enclosing_leaf(name)
                if inside is None or not _is_divided(self.modules[inside]):
                    found[name] = Candidate(name, module, calls, inside)
            if isinstance(module, nn.MultiheadAttention):
                found |= {each.name: each for each in self._of_attention(name, module)}
        for name, nodes in self._functional_calls(set(found)).items():
            found[name] = Candidate(name, None, tuple(nodes), None)
        return found

    def _of_attention(self, name: str, module: nn.MultiheadAttention) -> Iterator[Candidate]:
        for weight in _ATTENTION_WEIGHTS:
            own = f"{name}.{weight}"
            inside = self.enclosing_leaf(own)
            divided = inside is not None and _is_divided(self.modules[inside])
            if module._parameters.get(weight) is not None and not divided:
                yield Candidate(own, None, (), inside)

    def _functional_calls(self, modules: set[str]) -> dict[str, list[Node]]:
        found = defaultdict(list)
        for node in self.graph_module.graph.nodes:
            if node.op == "call_function" and node.target in LAYER_FUNCTIONS:
                owner = owner_of(node)
                if owner is None or id(self.modules[owner]) in self.calls:
                    owner = f"{node.name} (function)" if node.name in modules else node.name
                found[owner].append(node)
        return found

    def enclosing_leaf(self, name: str) -> str | None:
        """The name of the module, a single node of the graph, that a module is inside of."""
        parts = name.split(".")
        parents = (".".join(parts[:end]) for end in range(1, len(parts)))
        return next((p for p in parents if self._runs_what_is_inside(self.modules[p])), None)

    def _runs_what_is_inside(self, module: nn.Module) -> bool:
        """Whether a module is called, and is no layer that holds others without running them."""
        if id(module) not in self.calls:
            return False
        plain = isinstance(module, NMLayer) or plain_base(module, SPARSIFIABLE) is not None
        return not plain and not is_batch_norm(module)

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
