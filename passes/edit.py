"""Small edits of a model's modules that several passes make."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from spre_fx.errors import ModelError
from spre_fx.modules import NMLayer
from spre_fx.subclasses import carry_hooks


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
    held = [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor | list | tuple | dict) and not name.startswith("_")
    ]
    results = [v for v in tree_leaves(held) if isinstance(v, Tensor) and not v.is_leaf]
    return {id(result): result.detach().clone() for result in results}


def keep_owners(root: nn.Module, graph_module: GraphModule) -> None:
    """Let convs, linears and norms whose parameters functions read be there, not just an outline.

    Args:
        root: The traced model.
        graph_module: Its graph; for such parameters torch.fx makes it an empty `nn.Module`.
    """
    names = [str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr"]
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module = root.get_submodule(owner) if owner else None
        if isinstance(module, _OWNERS):
            parent, _, leaf = owner.rpartition(".")
            graph_module.get_submodule(parent)._modules[leaf] = module


_OWNERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.Linear)


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
    """Put `module` where the module called `name` was.

    What was inside moves along, as the graph may use it on its own: the activation that a subclass
    of a conv holds, say. What a mask was made with does not.
    """
    parent, _, leaf = name.rpartition(".")
    owner = graph_module.get_submodule(parent)
    before = owner._modules[leaf]
    owner._modules[leaf] = module
    if before is None or before is module:
        return
    own = {"weight", "bias"} | (_OF_THE_MASKS if isinstance(before, NMLayer) else set())
    for here, there in zip(_inside(before), _inside(module), strict=True):
        there |= {k: v for k, v in here.items() if k not in own and not hasattr(module, k)}


def _inside(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module._modules


_OF_THE_MASKS = {"nm_mask", "live_taps", "dense_gradient"}


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
    used = {str(n.target) for n in graph_module.graph.nodes if n.op in ("call_module", "get_attr")}
    around = {target[:end] for target in used for end, letter in enumerate(target) if letter == "."}
    for name in called - used:
        if name in around:
            _empty(graph_module, name, used | around)
        else:
            graph_module.delete_submodule(name)


def _empty(graph_module: GraphModule, name: str, used: set[str]) -> None:
    """Leave, of a module, no more than holds together what the graph still uses inside it."""
    module, shell = graph_module.get_submodule(name), nn.Module()
    shell.training = module.training
    for here, there in zip(_inside(module), _inside(shell), strict=True):
        there |= {key: value for key, value in here.items() if f"{name}.{key}" in used}
    parent, _, leaf = name.rpartition(".")
    graph_module.get_submodule(parent)._modules[leaf] = shell
