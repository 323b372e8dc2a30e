"""SpecialiseToEval: flags become False, training-only outputs go, and evaluation stays the same."""

from collections.abc import Callable

import pytest
import torch
from models import (
    AuxiliaryHead,
    DropPath,
    FunctionalDropout,
    Model,
    Residual,
    assert_same,
    kinds,
    node_of,
    prepare,
    reasons,
    run,
)
from torch import Tensor, nn
from torch.fx import symbolic_trace

from spre_fx import EveryK
from spre_fx.passes import SpecialiseToEval, trace

SPECIALISE = SpecialiseToEval()


class NestedSwitches(Model):
    """What only training computes feeds what differs again, at several depths of the output."""

    def forward(self, x: Tensor) -> dict[str, object]:
        y = self.conv1(x)
        y = self.conv2(y.neg() if self.training else y.exp())
        z = scaled(y, self.training)
        return {"y": [y, (z.tanh() if self.training else z,)], "z": z}


def scaled(y: Tensor, training: bool) -> Tensor:
    return nn.functional.dropout(y, 0.5, training=training).mul(2 if training else 3)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    "build", [AuxiliaryHead, FunctionalDropout, DropPath, NestedSwitches, Residual]
)
def test_evaluation_computes_the_same(build: Callable[[], nn.Module], prepared: bool) -> None:
    torch.manual_seed(0)
    gm = prepare(build()) if prepared else trace(build())
    result = SPECIALISE(gm).graph_module
    assert not {"TrainingFlag", "TrainingSwitch"} & set(kinds(result))
    assert not [name for name, _ in result.named_modules() if name.startswith("training_")]
    x = torch.randn(2, 8, 6, 6)
    expected = run(gm, x, training=False)
    found = run(result, x, training=False)
    assert_same(found, {name: expected[name] for name in found})
    assert {name for name in expected if "output" in name} <= found.keys()


def test_ops_before_and_after_with_an_auxiliary_head() -> None:
    before = trace(AuxiliaryHead())
    result = SPECIALISE(before)
    main = ["placeholder", "Conv2d", "BatchNorm2d", "relu", "Conv2d", "BatchNorm2d"]
    aux = ["Conv2d", "BatchNorm2d", "Dropout"]
    assert kinds(before) == [*main, *aux, "TrainingSwitch", "output"]
    assert kinds(result.graph_module) == [*main, "output"]
    assert not [name for name in result.graph_module.state_dict() if name.startswith("aux")]


def test_account_and_words_of_an_auxiliary_head() -> None:
    result = SPECIALISE(prepare(AuxiliaryHead(), schedule=EveryK(2)))
    assert result.account.applied == ("aux.conv",)
    assert reasons(result) == {
        name: f"used in evaluation: {name}: evaluation needs it" for name in ("conv1", "conv2")
    }


def test_a_dropout_flag_becomes_false() -> None:
    gm = SPECIALISE(trace(FunctionalDropout())).graph_module
    assert node_of(gm, "dropout").kwargs["training"] is False
    assert node_of(gm, "dropout_1").kwargs["training"] is False


def test_drop_path_leaves_nothing_behind() -> None:
    gm = SPECIALISE(trace(DropPath())).graph_module
    assert kinds(gm) == [
        *("placeholder", "Conv2d", "BatchNorm2d", "relu", "Conv2d", "BatchNorm2d", "add"),
        "output",
    ]


def test_a_layer_that_evaluation_also_uses_stays() -> None:
    class Shared(Model):
        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            y = self.conv1(x)
            return (y, self.conv1(self.conv2(x))) if self.training else y

    result = SPECIALISE(trace(Shared()))
    assert result.account.applied == ("conv2",)
    assert kinds(result.graph_module) == ["placeholder", "Conv2d", "output"]
    assert set(result.graph_module.state_dict()) == {"conv1.weight"}


def in_place(x: Tensor) -> Tensor:
    y = x + 1
    y.mul_(2)
    return y


def test_a_graph_that_does_not_depend_on_the_mode_stays_as_it_is() -> None:
    for gm in symbolic_trace(in_place), trace(Residual()), prepare(Model()):
        result = SPECIALISE(gm)
        assert result.graph_module.code == gm.code
        assert result.account.applied == ()
        assert_same(dict(result.graph_module.state_dict()), dict(gm.state_dict()))
