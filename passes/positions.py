"""At how many positions each conv and linear is applied, found without computing any of them.

Analysis only. A graph runs on fake tensors, which have shapes and no values, over a copy whose
weights and buffers are fake as well: nothing is computed, allocated or changed. A model that is no
single graph has code of its own that may look at values: a copy of it runs on the input itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils._pytree import tree_map_only

from spre_fx.errors import ModelError
from spre_fx.passes.edit import copy_model
from spre_fx.passes.graph_view import GraphView
from spre_fx.passes.regions import find_regions


@dataclass(frozen=True)
class Runs:
    """What one forward does with a conv or linear.

    Attributes:
        weight_shape: Shape of its weight.
        calls: How often it is called, as far as the graph shows.
        positions: How often each weight is used, over all calls and the whole batch: once per
            position of the output, or of the input of a transposed conv.
    """

    weight_shape: tuple[int, ...]
    calls: int = 0
    positions: int = 0

    def __add__(self, count: int) -> Runs:
        return Runs(self.weight_shape, self.calls + 1, self.positions + count)


def count_runs(
    model: nn.Module, views: Mapping[str, GraphView], inputs: tuple[Any, ...]
) -> dict[str, Runs]:
    """The runs of every conv and linear of a model, by name.

    Args:
        model: A GraphModule, or a module with GraphModules inside.
        views: Of these, by their names in the model.
        inputs: Positional arguments of its forward.

    Raises:
        ModelError: If the model does not run on the inputs.
    """
    runs = _Counts()
    try:
        with torch.no_grad():
            if isinstance(model, GraphModule) and len(find_regions(model)) == 1:
                _run_fake(model, views, inputs, runs)
            else:
                copied = copy_model(model).eval()
                _count_in(copied, views, runs)
                copied(*inputs)
    except Exception as error:
        shapes = tree_map_only(Tensor, lambda tensor: tuple(tensor.shape), inputs)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{type(model).__name__}: expected a model that runs on an example input, "
            f"found for {shapes}: {reason[0]} Give an input of the shape it is trained on, on the "
            "device of the model."
        ) from error
    return runs


def _run_fake(
    graph_module: GraphModule,
    views: Mapping[str, GraphView],
    inputs: tuple[Any, ...],
    runs: _Counts,
) -> None:
    """Run a copy, in evaluation mode, whose parameters and buffers are fake."""
    mode = FakeTensorMode()
    real = chain(graph_module.parameters(), graph_module.buffers())
    with mode:
        memo: dict[int, Any] = {id(tensor): mode.from_tensor(tensor) for tensor in real}
        fake = copy.deepcopy(graph_module, memo).eval()
        _count_in(fake, views, runs)
        fake(*tree_map_only(Tensor, mode.from_tensor, inputs))


class _Counts(dict[str, Runs]):
    """The runs so far."""

    def add(self, name: str, value: Tensor) -> None:
        """Count a run that made, or for a transposed conv took, `value`."""
        channels = self[name].weight_shape[0]  # C_out; C_in of a transposed conv
        self[name] += value.numel() // channels


def _count_in(model: nn.Module, views: Mapping[str, GraphView], runs: _Counts) -> None:
    """Have a model count its calls: of modules, also by code without a graph, and of functions."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, view in views.items():
        functional: dict[str, str] = {}
        for name, candidate in view.candidates.items():
            if candidate.module is None:
                functional |= {call.name: name for call in candidate.calls}
            elif name not in runs:
                runs[name] = Runs(tuple(candidate.module.weight.shape))
                if name in modules:
                    modules[name].register_forward_hook(_counting_hook(name, runs))
        graph_module = modules.get(path)
        if functional and isinstance(graph_module, GraphModule):
            graph_module.forward = _Counter(graph_module, functional, runs).run


def _counting_hook(name: str, runs: _Counts) -> Any:
    def count(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        runs.add(name, arguments[0] if isinstance(module, _ConvTransposeNd) else y)

    return count


class _Counter(Interpreter):
    """Runs a graph and counts its functional convs and linears."""

    def __init__(
        self, graph_module: GraphModule, functional: dict[str, str], runs: _Counts
    ) -> None:
        super().__init__(graph_module)
        self._functional, self._runs = functional, runs

    def run_node(self, n: Node) -> Any:
        """Run a node, and count it where it is a functional conv or linear."""
        output = super().run_node(n)
        name = self._functional.get(n.name)
        if name is not None:
            arguments, options = self.fetch_args_kwargs_from_env(n)
            x = arguments[0] if arguments else options["input"]
            weight = arguments[1] if len(arguments) > 1 else options["weight"]
            self._runs.setdefault(name, Runs(tuple(weight.shape)))
            transposed = "transpose" in getattr(n.target, "__name__", "")
            self._runs.add(name, x if transposed else output)
        return output
