"""`PlannedGraphModule`: a deployed graph that the engine runs as a program where it can.

The graph stays what it is: what tracing, compiling, exporting, copying and saving see. A plain call
for inference runs the program of its input shapes instead, which is made at the first such call.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen
from torch.fx.graph_module import reduce_graph_module

from spre_fx import engine
from spre_fx.dense_form import replace_everywhere
from spre_fx.packed_layers import PackedConv2d, PackedLinear
from spre_fx.passes.native_steps import Value
from spre_fx.passes.plan_memory import plan_memory, values_of
from spre_fx.planned import (
    Native,
    Plan,
    PlannedBatches,
    PlannedProgram,
    ShapesChangedError,
    images_at_a_time,
)
from spre_fx.subclasses import carry_hooks

_PROGRAMS = 8  # kept at a time: shapes come and go
_PLAIN = (bool, int, float, str, type(None))
_Key = tuple[object, ...]


def planned(model: nn.Module) -> nn.Module:
    """The model, with each graph in it that holds packed layers planned.

    Args:
        model: A lowered model, which is edited.

    Returns:
        The model, or the graph that takes its place.
    """
    if engine.load() is None:
        return model
    graphs = [module for module in model.modules() if isinstance(module, GraphModule)]
    new: dict[nn.Module, nn.Module] = {g: _planned(g) for g in graphs if _holds_packed(g)}
    return replace_everywhere(model, new)


def _holds_packed(graph_module: GraphModule) -> bool:
    called = [n for n in graph_module.graph.nodes if n.op == "call_module"]
    layers = (graph_module.get_submodule(str(node.target)) for node in called)
    return any(isinstance(layer, PackedConv2d | PackedLinear) for layer in layers)


def _planned(graph_module: GraphModule) -> GraphModule:
    kind = type(graph_module).__name__
    new = PlannedGraphModule(graph_module, graph_module.graph, kind)
    new.training = graph_module.training
    carry_hooks(graph_module, new)
    vars(new).update({k: v for k, v in vars(graph_module).items() if k == "spre_fx_record"})
    return new


class PlannedGraphModule(GraphModule):
    """A GraphModule that runs as a program of the engine where nothing but its result counts.

    Where more than that counts, it runs as the graph it is: under tracing, compiling and exporting,
    with gradients or autocast, with hooks on its modules, in training mode. `why_not` says so.
    """

    _runs: _Runs

    def recompile(self) -> Any:
        """Make the code of the graph anew, and forget the programs of what it was."""
        code = super().recompile()
        own: Any = type(self)  # torch makes a class for each single GraphModule
        graph_forward = own.forward

        @functools.wraps(graph_forward)
        def forward(self: PlannedGraphModule, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return graph_forward(self, *args, **kwargs)
            return self._run(graph_forward, args, kwargs)

        own.forward = forward
        self._runs = _Runs()
        return code

    def _run(
        self, graph_forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if kwargs or len(args) != self._runs.count_inputs(self):
            bound = inspect.signature(graph_forward).bind(self, *args, **kwargs)
            bound.apply_defaults()
            args = bound.args[1:]
        self._runs.why_not = _why_not(self, args)
        if not self._runs.why_not:
            try:
                program = self._runs.program(self, args)
                if program is not None:
                    return program(args)
            except ShapesChangedError:
                self._runs.why_not = "shapes on the way depend on the numbers of the input"
        return graph_forward(self, *args)

    def plan(self, *inputs: Any) -> Plan | str:
        """What runs for inputs of those shapes; a sentence where the graph itself does."""
        with torch.no_grad():
            reason = _why_not(self, inputs)
            program = None if reason else self._runs.program(self, inputs)
        if program is None:
            return f"runs as a graph: {reason or 'the engine takes none of its nodes'}."
        return program.plan

    @property
    def why_not(self) -> str:
        """Why the last call ran the graph itself; "" where it ran a program."""
        return self._runs.why_not

    def __copy__(self) -> GraphModule:
        return _planned(self)

    def __reduce__(self) -> Any:
        _, (state, imports) = super().__reduce__()
        state = {name: value for name, value in state.items() if name != "_runs"}
        return _from_pickle, (state, imports)


def _from_pickle(state: dict[str, Any], imports: str) -> GraphModule:
    graph_module: Any = reduce_graph_module(state, imports)
    return _planned(graph_module)


@dataclass(eq=False)
class _Guard:
    """Whether a model is still what its programs were made of.

    Attributes:
        places: Where each module stands that the graph calls: the dict, the name, the module.
        hooks: The dicts that hold their hooks.
        tensors: The tensors that programs hold in their own layout, where each stands.
    """

    places: list[tuple[dict[str, nn.Module | None], str, nn.Module | None]]
    hooks: list[dict[Any, Any]]
    tensors: list[tuple[dict[str, Any], str]]

    @classmethod
    def of(cls, model: GraphModule) -> _Guard:
        """The guard of a model as it is now."""
        places, hooks, tensors = [], [], []
        for module in model.modules():
            places += [(module._modules, n, child) for n, child in module._modules.items()]
            hooks += [vars(module)[name] for name in _HOOKS]
            for held in (module._parameters, module._buffers):
                tensors += [(held, name) for name, value in held.items() if value is not None]
        hooks += [vars(nn.modules.module)[f"_global{name}"] for name in _HOOKS]
        return cls(places, hooks, tensors)

    def same_modules(self) -> bool:
        """Whether every module stands where it did."""
        return all(held.get(name) is module for held, name, module in self.places)

    def hooked(self) -> bool:
        """Whether something of the user's runs with one of the modules."""
        return any(self.hooks)

    def state(self) -> _Key:
        """What changes whenever a tensor does."""
        return tuple(
            (tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version)
            for tensor in (held.get(name) for held, name in self.tensors)
            if tensor is not None
        )

    def needs_gradients(self) -> bool:
        """Whether a parameter requires gradients."""
        return any(
            tensor is not None and tensor.requires_grad
            for tensor in (held.get(name) for held, name in self.tensors)
        )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(eq=False)
