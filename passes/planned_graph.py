"""`PlannedGraphModule`: a deployed graph that the engine runs as a program where it can.

The graph stays what it is: what tracing, compiling, exporting, copying and saving see. A plain call
for inference runs the program of its input shapes instead, which is made at the first such call.
"""

from __future__ import annotations

import functools
import inspect
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen
from torch.fx.graph_module import reduce_graph_module

from spre_fx import engine
from spre_fx.dense_form import replace_everywhere
from spre_fx.liveness import ALIGNMENT
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


class _Guard:
    """Whether a model is still what its programs were made of.

    Every call asks, with caches that the last one has filled with other things: so this goes
    through flat tuples, at the speed of C.

    Args:
        model: The model as it is now.
    """

    def __init__(self, model: GraphModule) -> None:
        called = {str(n.target) for n in model.graph.nodes if n.op == "call_module"}
        leaves = [model.get_submodule(name) for name in called]
        standing: list[tuple[dict[str, Any], str, Any]] = []
        copied: list[Tensor] = []
        for module in model.modules():
            standing += [(module._modules, *item) for item in module._modules.items()]
            tensors: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for held in tensors:
                found = [(held, name, value) for name, value in held.items() if value is not None]
                copied += [value for _, _, value in found if not _read_in_place(module, value)]
                standing += found
        self._holders, self._names, self._held = zip(*standing, strict=True)
        self._copied = tuple(copied)
        self._pointers = list(map(Tensor.data_ptr, copied))
        self._versioned = tuple(tensor for tensor in copied if not tensor.is_inference())
        self._versions = list(map(_version, self._versioned))
        self._hooks = [vars(module)[name] for module in leaves for name in _HOOKS]
        self._hooks += [vars(nn.modules.module)[f"_global{name}"] for name in _HOOKS]

    def holds(self) -> bool:
        """Whether modules and tensors stand where they did, and what was copied is as it was."""
        standing = map(dict.get, self._holders, self._names)
        return (
            all(map(operator.is_, standing, self._held))
            and list(map(Tensor.data_ptr, self._copied)) == self._pointers
            and list(map(_version, self._versioned)) == self._versions
        )

    def hooked(self) -> bool:
        """Whether something of the user's runs with one of the modules that the graph calls."""
        return any(self._hooks)

    def needs_gradients(self) -> bool:
        """Whether a parameter requires gradients."""
        return any(tensor.requires_grad for tensor in self._held if isinstance(tensor, Tensor))


def _read_in_place(module: nn.Module, tensor: Tensor) -> bool:
    """Whether programs read a tensor where it lies, so that they see what is written to it."""
    packed = isinstance(module, PackedConv2d | PackedLinear)
    if isinstance(module, PackedConv2d) and module.transforms and tensor is module.packed:
        return False  # they read what was made of it
    return packed and tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_version = operator.attrgetter("_version")


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
        """The guard; a model that was changed starts anew."""
        guard = self.guard
        if guard is None or not guard.holds():
            guard = self.guard = _Guard(model)
            self.programs = OrderedDict()
        return guard

    def program(
        self, model: GraphModule, inputs: tuple[Any, ...]
    ) -> PlannedProgram | PlannedBatches | None:
        """The program for inputs like these; None where the engine has nothing to do."""
        programs = self.programs
        key = (*map(_like, inputs), torch.get_num_threads())
        try:
            return programs[key]
        except KeyError:
            program = _new_program(model, inputs)
        with self.lock:
            programs[key] = program
            while len(programs) > _PROGRAMS:
                programs.popitem(last=False)
        return program


def _new_program(
    model: GraphModule, inputs: tuple[Any, ...]
) -> PlannedProgram | PlannedBatches | None:
    values = values_of(model, inputs)
    program = _program(model, values)
    if program is None or not _side_by_side(inputs, values, program):
        return program
    batch = len(inputs[0])
    images = images_at_a_time(
        batch,
        weights=sum(tensor.nbytes for tensor in program.keep),
        activations=program.plan.activations,
        arena=program.arena,
    )
    if images == batch:
        return program
    first, rest = (_of_some(model, inputs, count) for count in (images, batch % images))
    if first is None or (rest is None and batch % images):
        return program
    return PlannedBatches(first, rest, images)


def _program(model: GraphModule, values: Mapping[Node, Value]) -> PlannedProgram | None:
    loaded = engine.load()
    return None if loaded is None else plan_memory(model, values, loaded, torch.get_num_threads())


def _of_some(model: GraphModule, inputs: Sequence[Tensor], images: int) -> PlannedProgram | None:
    """The program for the first images of a batch; None for none, or if they meet each other."""
    if images == 0:
        return None
    part = tuple(x[:images] for x in inputs)
    values = values_of(model, part)
    program = _program(model, values)
    return program if program is not None and _side_by_side(part, values, program) else None


def _side_by_side(
    inputs: Sequence[Any], values: Mapping[Node, Value], program: PlannedProgram
) -> bool:
    """Whether images of a batch go through a program side by side, none looking at another."""
    if not all(isinstance(item, Native) or type(item.run) is nn.Linear for item in program.items):
        return False
    if not all(isinstance(x, Tensor) and x.ndim > 1 for x in inputs):
        return False
    tensors = (*inputs, *values.values())
    return len({tuple(each.shape[:1]) for each in tensors}) == 1


def _like(value: Any) -> object:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    return type(value), value


def _why_not(model: PlannedGraphModule, inputs: tuple[Any, ...]) -> str:
    """Why a call has to run the graph itself, in words; "" where it need not."""
    reason = (
        _odd_model(model) or _mode_of_torch() or next(filter(None, map(_odd_input, inputs)), "")
    )
    if reason:
        return reason
    guard = model._runs.guard_of(model)
    if guard.hooked():
        return "modules in it have hooks"
    if torch.is_grad_enabled() and (_wants_gradients(inputs) or guard.needs_gradients()):
        return "gradients are asked for"
    return ""


def _odd_model(model: PlannedGraphModule) -> str:
    if type(model.graph._codegen) is not CodeGen:
        return "its inputs are not plain arguments"
    return "it is in training mode" if model.training else ""


def _mode_of_torch() -> str:
    if torch._C._get_tracing_state() is not None:
        return "torch.jit traces it"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a mode of torch looks at every operation"
    if torch._C._functorch.maybe_current_level() is not None:
        return "a transform of torch.func is at work"
    return "autocast chooses types" if torch.is_autocast_enabled("cpu") else ""


def _odd_input(value: Any) -> str:
    if type(value) in _PLAIN:
        return ""
    if type(value) not in (Tensor, nn.Parameter):
        return f"an input is a {type(value).__name__}"
    if not value.is_cpu or value.layout != torch.strided or value.is_meta:
        return f"an input is {value.layout} on {value.device}"
    return "an input is empty" if value.numel() == 0 else ""


def _wants_gradients(inputs: tuple[Any, ...]) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in inputs)
