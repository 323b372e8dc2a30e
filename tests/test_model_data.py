"""Deployed models as plain data and tensors, and back."""

import copy
import json

import pytest
import torch
from models import Residual, chain
from torch import nn
from torch.fx import GraphModule

from spre_fx import FileError, ModelError, records
from spre_fx.model_data import model_data, model_from
from spre_fx.modules import SpReConv2d
from spre_fx.passes import trace


def described(model: GraphModule) -> tuple[dict, dict]:
    data, stored = model_data(model)
    data["tensors"] = {name: tensor.facts for name, tensor in stored.items()}
    return json.loads(json.dumps(data)), {name: stored[name].tensor.clone() for name in stored}


def test_a_model_comes_back_from_data_alone():
    model = trace(Residual()).eval()
    records.write(model.fc, records.Record(pattern="1:4"))
    data, tensors = described(model)
    back = model_from(data, tensors)
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(back(x), model(x))
    assert [name for name, _ in back.named_modules()] == [name for name, _ in model.named_modules()]
    assert records.read(back.fc) == {"pattern": "1:4"}
    assert described(back)[0] == data


def test_what_is_kept_of_each_tensor():
    model = trace(chain(a=nn.Linear(8, 8), b=nn.Linear(8, 8), bn=nn.BatchNorm1d(8)))
    model.b.weight = model.a.weight
    model.a.bias.requires_grad_(False)
    records.write(model.a, records.Record(pattern="2:4"))
    stored = model_data(model)[1]
    assert stored["a.weight"].facts == {"parameter": True, "requires_grad": True}
    assert stored["a.weight"].pattern == "2:4"
    assert stored["a.bias"].facts == {"parameter": True, "requires_grad": False}
    assert stored["a.bias"].pattern is None
    assert stored["b.weight"].facts["same"] == "a.weight"
    assert stored["bn.running_mean"].facts == {"parameter": False, "persistent": True}


def test_layers_in_use_must_be_known_and_others_need_not():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    model = trace(chain(conv=nn.Conv2d(8, 8, 1), own=Own()), leaves=["own"])
    with pytest.raises(
        ModelError, match=r"own: expected a layer of torch\.nn, found a .*Own\. A file"
    ):
        model_data(model)
    unused = trace(chain(conv=nn.Conv2d(8, 8, 1)))
    unused.add_module("own", Own())
    back = model_from(*described(unused))
    assert torch.equal(back.own.scale, unused.own.scale)
    assert type(back.own) is nn.Module


def test_records_of_text_and_numbers():
    model = trace(chain(conv=nn.Conv2d(8, 8, 1)))
    records.write(model.conv, {"note": "x", "times": (0.5, 1), "none": None})
    back = model_from(*described(model))
    assert records.read(back.conv) == records.read(model.conv)
    records.write(model.conv, {"note": "x", "when": object()})
    with pytest.raises(
        ModelError, match=r"conv: expected a record of text and numbers, found a value"
    ):
        model_data(model)


def test_a_layer_of_a_backend_says_how_to_do_without():
    model = trace(chain(conv=nn.Conv2d(8, 8, 1)))
    model.conv = SpReConv2d(8, 8, 1)  # a layer of this library's own, for want of a sparse one
    with pytest.raises(
        ModelError, match=r"conv: .* Save what finalize makes with backend='dense'\."
    ):
        model_data(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(name="a b"), r"a model called 'a b'"),
        (lambda d: d["modules"].append(["x y'", None]), r"a module called \"x y'\""),
        (
            lambda d: d["records"].update(fc={"dict": [["note", ["x"]]]}),
            r"fc: a record \{'note': \['x'\]\}, which is not text",
        ),
        (
            lambda d: d["modules"].append(["z", {"type": "PReLU", "options": {}}]),
            r"no values for z\.w",
        ),
    ],
)
def test_what_does_not_fit_together(change, words):
    data, tensors = described(trace(Residual()))
    change(data)
    with pytest.raises(FileError, match=words):
        model_from(data, tensors)


def test_a_tensor_of_another_shape_or_out_of_place():
    data, tensors = described(trace(Residual()))
    wrong = {**tensors, "fc.weight": torch.ones(5, 9)}
    with pytest.raises(
        FileError, match=r"fc\.weight of shape \(5, 9\) in a layer that takes \(5, 8\)"
    ):
        model_from(copy.deepcopy(data), wrong)
    data["graph"].insert(1, ["call_module", "c", "shortcut", [{"node": 0}], {}])
    with pytest.raises(FileError, match=r"a call of 'shortcut', which is no layer"):
        model_from(data, tensors)