class _Runs:
    """The programs of a graph for the shapes it has met, and why the last call used none."""

    why_not: str = ""
    programs: OrderedDict[_Key, PlannedProgram | PlannedBatches | None] = field(
        default_factory=OrderedDict
    )
    guard: _Guard | None = None
    inputs: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __reduce__(self) -> Any:
        return _Runs, ()

    def count_inputs(self, model: GraphModule) -> int:
        """How many inputs the graph has."""
        if self.inputs is None:
            self.inputs = sum(node.op == "placeholder" for node in model.graph.nodes)
        return self.inputs

    def guard_of(self, model: GraphModule) -> _Guard:
        """The guard; a model whose modules were exchanged starts anew."""
        guard = self.guard
        if guard is None or not guard.same_modules():
            guard = self.guard = _Guard.of(model)
            self.programs = OrderedDict()
        return guard

    def program(
        self, model: GraphModule, inputs: tuple[Any, ...]
    ) -> PlannedProgram | PlannedBatches | None:
        """The program for inputs like these; None where the engine has nothing to do."""
        key = (*map(_like, inputs), torch.get_num_threads(), self.guard_of(model).state())
        try:
            return self.programs[key]
        except KeyError:
            program = _new_program(model, inputs)
        with self.lock:
            self.programs[key] = program
            while len(self.programs) > _PROGRAMS:
                self.programs.popitem(last=False)
        return program


def _new_program(
    model: GraphModule, inputs: tuple[Any, ...]
) -> PlannedProgram | PlannedBatches | None:
    loaded, threads = engine.load(), torch.get_num_threads()
    if loaded is None:
        return None
    values = values_of(model, inputs)
    program = plan_memory(model, values, loaded, threads)
    batch = _batch(inputs, values, program)
    if program is None or batch == 1 or (images := images_at_a_time(program, batch)) == batch:
        return program
    parts = []
    for count in (images, batch % images):
        values = values_of(model, tuple(x[:count] for x in inputs)) if count else {}
        part = plan_memory(model, values, loaded, threads) if count else None
        if count and _batch([x[:count] for x in inputs], values, part) != count:
            return program
        parts.append(part)
    assert parts[0] is not None
    return PlannedBatches(parts[0], parts[1], images)


def _batch(
    inputs: Sequence[Any], values: Mapping[Node, Value], program: PlannedProgram | None
) -> int:
    """How many images go through a program side by side, none looking at another; 1 if unknown."""
    if program is None or not all(isinstance(item, Native) for item in program.items):
        return 1
    if not all(isinstance(x, Tensor) and x.ndim > 0 for x in inputs):
        return 1
    sizes = {len(x) for x in inputs} | {v.shape[0] for v in values.values() if v.shape}
    return sizes.pop() if len(sizes) == 1 else 1


def _like(value: Any) -> object:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    return type(value), value


def _why_not(model: PlannedGraphModule, inputs: tuple[Any, ...]) -> str:
    """Why a call has to run the graph itself, in words; "" where it need not."""
    return next(_reasons(model, inputs), "")


def _reasons(model: PlannedGraphModule, inputs: tuple[Any, ...]) -> Iterator[str]:
    if type(model.graph._codegen) is not CodeGen:
        yield "its inputs are not plain arguments"
    if model.training:
        yield "it is in training mode"
    if torch._C._get_tracing_state() is not None:
        yield "torch.jit traces it"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        yield "a mode of torch looks at every operation"
    if torch._C._functorch.maybe_current_level() is not None:
        yield "a transform of torch.func is at work"
    if torch.is_autocast_enabled("cpu"):
        yield "autocast chooses types"
    for value in inputs:
        yield from _odd_input(value)
    guard = model._runs.guard_of(model)
    if guard.hooked():
        yield "modules in it have hooks"
    if torch.is_grad_enabled() and (_wants_gradients(inputs) or guard.needs_gradients()):
        yield "gradients are asked for"


def _odd_input(value: Any) -> Iterator[str]:
    if type(value) in _PLAIN:
        return
    if type(value) not in (Tensor, nn.Parameter):
        yield f"an input is a {type(value).__name__}"
    elif not value.is_cpu or value.layout != torch.strided or value.is_meta:
        yield f"an input is {value.layout} on {value.device}"
    elif value.numel() == 0:
        yield "an input is empty"


def _wants_gradients(inputs: tuple[Any, ...]) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in inputs)
