"""At how many positions each conv and linear is applied, found without computing any of them.

Analysis only. The graph runs on fake tensors, which have shapes and no values, over a copy whose
weights and buffers are fake as well: nothing is computed, allocated or changed.
"""

from __future__ import annotations

import copy
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
from spre_fx.passes.graph_view import GraphView


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


def count_runs(view: GraphView, inputs: tuple[Any, ...]) -> dict[str, Runs]:
    """The runs of every conv and linear of a model, by name.

    Args:
        view: The model.
        inputs: Positional arguments of its forward; of tensors, only shapes and types matter.

    Raises:
        ModelError: If the model does not run on the inputs.
    """
    mode = FakeTensorMode()
    try:
        with mode, torch.no_grad():
            counter = _Counter(_fake_copy(view.graph_module, mode), view)
            counter.run(*tree_map_only(Tensor, mode.from_tensor, inputs))
    except Exception as error:
        shapes = tree_map_only(Tensor, lambda tensor: tuple(tensor.shape), inputs)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{type(view.graph_module).__name__}: expected a model that runs on an example input, "
            f"found for {shapes}: {reason[0]} Give an input of the shape it is trained on, on the "
            "device of the model."
        ) from error
    return counter.runs


def _fake_copy(graph_module: GraphModule, mode: FakeTensorMode) -> GraphModule:
    """A copy in evaluation mode whose parameters and buffers are fake."""
    real = chain(graph_module.parameters(), graph_module.buffers())
    memo: dict[int, Any] = {id(tensor): mode.from_tensor(tensor) for tensor in real}
    return copy.deepcopy(graph_module, memo).eval()


class _Counter(Interpreter):
    """Counts while it runs: modules by hooks, as some are called by modules kept whole."""

    def __init__(self, fake: GraphModule, view: GraphView) -> None:
        super().__init__(fake)
        self.runs: dict[str, Runs] = {}
        self._functional: dict[str, str] = {}  # the name of a call: that of the candidate
        for name, candidate in view.candidates.items():
            if candidate.module is None:
                self._functional |= {call.name: name for call in candidate.calls}
            if candidate.module is None and not candidate.calls:  # attention reads it by itself
                self.runs[name] = Runs(tuple(fake.get_parameter(name).shape))
            elif candidate.module is not None:
                self.runs[name] = Runs(tuple(candidate.module.weight.shape))
                fake.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def count(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            y = output[0] if isinstance(output, tuple) else output
            self._count(name, arguments[0] if isinstance(module, _ConvTransposeNd) else y)

        return count

    def run_node(self, n: Node) -> Any:
        """Run a node, and count it where it is a functional conv or linear."""
        output = super().run_node(n)
        if n.name in self._functional:
            arguments, options = self.fetch_args_kwargs_from_env(n)
            x = arguments[0] if arguments else options["input"]
            weight = arguments[1] if len(arguments) > 1 else options["weight"]
            name = self._functional[n.name]
            self.runs.setdefault(name, Runs(tuple(weight.shape)))
            self._count(name, x if "transpose" in getattr(n.target, "__name__", "") else output)
        return output

    def _count(self, name: str, value: Tensor) -> None:
        runs = self.runs[name]
        channels = runs.weight_shape[0]  # C_out; C_in of a transposed conv
        self.runs[name] = runs + value.numel() // channels
