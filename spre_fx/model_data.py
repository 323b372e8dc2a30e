"""A deployed model as plain data and tensors, and back: what a file keeps of a model.

The data holds the graph, the layers by name in their order, records, training modes and what there
is to know of each tensor but its values. Neither direction needs the source of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from spre_fx import records
from spre_fx.errors import FileError, ModelError
from spre_fx.graph_data import (
    Data,
    graph_data,
    graph_from,
    is_name,
    is_path,
    value_data,
    value_from,
)
from spre_fx.module_data import module_data, new_module

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
)
_TEXTS = ("pattern", "reason", "note", "backend")


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A parameter or buffer of a model.

    Attributes:
        tensor: Its values.
        facts: What it is, as plain data; `{"same": name}` for one that has been met before.
        pattern: The N:M pattern on record for the layer it is the weight of, or None.
    """

    tensor: Tensor
    facts: Data
    pattern: str | None


def model_data(model: GraphModule) -> tuple[Data, dict[str, StoredTensor]]:
    """A model as plain data, and its tensors by name.

    Raises:
        ModelError: Naming the node or module that a file cannot hold.
    """
    graph = graph_data(model.graph)
    _check_names(model)
    called = {str(n.target) for n in model.graph.nodes if n.op == "call_module"}
    names = dict(model.named_modules())  # each module once, under its first name
    data = {
        "name": type(model).__name__,
        "graph": graph,
        "modules": list(_modules(model, called)),
        "training": [name for name, module in names.items() if module.training],
        "records": {name: _record(name, r) for name, m in names.items() if (r := records.read(m))},
    }
    return data, _tensors(names)


def _record(name: str, record: records.Record) -> Data:
    try:
        return value_data(dict(record))
    except FileError as error:
        raise ModelError(
            f"{name}: expected a record of text and numbers, found {error} in {record}."
        ) from error


def _modules(model: GraphModule, called: set[str]) -> Iterator[Data]:
    """Each module as `[name, data]`: a layer, None for one that only holds others, or an alias."""
    first: dict[int, str] = {}
    whole: str | None = None  # the last module whose insides, which follow it, come with it
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or (whole is not None and name.startswith(whole + ".")):
            continue
        if id(module) in first:
            whole = name
            yield [name, {"same": first[id(module)]}]
            continue
        first[id(module)] = name
        layer = _layer(name, module, called)
        if layer is not None:
            whole = name
        yield [name, layer]


def _layer(name: str, module: nn.Module, called: set[str]) -> Data:
    try:
        return module_data(module)
    except FileError as error:
        if name not in called:
            return None  # never runs: its tensors are all there is to keep
        way_out = "Keep the model's state_dict and its source, or try torch.export."
        if type(module).__module__.partition(".")[0] == "spre_fx":
            way_out = "Save what finalize makes with backend='dense'."
        raise ModelError(
            f"{name}: expected a layer of torch.nn, found {error}. A file loads without the "
            f"model's source, so it can't hold that. {way_out}"
        ) from error


def _check_names(model: GraphModule) -> None:
    for name, module in model.named_modules():
        for hook in _HOOKS:
            if vars(module).get(hook):
                raise ModelError(
                    f"{name or type(model).__name__}: expected no hooks, found {hook.strip('_')}: "
                    "they are Python code, which a file can't hold. Remove them, and register them "
                    "again on what load returns."
                )
        if name and not is_path(name):
            raise ModelError(
                f"{name!r}: expected a module name of letters, digits, '_', '-' and blanks. Rename "
                "it before prepare."
            )


def _tensors(modules: Mapping[str, nn.Module]) -> dict[str, StoredTensor]:
    first: dict[int, str] = {}
    found = {}
    for module_name, module in modules.items():
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            name = f"{module_name}.{leaf}" if module_name else leaf
            facts: Data = {"parameter": leaf in module._parameters}
            if facts["parameter"]:
                facts["requires_grad"] = tensor.requires_grad
            else:
                facts["persistent"] = leaf not in module._non_persistent_buffers_set
            if id(tensor) in first:
                facts["same"] = first[id(tensor)]
            first.setdefault(id(tensor), name)
            pattern = records.read(module).get("pattern") if leaf == "weight" else None
            found[name] = StoredTensor(tensor.detach(), facts, pattern)
    return found


def model_from(data: Data, tensors: Mapping[str, Tensor]) -> GraphModule:
    """The model that `model_data` was given.

    Args:
        data: The plain data, with the facts of each tensor under "tensors".
        tensors: Their values.

    Raises:
        FileError: Naming what does not fit together.
    """
    root = nn.Module()
    layers = _build_modules(root, data["modules"])
    _place_tensors(root, data["tensors"], tensors)
    graph = graph_from(data["graph"])
    for node in graph.nodes:
        if node.op == "call_module" and node.target not in layers:
            raise FileError(f"a call of {node.target!r}, which is no layer")
        if node.op == "get_attr" and node.target not in tensors:
            raise FileError(f"a use of {node.target!r}, which is no tensor")
    if not is_name(data["name"]):
        raise FileError(f"a model called {data['name']!r}")
    model = GraphModule(root, graph, data["name"])
    for slot in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        setattr(model, slot, getattr(root, slot))  # all of them, in their order
    training = set(data["training"])
    for name, module in model.named_modules():
        module.training = name in training
    for name, written in data["records"].items():
        record = value_from(written)
        if any(not isinstance(record.get(key, ""), str) for key in _TEXTS):
            raise FileError(f"{name}: a record {record}, which is not text")
        records.write(model.get_submodule(name), record)
    return model


def _build_modules(root: nn.Module, modules: Data) -> set[str]:
    """Add the modules to `root`; returns the names of those that can be called."""
    layers: set[str] = set()
    for name, data in modules:
        if not is_path(name):
            raise FileError(f"a module called {name!r}")
        parent, _, leaf = name.rpartition(".")
        if data is None:
            module = nn.Module()
        elif "same" in data:
            module = root.get_submodule(data["same"])
        else:
            module = new_module(data)
        root.get_submodule(parent).add_module(leaf, module)
    shared: dict[int, bool] = {}
    for name, data in modules:
        module = root.get_submodule(name)
        shared.setdefault(id(module), data is not None)
        if shared[id(module)]:
            layers.add(name)
    return layers


def _place_tensors(root: nn.Module, facts: Data, tensors: Mapping[str, Tensor]) -> None:
    placed: dict[str, Any] = {}
    for name, fact in facts.items():
        parent, _, leaf = name.rpartition(".")
        module = root.get_submodule(parent)
        own = module._parameters if fact["parameter"] else module._buffers
        meta = own.get(leaf)
        if meta is not None and meta.shape != tensors[name].shape:
            raise FileError(
                f"{name} of shape {tuple(tensors[name].shape)} in a layer that takes "
                f"{tuple(meta.shape)}"
            )
        if "same" in fact:
            value = placed[fact["same"]]
        elif fact["parameter"]:
            value = nn.Parameter(tensors[name], requires_grad=fact["requires_grad"])
        else:
            value = tensors[name]
        placed[name] = value
        if leaf in own:
            own[leaf] = value
        elif fact["parameter"]:
            module.register_parameter(leaf, value)
        else:
            module.register_buffer(leaf, value, persistent=fact["persistent"])
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        if tensor.is_meta:
            raise FileError(f"no values for {name}")
