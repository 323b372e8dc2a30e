"""What becomes a node when a model is traced, and what the tracer takes note of on the way."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx import Tracer as FxTracer

from spre_fx.batch_norm import is_batch_norm
from spre_fx.modules import (
    MaskSchedule,
    NMLayer,
    SpReConv,
    TrainingFlag,
    TrainingSwitch,
)
from spre_fx.passes.edit import keep_owners
from spre_fx.passes.functional_calls import FunctionalCall, reads_metadata
from spre_fx.passes.graph_view import GraphView
from spre_fx.passes.lost_in_trace import context
from spre_fx.passes.merge_modes import merge_modes
from spre_fx.passes.modularise_calls import read_batch_norms, read_layer
from spre_fx.subclasses import has_hooks

_WHOLE = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.Linear)
_LEAVES = (
    *_WHOLE,
    MaskSchedule,
    NMLayer,
    SpReConv,
    TrainingFlag,
    TrainingSwitch,
)


class Tracer(FxTracer):
    """Keeps convs, batch norms, linears and our own modules whole, and whatever is named.

    A subclass of a conv, batch norm or linear whose forward comes down to the function of torch on
    its own parameters is traced through, so that a pass can make an ordinary module of that call.
    Buffers are values of the graph as parameters are, so that what changes them is recorded. What
    timm marks as not to be traced is kept whole.

    Args:
        leaves: More modules to keep whole: names, globs or types.
    """

    def __init__(self, leaves: Sequence[str | type[nn.Module]] = ()) -> None:
        modules, functions = _not_traced_by_timm()
        super().__init__(autowrap_functions=functions)
        self._leaves = leaves
        self._names = [leaf for leaf in leaves if isinstance(leaf, str)]
        self._types = tuple(leaf for leaf in leaves if isinstance(leaf, type))
        self._opaque = modules
        self._opened: set[nn.Module] = set()
        self._tensors: dict[int, str] = {}
        self.path = ""
        self.asked_for_mode = False
        self._context = context()

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        """As usual, unless the operation runs in a context that the graph would not show."""
        if context() != self._context:
            raise RuntimeError(
                "it runs under torch.no_grad(), autocast, activation checkpointing or the like, "
                "which a graph does not hold"
            )
        return super().create_node(*args, **kwargs)

    def trace(
        self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None
    ) -> Graph:
        """As usual, once it is known which subclasses can be looked through."""
        if isinstance(root, nn.Module):
            named = (*root.named_parameters(), *root.named_buffers())
            self._tensors = {id(tensor): name for name, tensor in reversed(named)}
            # Of a pickled graph, whose modules are nodes already, torch.fx asks less.
            may_open = self._may_open if type(self) is Tracer else lambda _: False
            self._opened |= self._looked_through([m for m in root.modules() if may_open(m)])
        graph = super().trace(root, concrete_args)
        for node in reversed(graph.nodes):
            if reads_metadata(node) and not node.users:
                graph.erase_node(node)
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether `m` stays one node."""
        if isinstance(m, self._types) or any(
            fnmatchcase(module_qualified_name, name) for name in self._names
        ):
            return True
        return m not in self._opened and (
            isinstance(m, _LEAVES + self._opaque)
            or is_batch_norm(m)
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
        checks = m in self._opened and isinstance(m, nn.modules.batchnorm._NormBase)
        if checks:  # it would branch on the rank of a value that has none yet
            vars(m)["_check_input_dim"] = _accept
        try:
            result = super().call_module(m, forward, args, kwargs)
        finally:
            if checks:
                del vars(m)["_check_input_dim"]
        self.path = outer
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter or buffer as a value of the graph; takes note of code that asks the mode."""
        if attr == "training":
            self.asked_for_mode = True
        name = self._tensors.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy(
                *("get_attr", name, (), {}),
                proxy_factory_fn=lambda node: _TensorProxy(node, self, attr_val),
            )
        return parameter_proxy_cache[name]

    def _may_open(self, module: nn.Module) -> bool:
        """Whether a module is of a subclass with a forward of its own."""
        theirs = type(module).__module__.startswith(("torch.nn.", "torch.ao.", "spre_fx."))
        if not isinstance(module, _WHOLE) or theirs or module in self._opened:
            return False
        return not (is_batch_norm(module) or has_hooks(module) or _runs_forward_of_torch(module))

    def _looked_through(self, modules: Sequence[nn.Module]) -> set[nn.Module]:
        """Those whose forward is one function of torch on their own parameters.

        All are tried in one trace; where that fails each is tried by itself.
        """
        if not modules:
            return set()
        root = _CallEach(map(_skeleton, modules))
        modes = {each: each.training for each in root.modules()}
        try:
            training, evaluation = (self._try(root.train(mode)) for mode in (True, False))
            merge_modes(root, training, evaluation, modes)
        except Exception:  # whatever the user's code raises: it stays whole
            if len(modules) == 1:
                return set()
            return {module for each in modules for module in self._looked_through([each])}
        graph_module = GraphModule(root, training)
        keep_owners(root, graph_module)
        view = GraphView(graph_module)
        norms = {call.owner for call, _ in read_batch_norms(view)}
        return {m for i, m in enumerate(modules) if f"each.{i}" in norms or _is_layer(view, i)}

    def _try(self, root: _CallEach) -> Graph:
        tracer = Tracer(self._leaves)
        tracer._opened = set(root.each)
        return tracer.trace(root)


class _CallEach(nn.Module):
    """A model that calls each of some modules."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Any:
        return [module(x) for module in self.each]


def _is_layer(view: GraphView, number: int) -> bool:
    layer = view.candidates.get(f"each.{number}")
    if layer is None or layer.module is not None:
        return False
    return isinstance(read_layer(view, layer), FunctionalCall)


class _TensorProxy(Proxy):
    """A parameter or buffer in a trace: its shape is that of the tensor."""

    def __init__(self, node: Node, tracer: FxTracer, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self._tensor = tensor

    @property
    def shape(self) -> torch.Size:
        return self._tensor.shape

    @property
    def ndim(self) -> int:
        return self._tensor.ndim

    def size(self, dim: int | None = None) -> Any:
        return self._tensor.shape if dim is None else self._tensor.shape[dim]

    def dim(self) -> int:
        return self._tensor.dim()

    def numel(self) -> int:
        return self._tensor.numel()


def _accept(_: object) -> None:
    """Stand in for a check that cannot be traced; the module that makes the call has it again."""


def _runs_forward_of_torch(module: nn.Module) -> bool:
    return type(module).forward.__module__.startswith("torch.") and "forward" not in vars(module)


def _skeleton(module: nn.Module) -> nn.Module:
    """A copy that shares all tensors, and can be given modes and modules of its own."""
    clone = copy.copy(module)
    vars(clone).update({name: dict(vars(clone)[name]) for name in ("_parameters", "_buffers")})
    vars(clone)["training"] = module.training
    clone._buffers.pop("training", None)  # where a trace that watches for it has hidden it
    children = {n: None if m is None else _skeleton(m) for n, m in module._modules.items()}
    vars(clone)["_modules"] = children
    return clone


def _not_traced_by_timm() -> tuple[tuple[type[nn.Module], ...], tuple[Callable[..., Any], ...]]:
    """The modules and functions timm says cannot be traced, where timm is in use at all."""
    marks, padding = sys.modules.get("timm.layers._fx"), sys.modules.get("timm.layers.padding")
    if marks is None or padding is None:
        return (), ()
    functions = (*marks.get_notrace_functions(), padding.pad_same)
    return tuple(marks.get_notrace_modules()), tuple(filter(callable, functions))
