"""What code that torch.fx cannot follow does with the modules it holds, read from its source.

Such code may call a module, which leaves us free to put another in its place. Or it takes a module
apart: reads its weight, iterates over it, asks for an attribute.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FunctionType

from torch import nn


@dataclass(frozen=True)
class OutsideCode:
    """What the forward of a module, and the methods it calls, do with the modules inside.

    Attributes:
        taken_apart: Modules that are used otherwise than by calling them.
        read: Those of them whose own parameter or buffer is read.
    """

    taken_apart: set[nn.Module] = field(default_factory=set)
    read: set[nn.Module] = field(default_factory=set)


def read_code(module: nn.Module) -> OutsideCode:
    """Read the source of `module`. Code without a source at hand is taken to only call."""
    code = OutsideCode()
    for function in _functions(module):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            continue
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id == "self":
                _note_use(code, module, node, parents)
    return code


def _functions(module: nn.Module) -> Iterator[FunctionType]:
    """Forward, and every method that it or one of these mentions, of all classes that have one."""
    names, seen = ["forward"], {"forward"}
    while names:
        name = names.pop()
        for kind in type(module).__mro__:
            function = vars(kind).get(name) if kind is not nn.Module else None
            if isinstance(function, FunctionType):
                yield function
                mentioned = set(function.__code__.co_names) - seen
                names += mentioned
                seen |= mentioned


def _note_use(
    code: OutsideCode, module: nn.Module, node: ast.AST, parents: dict[ast.AST, ast.AST]
) -> None:
    """Follow `self.a.b` as far as it names modules, and see what becomes of the last."""
    reached, parent = module, parents[node]
    while isinstance(parent, ast.Attribute):
        child = reached._modules.get(parent.attr)
        if child is None:
            break
        if reached is not module:
            code.taken_apart.add(reached)
        reached, node, parent = child, parent, parents[parent]
    called = isinstance(parent, ast.Call) and (parent.func is node or _is_checkpoint(parent))
    if reached is module or called or isinstance(parent, ast.Compare):  # `is not None`
        return
    of_tensor = parents[parent] if isinstance(parent, ast.Attribute) else None
    if isinstance(of_tensor, ast.Attribute) and of_tensor.attr in ("dtype", "device", "shape"):
        return
    code.taken_apart.add(reached)
    own = {*reached._parameters, *reached._buffers}
    if isinstance(parent, ast.Attribute) and parent.attr in own:
        code.read.add(reached)


def _is_checkpoint(call: ast.Call) -> bool:
    """Whether a call is `checkpoint(module, x)`, which calls the module it is given."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    return name == "checkpoint"
