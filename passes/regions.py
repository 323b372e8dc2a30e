"""The parts of a model that have a graph.

A model that torch.fx can follow is one region. A module that it cannot follow stays as it is, run
by its own code: it is a single node of the graph around it, and each of the largest parts inside
that torch.fx can follow is a region of its own. A layer that such code calls by itself makes a
region of one node, until it is put back as a layer.

While passes work on a region, its targets are names from the root of the whole model; where it
stands in the model, they are names from its own root.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.fx import Graph, GraphModule

from spre_fx import records
from spre_fx.backends import is_layer
from spre_fx.batch_norm import is_batch_norm
from spre_fx.errors import TraceError
from spre_fx.modules import Layer
from spre_fx.passes.edit import keep_owners
from spre_fx.passes.outside_code import read_code
from spre_fx.passes.tracer import Tracer
from spre_fx.passes.tracing import trace_in_place
from spre_fx.subclasses import carry_hooks, has_hooks


@dataclass(frozen=True)
class Region:
    """A part of a model that has a graph.

    Attributes:
        names: Where it stands in the model, more than once for a module with several names; ""
            for a model that is one region.
        graph_module: Its graph, with targets named from the root of the model.
        caller: For a layer that code without a graph calls by itself: that code, in words.
    """

    names: tuple[str, ...]
    graph_module: GraphModule
    caller: str | None = None


def divide(root: nn.Module) -> list[Region]:
    """Trace a model, or the largest parts of it that torch.fx can follow; outer regions first.

    Args:
        root: The model, whose modules the regions hold. What may not be masked, since other code
            uses it too, is written into its record.
    """
    return list(_Division(root).regions())


def find_regions(model: nn.Module) -> list[Region]:
    """The regions of a model that `assemble` put together; outer regions first."""
    return list(_Search(model).regions())


def is_divided(model: nn.Module) -> bool:
    """Whether `model` has been through `prepare`, so that its graphs are its regions."""
    return isinstance(model, GraphModule) or any(
        is_layer(module) and records.read(module) for module in model.modules()
    )


def assemble(root: nn.Module, regions: list[Region]) -> nn.Module:
    """Put regions where they stand in a model.

    Args:
        root: The model, which is edited.
        regions: Of that model, outer ones first.

    Returns:
        The model, or the graph of its only region where that is all of it.
    """
    placed: list[tuple[str, nn.Module]] = []
    whole = root
    for region in regions:
        path = region.names[0]
        module = region.graph_module.get_submodule(path)
        if region.caller is None:
            if path:
                kind = type(region.graph_module).__name__
                module = _moved(region.graph_module.graph, module, path, "", kind)
            carry_hooks(root.get_submodule(path), module)
        if path:
            placed += [(name, module) for name in region.names]
        else:
            whole = module
    for name, module in sorted(placed, key=lambda place: place[0].count(".")):  # outer ones first
        parent, _, leaf = name.rpartition(".")
        whole.get_submodule(parent)._modules[leaf] = module
    return whole


def _moved(graph: Graph, root: nn.Module, old: str, new: str, name: str) -> GraphModule:
    """The GraphModule of a graph whose targets start with `new` instead of `old`, under `root`."""
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            relative = str(node.target).removeprefix(f"{old}.")
            node.target = f"{new}.{relative}" if new else relative
    named = dict(root.named_modules(remove_duplicate=False))
    moved = GraphModule(root, graph, name)
    keep_owners(root, moved)
    for target, module in moved.named_modules():
        module.training = named[target].training
    return moved


def _nested(module: nn.Module, path: str) -> nn.Module:
    """A model that holds `module` under `path` and nothing else."""
    for name in reversed(path.split(".")):
        outer = nn.Module().train(module.training)
        outer.add_module(name, module)
        module = outer
    return module


def has_forward(module: nn.Module) -> bool:
    """Whether `module` can be called, unlike an `nn.ModuleList`."""
    return type(module).forward is not nn.Module.forward


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is a conv or linear, or holds a weight that one may be computed with.

    Those of torch do not, but for the outline of a user's own module in a graph.
    """
    weight = module._parameters.get("weight")
    own = type(module) is nn.Module or not module.__module__.startswith("torch.")
    return is_layer(module) or (weight is not None and weight.dim() > 1 and own)


