"""Traces a model into a GraphModule that is right in training and in evaluation.

A `torch.fx` trace fixes every `self.training` at its value during the trace. A model whose code
looks at it is therefore traced in both modes and the two graphs are merged: a flag that differs
becomes a value of the graph, and a value that differs goes through a switch. `finalize` takes them
out again.
"""

from __future__ import annotations

import contextlib
import os
import traceback
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from spre_fx.errors import TraceError
from spre_fx.passes.edit import copy_model, keep_owners
from spre_fx.passes.lost_in_trace import Attributes, do_the_same, optional_arguments
from spre_fx.passes.merge_modes import merge_modes
from spre_fx.passes.tracer import Tracer


def trace(model: nn.Module, leaves: Sequence[str | type[nn.Module]] = ()) -> GraphModule:
    """Trace a copy of `model`. Module names, parameters, buffers and training modes survive.

    Args:
        model: The model, which is not touched.
        leaves: Modules to keep whole: names, globs or types.

    Raises:
        TraceError: If `torch.fx` cannot follow the forward; it names the module and the line.
        ModelError: If the model cannot be copied.
    """
    return trace_in_place(copy_model(model), leaves)


def trace_in_place(root: nn.Module, leaves: Sequence[str | type[nn.Module]] = ()) -> GraphModule:
    """Trace a model that need not be copied: the result holds its very modules.

    Args:
        root: The model. After an error it is as it was.
        leaves: Modules to keep whole: names, globs or types.

    Raises:
        TraceError: If `torch.fx` cannot follow the forward; it names the module and the line.
    """
    modes = {module: module.training for module in root.modules()}
    modules, attributes = set(modes), set(vars(root))
    try:
        training, depends_on_mode = _trace_mode(root.train(), leaves)
        if depends_on_mode:
            evaluation, _ = _trace_mode(root.eval(), leaves)
            merge_modes(root, training, evaluation, modes)
    except TraceError:
        _remove_what_is_new(root, modules, attributes)
        raise
    finally:
        for module in root.modules():
            module.training = modes[module]
    # Constants written in the forward are buffers of the graph, but no state of the model.
    root._non_persistent_buffers_set |= {n for n in vars(root) if n.startswith("_tensor_constant")}
    graph_module = GraphModule(root, training, type(root).__name__)
    keep_owners(root, graph_module)
    for name, module in graph_module.named_modules():
        module.training = root.get_submodule(name).training
    return graph_module


def _remove_what_is_new(root: nn.Module, modules: set[nn.Module], attributes: set[str]) -> None:
    """Flags and switches, and the constants that torch.fx puts on the model it traces."""
    for parent in modules:
        for name, child in list(parent.named_children()):
            if child not in modules:
                delattr(parent, name)
    for name in set(vars(root)) - attributes:
        delattr(root, name)


def _trace_mode(root: nn.Module, leaves: Sequence[str | type[nn.Module]]) -> tuple[Graph, bool]:
    """The graph in the mode the model is in, and whether it may be another in the other mode."""
    tracer = Tracer(leaves)
    graph = _trace_graph(root, tracer, None)
    optional = optional_arguments(root)
    if optional and not do_the_same(graph, _trace_graph(root, Tracer(leaves), optional)):
        raise TraceError(
            f"{type(root).__name__}: expected a forward that does the same with and without its "
            f"optional arguments, found one that looks whether {' or '.join(optional)} is None."
        )
    return graph, tracer.asked_for_mode or any(map(_has_own_modes, root.modules()))


def _trace_graph(root: nn.Module, tracer: Tracer, arguments: dict[str, None] | None) -> Graph:
    """The graph that `tracer` makes, with some arguments fixed."""
    attributes = Attributes(root)
    try:
        with _hidden_modes(root), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a run without values
            graph = tracer.trace(root, arguments)
    except Exception as error:
        attributes.restore()
        cause = f"{_line(error)}: {error}"
        raise TraceError(
            f"{tracer.path or type(root).__name__}: expected a forward that torch.fx can follow, "
            f"found at {cause}.",
            tracer.path,
            cause,
        ) from error
    changed = attributes.restore()
    if changed is not None:
        module, attribute = changed
        raise TraceError(
            f"{module or type(root).__name__}: expected a forward that leaves its module as it is, "
            f"found one that writes the attribute {attribute!r}.",
            module,
        )
    return graph


def _has_own_modes(module: nn.Module) -> bool:
    """Whether a class does more at `train()` and `eval()` than to set `training`."""
    kind = type(module)
    return kind.train is not nn.Module.train or kind.eval is not nn.Module.eval


@contextlib.contextmanager
def _hidden_modes(root: nn.Module) -> Iterator[None]:
    """Keep `training` where reading it goes through `nn.Module.__getattr__`, and so the tracer."""
    modes = {module: module.training for module in root.modules() if "training" in vars(module)}
    try:
        for module, mode in modes.items():
            del vars(module)["training"]
            module._buffers["training"] = mode  # type: ignore[assignment]  # no tensor, but found
        yield
    finally:
        for module, mode in modes.items():
            module._buffers.pop("training", None)
            module.training = mode


def _line(error: Exception) -> str:
    """The innermost line of the user's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    not_theirs = tuple(os.path.join(os.path.dirname(f), "") for f in (torch.__file__, __file__))
    theirs = [frame for frame in frames if not frame.filename.startswith(not_theirs)]
    frame = (theirs or frames)[-1]
    return f"{frame.filename}:{frame.lineno} `{frame.line}`"
