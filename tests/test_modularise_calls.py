"""ModulariseCalls: functions on a module's own parameters become calls of an ordinary layer."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import (
    MODELS,
    BatchNormAct,
    FunctionalConv,
    FunctionalOnModules,
    Kernel,
    Model,
    SamePadding,
    Standardised,
    assert_same,
    chain,
    kinds,
    model_of,
    prepare,
    randomise,
    reasons,
)
from torch import Tensor, nn

import spre_fx
from spre_fx.passes import ModulariseCalls, PassResult, Reason, trace

MODULARISE = ModulariseCalls()


def modularise(model: nn.Module) -> PassResult:
    return MODULARISE(trace(model))


def test_functions_become_calls_of_the_modules_that_hold_their_parameters() -> None:
    model = FunctionalOnModules()
    result = modularise(model)
    gm = result.graph_module
    assert set(result.account.applied) == {"conv1", "conv2", "fc"}
    assert kinds(gm) == [
        *("placeholder", "Conv2d", "BatchNorm2d", "Conv2d", "BatchNorm2d", "mean", "Linear"),
        "output",
    ]
    assert gm.conv1.extra_repr() == model.conv1.extra_repr()
    assert (gm.conv2.stride, gm.conv2.padding) == ((2, 2), (1, 1))
    unused = {"bn1.num_batches_tracked"}  # the function does not count, so neither may the module
    state = dict(model.state_dict())
    assert_same(dict(gm.state_dict()), {k: v for k, v in state.items() if k not in unused})


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(8, 4, 3, 2, 1),
        nn.Conv2d(8, 4, (3, 1), (2, 1), dilation=2, groups=2, bias=False),
        nn.Conv3d(8, 4, 3, padding="same"),
        nn.Linear(8, 4),
    ],
)
def test_the_layer_is_configured_as_the_function_was_called(layer: Any) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(layer, nn.Linear):
                return F.linear(x, self.layer.weight, self.layer.bias)
            return getattr(F, f"conv{layer.weight.dim() - 2}d")(
                *(x, self.layer.weight, self.layer.bias),
                **{n: getattr(layer, n) for n in ("stride", "padding", "dilation", "groups")},
            )

    gm = modularise(Holder()).graph_module
    assert type(gm.layer) is type(layer)
    assert gm.layer.extra_repr() == layer.extra_repr()
    x = torch.randn(2, 8, *[6] * (layer.weight.dim() - 2))
    assert torch.equal(gm(x), layer(x))


def other_bias(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, m.conv1.weight, m.conv2.bias)


def both_ways(m: Any, x: Tensor) -> Tensor:
    return m.conv2(F.conv2d(x, m.conv2.weight))


def two_settings(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(F.conv2d(x, m.conv1.weight), m.conv1.weight, padding=1)


def weight_used_twice(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, m.conv1.weight) * m.conv1.weight.abs().mean()


def computed_padding(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, m.conv1.weight, padding=x.shape[2] // 2)


@pytest.mark.parametrize(
    ("forward", "name", "reason", "said"),
    [
        (
            other_bias,
            "conv1",
            Reason.FUNCTIONAL,
            "conv2d is called as a function, its bias is no parameter conv1.bias. Use nn.Conv2d",
        ),
        (
            both_ways,
            "conv2d",
            Reason.SHARED_PARAMETER,
            "its weight is used by a function, and conv2 is called as a module as well",
        ),
        (
            two_settings,
            "conv1",
            Reason.SHARED_PARAMETER,
            "its weight is used in 2 calls that differ in bias or settings",
        ),
        (weight_used_twice, "conv1", Reason.SHARED_PARAMETER, "its weight is also read by abs_1"),
        (
            computed_padding,
            "conv1",
            Reason.FUNCTIONAL,
            "conv2d is called as a function, its padding is computed. Use nn.Conv2d",
        ),
        (
            lambda m, x: F.conv2d(x, m.conv1.weight.tanh()),
            "conv2d",
            Reason.FUNCTIONAL,
            "conv2d is called as a function, its weight belongs to no conv or linear module: tanh "
            "makes it. Where it is a parameter, pass that itself",
        ),
        (
            lambda m, x: F.conv_transpose2d(x, m.conv1.weight),
            "conv1",
            Reason.FUNCTIONAL,
            "conv_transpose2d is called as a function, and a transposed conv sums over output "
            "channels, not in groups of inputs",
        ),
        (
            lambda m, x: F.conv1d(x.flatten(2), m.bn1.kernel),
            "conv1d",
            Reason.FUNCTIONAL,
            "conv1d is called as a function, its weight is the parameter 'bn1.kernel'. Name it "
            "'weight', or use nn.Conv1d",
        ),
    ],
)
def test_a_function_that_no_module_could_stand_for_stays_and_says_why(
    forward: Callable[[Any, Tensor], Tensor], name: str, reason: Reason, said: str
) -> None:
    model = model_of("Functional", forward)()
    model.bn1.kernel = nn.Parameter(torch.randn(8, 8, 3))
    traced = trace(model)
    result = MODULARISE(traced)
    assert reasons(result)[name] == f"{reason}: {name}: {said}"
    assert result.graph_module.code == traced.code
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(traced(x), model(x))
    with_masks = prepare(model, "2:4") if name == "conv2d" else None
    if with_masks is not None and forward is both_ways:  # not sparse in one place, dense in another
        assert type(with_masks.conv2) is nn.Conv2d


def test_a_parameter_of_the_model_itself_has_no_module_to_become() -> None:
    said = reasons(modularise(FunctionalConv()))["conv2d (function)"]
    assert said.endswith(
        "conv2d is called as a function, its weight belongs to the whole model. Put it into an "
        "nn.Conv2d of its own"
    )


def test_a_module_and_the_weight_of_an_attention_are_left_as_they_are() -> None:
    said = reasons(modularise(MODELS["Attention"]()))
    assert said["conv1"] == "already done: conv1: is a module already"
    assert said["attention.in_proj_weight"] == (
        "inside a module kept whole: attention.in_proj_weight: is a parameter of attention, which "
        "is kept whole"
    )


# What no forward makes use of: a trace has none of it.
LEFT_OUT = {"bn1.num_batches_tracked"} | {
    f"bn2.{name}"
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
}


def trained(model: nn.Module, x: Tensor) -> tuple[list[Tensor], nn.Module]:
    """Outputs of three training steps with an evaluation between, and the model after them."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    outputs = []
    for _ in range(3):
        optimizer.zero_grad()
        outputs.append(model(x))
        outputs[-1].square().mean().backward()
        optimizer.step()
        outputs.append(model.eval()(x))
        model.train()
    return [output.detach() for output in outputs], model


