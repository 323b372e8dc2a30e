"""A layer of `torch.nn` as plain data, and back: its name and the options of its constructor.

The options are the parameters of the constructor that the layer keeps under the same name. Those
that change nothing are left out, so that a version of torch that knows more of them is no
hindrance. That this says all there is to say about a layer is not believed but checked, by building
it anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spre_fx import known_functions
from spre_fx.errors import FileError
from spre_fx.graph_data import Data, value_data, value_from

_OWN_STATE = frozenset({"training", "_parameters", "_buffers", "_modules", "spre_fx_record"})
_PLACES = ("device", "dtype")


def module_data(module: nn.Module) -> Data:
    """A layer of torch.nn as plain data, without its tensors.

    Raises:
        FileError: Naming what stands in the way.
    """
    kind = type(module).__name__
    if known_functions.modules().get(kind) is not type(module):
        raise FileError(f"a {type(module).__module__}.{type(module).__qualname__}")
    data = {"type": kind, "options": _options(module)}
    difference = _difference(module, new_module(data))
    if difference is not None:
        raise FileError(f"a {kind} whose {difference} does not follow from its options")
    for name in _flags(data["options"]):  # such as bias=False where affine=False says as much
        fewer = data | {"options": {k: v for k, v in data["options"].items() if k != name}}
        if _optional(type(module), name) and _difference(module, new_module(fewer)) is None:
            data = fewer
    return data


def _flags(options: dict[str, Data]) -> list[str]:
    return [name for name, value in options.items() if isinstance(value, bool)]


def _optional(kind: type[nn.Module], name: str) -> bool:
    return inspect.signature(kind).parameters[name].default is not inspect.Parameter.empty


def new_module(data: Data) -> nn.Module:
    """A layer from plain data, its tensors on the meta device: they take no memory.

    Raises:
        FileError: Naming a layer that a file may not build.
    """
    kind = known_functions.modules().get(data["type"])
    if kind is None:
        raise FileError(f"a layer {data['type']!r}, which is not known")
    options = {name: value_from(value) for name, value in data["options"].items()}
    unknown = options.keys() - inspect.signature(kind).parameters.keys() | options.keys() & _PLACES
    if unknown:
        raise FileError(f"{data['type']} with unknown options {sorted(unknown)}")
    with torch.device("meta"):
        return kind(**options)


def _options(module: nn.Module) -> Data:
    options = {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if variadic or name in _PLACES or not _keeps(module, name):
            continue
        value = _kept(module, name)
        if not _same(value, parameter.default):
            options[name] = value_data(value)
    return options


def _keeps(module: nn.Module, name: str) -> bool:
    return hasattr(module, _KEPT_AS.get((type(module), name), name))


def _kept(module: nn.Module, name: str) -> Any:
    """The value of an option; one that asks for a tensor is true if there is one."""
    value = getattr(module, _KEPT_AS.get((type(module), name), name))
    registered = name in module._parameters or (type(module), name) in _KEPT_AS
    return value is not None if registered or isinstance(value, Tensor) else value


_KEPT_AS: dict[tuple[type[nn.Module], str], str] = {
    (nn.MultiheadAttention, "bias"): "in_proj_bias",
    (nn.MultiheadAttention, "add_bias_kv"): "bias_k",
}


def _same(value: object, other: object) -> bool:
    return type(value) is type(other) and value == other


def _difference(module: nn.Module, new: nn.Module) -> str | None:
    """The first attribute that tells a layer from one built anew."""
    attributes = {name: value for name, value in vars(new).items() if name not in _OWN_STATE}
    for name, value in attributes.items():
        if not _same(vars(module).get(name), value):
            return name
    for name in vars(module).keys() - vars(new).keys() - _OWN_STATE:
        if hasattr(type(module), name):  # such as a forward of its own
            return name
    return _other_tensors(module, new) or _other_parts(module, new)


def _other_tensors(module: nn.Module, new: nn.Module) -> str | None:
    parameters = _shapes(module._parameters) == _shapes(new._parameters)
    return (
        None
        if parameters and _shapes(module._buffers) == _shapes(new._buffers)
        else "set of tensors"
    )


def _other_parts(module: nn.Module, new: nn.Module) -> str | None:
    if [*map(type, module.children())] != [*map(type, new.children())]:
        return "set of modules inside"
    for (name, part), other in zip(module.named_children(), new.children(), strict=True):
        difference = _difference(part, other)
        if difference is not None:
            return f"{name}.{difference}"
    return None


def _shapes(tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
    return {name: None if t is None else tuple(t.shape) for name, t in tensors.items()}
