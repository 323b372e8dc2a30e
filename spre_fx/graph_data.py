"""A `torch.fx` graph as plain data, and back: what a file keeps of a graph.

A node is `[op, name, target, args, kwargs]` and refers to an earlier one by its place. Numbers,
strings, None, lists are themselves; everything else is a dict of one entry, its kind: `{"tuple":
[...]}`, `{"node": 3}`, `{"dtype": "float32"}`. `torch.fx` turns a graph into Python source and runs
it, so whatever ends up there as text is checked both ways: names are identifiers, functions and
methods those of `known_functions`.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.fx import Graph, Node
from torch.fx.graph import CodeGen

from spre_fx import known_functions
from spre_fx.errors import FileError, ModelError

Data: TypeAlias = Any  # what json can hold

_MODULE_PATH = re.compile(r"[\w\- ]+(\.[\w\- ]+)*")


def graph_data(graph: Graph) -> Data:
    """A graph as plain data.

    Raises:
        ModelError: Naming the node that plain data cannot hold.
    """
    if type(graph._codegen) is not CodeGen:
        raise ModelError(
            f"expected a plain torch.fx graph, found one with {type(graph._codegen).__name__}, as "
            "torch.export makes them. Save what finalize or adopt returned."
        )
    places = {node: place for place, node in enumerate(graph.nodes)}
    return [_node_data(node, places) for node in graph.nodes]


def _node_data(node: Node, places: dict[Node, int]) -> Data:
    try:
        target = _target_name(node)
        check_target(node.op, target, node.args)
        args = [value_data(argument, places) for argument in node.args]
        kwargs = {name: value_data(value, places) for name, value in node.kwargs.items()}
        _check_names(node.name, *kwargs)
    except FileError as error:
        raise ModelError(
            f"{node.name}: expected a graph of torch's own functions and layers, found {error}. "
            "A file loads without the model's source, so it can't hold that. Keep the model's "
            "state_dict and its source, or try torch.export."
        ) from error
    return [node.op, node.name, target, args, kwargs]


def _target_name(node: Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    assert callable(node.target)
    name = known_functions.name_of(node.target)
    if name is None:
        where = getattr(node.target, "__module__", None)
        raise FileError(f"a call of {where}.{getattr(node.target, '__name__', node.target)}")
    return name


def value_data(value: object, places: dict[Node, int] | None = None) -> Data:
    """One argument as plain data.

    Raises:
        FileError: If plain data cannot hold it.
    """
    plain = value is None or isinstance(value, bool | str) or type(value) is int
    if plain or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Node) and places is not None:
        return {"node": places[value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": [[key, value_data(item, places)] for key, item in value.items()]}
    if isinstance(value, list) or (isinstance(value, tuple) and not hasattr(value, "_fields")):
        items = [value_data(item, places) for item in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, slice):
        return {"slice": [value_data(v, places) for v in (value.start, value.stop, value.step)]}
    return _scalar_data(value)


def _scalar_data(value: object) -> Data:
    for kind, write in _WRITE.items():
        if isinstance(value, kind):
            return write(value)
    raise FileError(f"a value of type {type(value).__name__}")


_WRITE: dict[type, Callable[[Any], Data]] = {
    float: lambda value: {"float": repr(value)},
    type(...): lambda _: {"ellipsis": True},
    torch.device: lambda value: {"device": str(value)},
    torch.dtype: lambda value: {"dtype": _torch_name(value)},
    torch.layout: lambda value: {"layout": _torch_name(value)},
    torch.memory_format: lambda value: {"memory_format": _torch_name(value)},
}


def _torch_name(value: object) -> str:
    return str(value).removeprefix("torch.")


def graph_from(data: Data) -> Graph:
    """The graph that `graph_data` was given.

    Raises:
        FileError: Naming what does not belong in a graph.
    """
    graph = Graph()
    nodes: list[Node] = []
    for op, name, target, args, kwargs in data:
        arguments = tuple(value_from(argument, nodes) for argument in args)
        check_target(op, target, arguments)
        _check_names(name, *kwargs)
        called: str | Callable[..., Any] = target
        if op == "call_function":
            function = known_functions.function_of(target)
            assert function is not None  # as checked
            called = function
        keywords = {key: value_from(value, nodes) for key, value in kwargs.items()}
        nodes.append(graph.create_node(op, called, arguments, keywords, name))
    inputs = [node.target for node in nodes if node.op == "placeholder"]
    if len(inputs) != len(set(inputs)) or "self" in inputs:
        raise FileError(f"a graph with inputs {inputs}, not each of a name of its own")
    if not nodes or nodes[-1].op != "output" or sum(node.op == "output" for node in nodes) != 1:
        raise FileError("a graph whose output is not its last node")
    graph.lint()
    return graph


def value_from(data: Data, nodes: list[Node] | None = None) -> Any:
    """The argument that `value_data` was given.

    Raises:
        FileError: Naming what is no argument.
    """
    if isinstance(data, list):
        return [value_from(item, nodes) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, value),) = data.items()
    if kind == "node" and nodes is not None and type(value) is int and 0 <= value < len(nodes):
        return nodes[value]
    if kind in ("tuple", "slice"):
        return (tuple if kind == "tuple" else _slice)([value_from(item, nodes) for item in value])
    if kind == "dict":
        return {str(key): value_from(item, nodes) for key, item in value}
    if kind in _READ:
        return _READ[kind](value)
    raise FileError(f"{data}, which is no argument")


def _slice(items: list[Any]) -> slice:
    return slice(*items)


def _float(text: str) -> float:
    if text not in ("inf", "-inf", "nan"):
        raise FileError(f"a float {text!r}")
    return float(text)


def _of_torch(kind: type) -> Callable[[str], Any]:
    def read(name: str) -> Any:
        value = getattr(torch, name, None)
        if not isinstance(value, kind):
            raise FileError(f"a {kind.__name__} {name!r}")
        return value

    return read


_READ: dict[str, Callable[[Any], Any]] = {
    "float": _float,
    "ellipsis": lambda _: ...,
    "device": torch.device,
    "dtype": _of_torch(torch.dtype),
    "layout": _of_torch(torch.layout),
    "memory_format": _of_torch(torch.memory_format),
}


def check_target(op: object, target: object, args: tuple[Any, ...]) -> None:
    """Refuse a node whose target is not one a file may hold.

    Raises:
        FileError: Naming the operation and the target.
    """
    known = isinstance(target, str) and isinstance(op, str) and _is_known(op, target)
    if known and target == "builtins.getattr":
        known = len(args) == 2 and known_functions.is_attribute(args[1])
        target = f"getattr(..., {args[1:]!r})"
    if not known:
        raise FileError(f"{op} of {target!r}, which is not known")


def _is_known(op: str, target: str) -> bool:
    if op == "call_function":
        return known_functions.function_of(target) is not None
    if op == "call_method":
        return known_functions.is_method(target)
    if op in ("call_module", "get_attr"):
        return is_path(target)
    if op == "placeholder":
        return is_name(target.removeprefix("*").removeprefix("*"))
    return (op, target) == ("output", "output")


def is_name(name: object) -> bool:
    """Whether a string can stand in Python source as a name."""
    return isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)


def is_path(path: object) -> bool:
    """Whether a string can stand in the source of a graph as the path of a module or tensor."""
    return isinstance(path, str) and _MODULE_PATH.fullmatch(path) is not None


def _check_names(*names: object) -> None:
    """The names of a node and of its keywords, which end up in source."""
    for name in names:
        if not is_name(name):
            raise FileError(f"a name {name!r}")
