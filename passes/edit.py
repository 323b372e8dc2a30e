"""Small edits of a model's modules that several passes make."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.fx import GraphModule, Node


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
