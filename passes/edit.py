"""Small edits of a model's modules that several passes make."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from spre_fx.errors import ModelError


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy, with the hooks that copy.deepcopy drops from GraphModules.

    Raises:
        ModelError: If the model cannot be copied.
    """
    try:
        copied = copy.deepcopy(model, _detached(model))
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__}: expected a model that copy.deepcopy can copy, found: {error} "
            "The input model is never modified, so a copy is needed."
        ) from error
    for ours, theirs in zip(copied.modules(), model.modules(), strict=True):
        if isinstance(theirs, GraphModule):
            carry_hooks(theirs, ours)
    return copied


def _detached(model: nn.Module) -> dict[int, Any]:
    """What to copy of results that a forward left in attributes, which torch does not copy."""
    values = [value for module in model.modules() for value in vars(module).values()]
    results = [v for v in values if isinstance(v, Tensor) and not v.is_leaf]
    return {id(result): result.detach().clone() for result in results}


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run when `module` is called."""
    return any(getattr(module, attribute) for attribute in _HOOKS)


def carry_hooks(source: nn.Module, target: nn.Module) -> None:
    """Have the hooks that run when `source` is called run for `target` too."""
    for attribute in (*_HOOKS, *_HOOK_OPTIONS):
        setattr(target, attribute, copy.copy(getattr(source, attribute)))


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HOOK_OPTIONS = (
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_is_full_backward_hook",
)


def add_module(root: nn.Module, name: str, module: nn.Module) -> str:
    """Add `module` under `name`, or under `name` with a number where that is taken.

    Returns:
        The name it got.
    """
    parent = root.get_submodule(name.rpartition(".")[0])
    stem = leaf = name.rpartition(".")[2]
    number = 1
    while hasattr(parent, leaf):
        number += 1
        leaf = f"{stem}{number}"
    parent.add_module(leaf, module)
    return name[: len(name) - len(stem)] + leaf


def replace_module(graph_module: GraphModule, name: str, module: nn.Module) -> None:
    """Put `module` where the module called `name` was."""
    parent, _, leaf = name.rpartition(".")
    graph_module.get_submodule(parent)._modules[leaf] = module


def erase_unused(graph_module: GraphModule, nodes: Iterable[Node]) -> None:
    """Erase those of `nodes` that nothing uses, what only they used, and modules left uncalled.

    Nodes that were without users before are not searched for: `x.add_(y)` may well be one.
    """
    stack, called = list(nodes), set()
    while stack:
        node = stack.pop()
        if node.users or node.op in ("placeholder", "output") or node._erased:
            continue
        stack += node.all_input_nodes
        graph_module.graph.erase_node(node)
        if node.op == "call_module":
            called.add(str(node.target))
    still = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    for name in called - still:
        graph_module.delete_submodule(name)
