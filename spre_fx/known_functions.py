"""Which functions, methods and modules a file may name: those that compute, and nothing else.

A file names what its graph calls, so a name is all an attacker has. The tables hold what
`torch.overrides` lists as working on tensors, arithmetic of `operator` and `math`, and the layers
of `torch.nn`; nothing here opens a file, runs code or calls back. Names are public ones, which
other versions of torch have as well.
"""

from __future__ import annotations

import builtins
import importlib
import math
import operator
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import get_overridable_functions

_NAMESPACES: dict[str, ModuleType] = {
    "torch": torch,
    "torch.nn.functional": nn.functional,
    "torch.linalg": torch.linalg,
    "torch.fft": torch.fft,
    "torch.special": torch.special,
}
# Take no tensor, or pass on to another function: torch.overrides does not list them. _assert is
# what torch.fx makes of an assert on a shape.
_MORE: dict[str, str] = {
    "torch": "_assert arange empty eye full linspace ones scalar_tensor tensor tril_indices "
    "triu_indices zeros",
    "torch.nn.functional": "hardswish relu_ sigmoid softsign tanh tanhshrink upsample",
}
_PYTHON: dict[ModuleType, str] = {
    operator: "abs add and_ concat contains eq floordiv ge getitem gt iadd iand ifloordiv ilshift "
    "imatmul imod imul index inv invert ior ipow irshift isub itruediv ixor le lshift lt matmul "
    "mod mul ne neg not_ or_ pos pow rshift setitem sub truediv truth xor",
    math: "ceil exp floor gcd isqrt log log2 pow prod sqrt trunc",
    builtins: "abs bool float getattr int len list max min round sum tuple",
}
_TORCHVISION = (
    "torchvision.ops.boxes.nms",
    "torchvision.ops.roi_align.roi_align",
    "torchvision.ops.roi_pool.roi_pool",
    "torchvision.ops.stochastic_depth.stochastic_depth",
    "torchvision.models.swin_transformer._get_relative_position_bias",
    "torchvision.models.swin_transformer._patch_merging_pad",
    "torchvision.models.swin_transformer.shifted_window_attention",
)
_ATTRIBUTES = {"H", "T", "device", "dtype", "imag", "is_cuda", "layout", "mH", "mT", "ndim", "real"}
_ATTRIBUTES |= {"itemsize", "nbytes", "requires_grad", "shape"}
# Of Tensor's public methods: those that hand out memory, take a callable or reach into autograd.
_NO_METHODS = {"apply_", "backward", "const_data_ptr", "data_ptr", "map_", "map2_", "module_load"}
_NO_METHODS |= {"numpy", "pin_memory", "record_stream", "register_hook", "resize", "resize_"}
_NO_METHODS |= {"register_post_accumulate_grad_hook", "resize_as", "resize_as_", "set_"}
_NO_METHODS |= {"resize_as_sparse_", "share_memory_", "sparse_resize_", "storage", "tolist"}
_NO_METHODS |= {"sparse_resize_and_clear_", "untyped_storage"}
_NO_MODULES = (
    *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict),
    # Their size is a number of layers, which a file could declare at will.
    *(nn.RNNBase, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder),
    nn.modules.lazy.LazyModuleMixin,
)


@cache
def functions() -> dict[str, Callable[..., Any]]:
    """Every function of torch and Python that a graph in a file may call, by its public name."""
    listed = {id(function) for group in get_overridable_functions().values() for function in group}
    known = {}
    for prefix, namespace in _NAMESPACES.items():
        more = _MORE.get(prefix, "").split()
        for name, value in vars(namespace).items():
            if name in more or (id(value) in listed and _is_public_function(name, value)):
                known[f"{prefix}.{name}"] = value
    for module, names in _PYTHON.items():
        known |= {f"{module.__name__}.{name}": getattr(module, name) for name in names.split()}
    return known


def _is_public_function(name: str, value: object) -> bool:
    return callable(value) and not isinstance(value, type) and not name.startswith("_")


@cache
def _names() -> dict[int, str]:
    return {id(function): name for name, function in reversed(functions().items())}


def name_of(function: Callable[..., Any]) -> str | None:
    """The public name of a function a file may call, None for any other."""
    name = _names().get(id(function))
    if name is not None:
        return name
    home = getattr(function, "__module__", ""), getattr(function, "__name__", "")
    return ".".join(home) if ".".join(home) in _TORCHVISION else None


def function_of(name: str) -> Callable[..., Any] | None:
    """The function of that public name, None if a file may not call it."""
    if name in _TORCHVISION:
        module, _, leaf = name.rpartition(".")
        found: Callable[..., Any] = getattr(importlib.import_module(module), leaf)
        return found
    return functions().get(name)


def is_method(name: str) -> bool:
    """Whether a graph may call this method of a tensor."""
    public = name.isidentifier() and not name.startswith("_") and name not in _NO_METHODS
    return public and callable(getattr(torch.Tensor, name, None))


def is_attribute(name: object) -> bool:
    """Whether a graph may read this attribute of a tensor, with getattr."""
    return name in _ATTRIBUTES


@cache
def modules() -> dict[str, type[nn.Module]]:
    """Every layer a file may build, by name."""
    return {
        name: kind
        for name, kind in vars(nn).items()
        if isinstance(kind, type)
        and issubclass(kind, nn.Module)
        and kind is not nn.Module
        and kind.__module__.startswith("torch.nn.modules.")
        and not issubclass(kind, _NO_MODULES)
    }