@pytest.mark.parametrize(
    "name",
    [
        *("FunctionalOnModules", "norm with activation", "scaled norm", "conv with norm"),
        *("same padding", "own kernel", "renamed", "Views"),
    ],
)
def test_training_is_that_of_the_model_bit_by_bit(name: str) -> None:
    model = MODELS[name]()
    x = torch.randn(model.shape)
    ours, gm = trained(modularise(model).graph_module, x)
    theirs, model = trained(model, x)
    assert all(map(torch.equal, ours, theirs))
    state = {k: v for k, v in model.state_dict().items() if k in gm.state_dict()}
    assert_same(dict(gm.state_dict()), {key: state[key] for key in gm.state_dict()})
    assert state.keys() >= model.state_dict().keys() - LEFT_OUT


def test_a_trace_that_is_not_rewritten_counts_batches_in_training_alone() -> None:
    model = chain(conv=nn.Conv2d(8, 8, 3), bn=BatchNormAct(8))
    x = torch.randn(2, 8, 6, 6)
    ours, gm = trained(trace(model), x)
    theirs, model = trained(model, x)
    assert all(map(torch.equal, ours, theirs))
    assert int(gm.bn.num_batches_tracked) == int(model.bn.num_batches_tracked) == 3


def test_the_activation_of_a_batch_norm_comes_behind_the_sum() -> None:
    gm = prepare(MODELS["norm with activation"](), "1:4")
    assert kinds(gm)[1:12] == [
        *("NMConv2d", "getitem", "getitem", "getitem", "spre_mask"),
        *("BatchNorm2d", "SpReConv2d"),
        *("BatchNorm2d", "add", "Identity", "ReLU"),
    ]
    deployed = spre_fx.finalize(gm)
    assert kinds(deployed) == [
        *("placeholder", "Conv2d", "Identity", "ReLU", "pad", "Conv2d", "Identity", "ReLU"),
        "output",
    ]
    assert {name for name, _ in deployed.named_parameters()} == {
        *("conv.weight", "conv.bias", "next.weight", "next.bias")
    }


def test_a_batch_norm_frozen_by_its_mode_stays_frozen() -> None:
    model = chain(conv=nn.Conv2d(8, 8, 3), bn=BatchNormAct(8))
    model.bn.eval()
    gm = modularise(model).graph_module
    assert (gm.training, gm.bn.training) == (True, False)


def test_a_module_of_the_users_own_keeps_its_parameters_under_their_names() -> None:
    model = nn.Sequential(Kernel(), nn.BatchNorm2d(8))
    gm = spre_fx.prepare(model, "1:4")
    assert [str(site.state) for site in spre_fx.sites(gm)] == ["N:M + SpRe"]
    assert gm.state_dict().keys() >= model.state_dict().keys()
    (dense,) = spre_fx.sites(model)
    assert (dense.name, dense.structure, dense.weight_shape) == ("0", "F.conv2d", (8, 4, 3, 3))


class NoBatchNorm(Model):
    """Functional batch norms that no module of torch computes."""

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn1
        y = self.conv1(x)
        return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, *self.how)

    how: tuple[object, ...] = (False,)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ((False,), "its argument training is False, not the mode of the model"),
        ((True,), "its argument training is True, not the mode of the model"),
    ],
)
def test_a_functional_batch_norm_that_is_none_of_torchs_stays_and_says_why(
    how: tuple[object, ...], said: str
) -> None:
    model = type("NoBatchNorm", (NoBatchNorm,), {"how": how})()
    gm = prepare(model)
    x = torch.randn(2, 8, 6, 6)
    assert "batch_norm" in kinds(gm)
    (conv,) = (site for site in spre_fx.sites(gm) if site.name == "conv1")
    assert conv.note == f"conv1: feeds batch_norm, a functional batch norm: {said}. Use an " + (
        "nn.BatchNorm2d"
    )
    gm(x)


def test_what_a_subclass_computes_is_never_guessed() -> None:
    class Surprising(SamePadding):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    for conv in Surprising(8, 8, 3), Standardised(8, 8, 3):
        gm = trace(randomise(nn.Sequential(conv, nn.BatchNorm2d(8))))
        assert type(gm.get_submodule("0")) is type(conv)
        (said,) = reasons(MODULARISE(gm)).values()
        assert said == "already done: 0: is a module already"
