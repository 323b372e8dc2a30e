"""What a file may name: functions that compute. What opens files, runs code or calls back: not."""

import math
import operator

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import stochastic_depth

from spre_fx import known_functions


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.flatten, "torch.flatten"),
        (torch.cat, "torch.cat"),
        (torch.arange, "torch.arange"),
        (F.relu, "torch.nn.functional.relu"),
        (F.avg_pool2d, "torch.nn.functional.avg_pool2d"),
        (F.max_pool2d, "torch.nn.functional.max_pool2d"),
        (F.hardswish, "torch.nn.functional.hardswish"),
        (F.adaptive_avg_pool2d, "torch.nn.functional.adaptive_avg_pool2d"),
        (F.scaled_dot_product_attention, "torch.nn.functional.scaled_dot_product_attention"),
        (torch.linalg.vector_norm, "torch.linalg.vector_norm"),
        (operator.add, "operator.add"),
        (operator.getitem, "operator.getitem"),
        (math.ceil, "math.ceil"),
        (getattr, "builtins.getattr"),
        (stochastic_depth, "torchvision.ops.stochastic_depth.stochastic_depth"),
    ],
)
def test_names_lead_to_functions_and_back(function, name):
    assert known_functions.name_of(function) == name
    assert known_functions.function_of(name) is function


def test_every_name_leads_to_its_function_and_is_public():
    known = known_functions.functions()
    assert len(known) > 500
    for name, function in known.items():
        assert known_functions.function_of(known_functions.name_of(function)) is function
        assert not name.rpartition(".")[2].startswith("_") or name == "torch._assert"
        assert not isinstance(function, type) or function.__module__ == "builtins"


@pytest.mark.parametrize("name", known_functions._TORCHVISION)
def test_every_function_of_torchvision_is_there(name):
    assert known_functions.name_of(known_functions.function_of(name)) == name


@pytest.mark.parametrize(
    "name",
    [
        *("torch.load", "torch.save", "torch.from_file", "torch.compile", "torch.vmap"),
        *("torch.hub.load", "torch.jit.load", "torch.ops.load_library", "torch.set_default_device"),
        *("builtins.eval", "builtins.exec", "builtins.open", "builtins.__import__", "os.system"),
        *("operator.attrgetter", "operator.methodcaller", "operator.call", "math.__loader__", ""),
        *("torchvision.models.get_model", "torchvision.io.read_image", "flatten", "torch"),
    ],
)
def test_what_does_more_than_compute_is_not_known(name):
    assert known_functions.function_of(name) is None


def test_functions_from_elsewhere_have_no_name():
    assert known_functions.name_of(print) is None
    assert known_functions.name_of(torchvision.models.resnet18) is None
    assert known_functions.name_of(lambda x: x) is None


@pytest.mark.parametrize("name", ["flatten", "view", "size", "permute", "add_", "to", "contiguous"])
def test_methods(name):
    assert known_functions.is_method(name)


@pytest.mark.parametrize(
    "name", ["__reduce_ex__", "_typed_storage", "apply_", "numpy", "set_", "shape", "no", "", "a b"]
)
def test_no_methods(name):
    assert not known_functions.is_method(name)


def test_attributes():
    assert known_functions.is_attribute("shape")
    assert not known_functions.is_attribute("__class__")
    assert not known_functions.is_attribute("grad_fn")


def test_layers_are_those_of_torch_that_hold_no_others():
    known = known_functions.modules()
    assert known["Conv2d"] is nn.Conv2d
    assert known["MultiheadAttention"] is nn.MultiheadAttention
    for name in ("Sequential", "ModuleList", "LSTM", "Transformer", "LazyConv2d", "Module"):
        assert name not in known
