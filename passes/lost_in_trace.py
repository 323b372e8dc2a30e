"""What a trace loses without a word, so that the tracer can refuse it.

A graph holds operations and nothing around them: not the context they run in, not what a forward
writes into its modules, and of an argument that may be None only one of the two cases.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable

import torch
from torch import nn
from torch.fx import Graph


def context() -> Hashable:
    """What of the surroundings of an operation changes what it does, or what autograd keeps."""
    autocast = [
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
    ]
    # torch.utils.checkpoint, and others that put hooks on what autograd saves.
    saved_tensors = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        saved_tensors is not None,
        *autocast,
    )


class Attributes:
    """What the modules of a model hold in plain attributes, before a trace runs their code.

    Args:
        root: The model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._before = {name: (m, dict(vars(m))) for name, m in root.named_modules()}

    def restore(self) -> tuple[str, str] | None:
        """Put back what has been changed since; the name of one such module and its attribute.

        Constants that torch.fx puts on the model it traces are no change.
        """
        found = None
        for name, (module, before) in self._before.items():
            now = vars(module)
            for attribute in now.keys() | before.keys():
                same = attribute in before and now.get(attribute) is before[attribute]
                if same or attribute == "training" or attribute.startswith("_tensor_constant"):
                    continue
                found = name, attribute
                if attribute in before:
                    now[attribute] = before[attribute]
                else:
                    del now[attribute]
        return found


def optional_arguments(root: nn.Module) -> dict[str, None]:
    """The arguments of a forward that are None where a caller does not give them."""
    parameters = inspect.signature(type(root).forward).parameters.values()
    return {parameter.name: None for parameter in parameters if parameter.default is None}


def do_the_same(graph: Graph, without: Graph) -> bool:
    """Whether a graph is one where its optional arguments are given and where they are not."""
    return _operations(graph) == _operations(without)


def _operations(graph: Graph) -> list[tuple[str, object]]:
    found = []
    for node in graph.nodes:
        # torch.fx asserts that an argument is None which it was traced with.
        asserts = getattr(node.target, "__name__", "") == "_assert_is_none"
        constant = str(node.target).startswith("_tensor_constant")
        if node.op != "placeholder" and not asserts:
            found.append((node.op, "constant" if constant else node.target))
    return found