class _Walk(ABC):
    """Goes through a model from its root to its layers; what it meets becomes regions."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.names: dict[nn.Module, list[str]] = defaultdict(list)
        for name, module in root.named_modules(remove_duplicate=False):
            self.names[module].append(name)
        self.waiting = deque([(root, "")])

    def regions(self) -> Iterator[Region]:
        """Each part that has a graph."""
        seen = set()
        while self.waiting:
            module, caller = self.waiting.popleft()
            if module not in seen and any(map(_is_layer, module.modules())):
                seen.add(module)
                yield from self.visit(module, caller)

    @abstractmethod
    def visit(self, module: nn.Module, caller: str) -> Iterator[Region]:
        """The region that starts at a module which `caller` calls, if one does."""

    def go_on_with(self, modules: Iterable[nn.Module], caller: str) -> None:
        """Visit these next: modules inside that of this visit."""
        self.waiting.extendleft((module, caller) for module in reversed(list(modules)))

    def alone(self, module: nn.Module, caller: str) -> Region:
        """The region of a module that is kept whole."""
        names = tuple(self.names[module])
        graph = Graph()
        graph.output(graph.call_module(names[0], (graph.placeholder("input"),)))
        return Region(names, GraphModule(_nested(module, names[0]), graph), caller)

    def is_kept_whole(self, module: nn.Module) -> bool:
        """Whether the tracer takes `module` for a single operation. A list of modules is none."""
        name = self.names[module][0]
        return bool(name) and has_forward(module) and Tracer().is_leaf_module(module, name)


class _Search(_Walk):
    """Finds the GraphModules of a divided model."""

    def visit(self, module: nn.Module, caller: str) -> Iterator[Region]:
        names = tuple(self.names[module])
        if isinstance(module, GraphModule):
            yield Region(names, _from_root(module, names[0]))
            called = {str(n.target) for n in module.graph.nodes if n.op == "call_module"}
            inside = [module.get_submodule(name) for name in sorted(called)]
            self.go_on_with([m for m in inside if not self.is_kept_whole(m)], caller)
        elif self.is_kept_whole(module):
            yield self.alone(module, caller)
        else:
            self.go_on_with(module.children(), caller)


def _from_root(graph_module: GraphModule, path: str) -> GraphModule:
    if not path:
        return graph_module
    graph = copy.deepcopy(graph_module.graph)
    return _moved(graph, _nested(graph_module, path), "", path, type(graph_module).__name__)


class _Division(_Walk):
    """Makes a GraphModule of every part it can."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)
        self.taken_apart: set[nn.Module] = set()
        self.tied_are_known = False

    def visit(self, module: nn.Module, caller: str) -> Iterator[Region]:
        if self.is_kept_whole(module):
            yield self.alone(module, caller)
            return
        names = tuple(self.names[module])
        if has_forward(module) and module not in self.taken_apart:
            leaves = self._boundaries(module, names[0])
            traced = self._trace(module, leaves)
            if isinstance(traced, GraphModule):
                called = {str(n.target) for n in traced.graph.nodes if n.op == "call_module"}
                inside = [module.get_submodule(leaf) for leaf in sorted(leaves & called)]
                yield Region(names, _from_root(traced, names[0]))
                self.go_on_with(inside, caller)
                return
            caller = f"{names[0] or 'the model'} ({type(module).__name__})"
            caller += f", which torch.fx cannot follow: {traced.cause}"
        self._open(module, caller)

    def _boundaries(self, module: nn.Module, path: str) -> set[str]:
        """Names within `module` of what must stay a module: it has hooks, or a use elsewhere."""
        found: set[str] = set()
        for name, inner in module.named_modules():
            if not name or any(name.startswith(f"{boundary}.") for boundary in found):
                continue
            elsewhere = [n for n in self.names[inner] if path and not n.startswith(f"{path}.")]
            if isinstance(inner, Layer) or is_batch_norm(inner):
                if elsewhere:
                    _note_shared(inner, f"it also stands at {', '.join(elsewhere)}")
            elif elsewhere or has_hooks(inner):
                found.add(name)
        return found

    def _trace(self, module: nn.Module, leaves: set[str]) -> GraphModule | TraceError:
        """Trace, with more and more modules kept whole: those that torch.fx cannot follow."""
        while True:
            try:
                return trace_in_place(module, sorted(leaves))
            except TraceError as error:
                if not error.module or error.module in leaves:
                    return error
                kind = type(module.get_submodule(error.module))
                leaves |= {error.module}
                if not kind.__module__.startswith("torch.nn"):  # its like will fail as well
                    leaves |= {n for n, m in module.named_modules() if n and type(m) is kind}

    def _open(self, module: nn.Module, caller: str) -> None:
        """Leave a module to its own code, and go on with the modules inside."""
        records.write(module, records.Record(divided=True))
        if not self.tied_are_known:
            self._note_tied_parameters()
        code = read_code(module)
        self.taken_apart |= code.taken_apart
        for inner in code.read:
            who = caller.partition(",")[0]
            _note_shared(inner, f"its weight is read by {who}, which torch.fx cannot follow")
        self.go_on_with(module.children(), caller)

    def _note_tied_parameters(self) -> None:
        """A region does not show who holds its parameters outside of it."""
        self.tied_are_known = True
        owners = defaultdict(list)
        for module, names in self.names.items():
            for leaf, parameter in module.named_parameters(recurse=False):
                owners[parameter].append((module, names[0], leaf))
        for tied in owners.values():
            for module, _, leaf in tied if len(tied) > 1 else ():
                holders = ", ".join(name for _, name, _ in tied)
                _note_shared(module, f"its {leaf} is shared by {holders}")


def _note_shared(module: nn.Module, sentence: str) -> None:
    records.write(module, records.read(module) | records.Record(shared=sentence))
