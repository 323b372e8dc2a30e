"""Checks: what `prepare` and `finalize` refuse before they touch it, and in which words."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from spre_fx.checks import check_model, check_tensors, is_prepared
from spre_fx.errors import ModelError
from spre_fx.methods import SRSTE
from spre_fx.modules import make_nm
from spre_fx.patterns import Pattern


def net() -> Any:
    """conv -> bn -> linear."""
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 8))


def refusal(model: Any) -> str:
    """The words in which `check_model` refuses a model."""
    with pytest.raises(ModelError) as error:
        check_model(model)
    return str(error.value)


def deprecated(make: Any) -> nn.Module:
    """What torch still makes, under a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_finite_float_model_passes(dtype: torch.dtype) -> None:
    check_model(net().to(dtype))


def test_a_model_without_a_tensor_passes() -> None:
    check_model(nn.ReLU())


@pytest.mark.parametrize(
    ("model", "what"),
    [(None, "NoneType"), ("resnet18", "str"), (nn.Conv2d, "type"), ({"weight": 1}, "dict")],
)
def test_what_is_no_module_is_refused(model: object, what: str) -> None:
    assert refusal(model) == f"expected an nn.Module, found {what}."


@pytest.mark.parametrize(
    "compiled",
    [
        lambda: torch.jit.script(nn.Linear(4, 4)),
        lambda: torch.jit.trace(nn.Linear(4, 4), torch.zeros(1, 4)),
    ],
    ids=["script", "trace"],
)
def test_a_script_module_is_refused_alone_and_inside(compiled: Any) -> None:
    module = deprecated(compiled)
    name = type(module).__name__
    expected = (
        f"expected a Python module, found a compiled {name}. Prepare the model before torch.jit "
        "compiles it."
    )
    assert refusal(module) == f"{name}: {expected}"
    assert refusal(nn.Sequential(nn.ReLU(), module)) == f"1: {expected}"


def test_an_uninitialised_layer_is_refused_until_a_forward_has_run() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU())
    assert refusal(model) == (
        "0: expected initialised weights, found an uninitialised LazyConv2d. Run one forward first."
    )
    model(torch.randn(1, 4, 5, 5))
    check_model(model)


class LazyScale(LazyModuleMixin, nn.Module):
    """Stays of a lazy class after its first forward, as modules of users do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.UninitializedParameter()

    def initialize_parameters(self, x: Tensor) -> None:
        if self.has_uninitialized_params():
            self.scale.materialize(x.shape[-1:])
            nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_a_lazy_class_with_initialised_weights_passes() -> None:
    model = LazyScale()
    assert refusal(model).startswith("LazyScale: expected initialised weights")
    model(torch.randn(1, 4))
    check_model(model)


def test_a_quantised_layer_is_refused() -> None:
    quantised = deprecated(
        lambda: torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})
    )
    assert refusal(quantised) == (
        "0: expected floating-point layers, found the quantised Linear. Prepare and train the "
        "float model, finalize it, and quantise the deployed one."
    )


@pytest.mark.parametrize("tensor", ["0.weight", "1.running_var"])
def test_a_tensor_on_the_meta_device_is_refused_by_name(tensor: str) -> None:
    model = net()
    owner, name = model.get_submodule(tensor[0]), tensor[2:]
    tensors = owner._parameters if name in owner._parameters else owner._buffers
    tensors[name] = tensors[name].to("meta")
    message = refusal(model)
    assert message.startswith(f"{tensor}: expected values, found a tensor on the meta device.")
    assert "to_empty" in message


@pytest.mark.parametrize("check", [check_model, check_tensors])
@pytest.mark.parametrize("tensor", ["0.weight", "0.bias", "1.running_mean", "1.running_var"])
@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([float("nan")], "1 NaN and 0 infinite values"),
        ([float("inf"), float("-inf")], "0 NaN and 2 infinite values"),
        ([float("nan"), float("inf"), float("nan")], "2 NaN and 1 infinite values"),
    ],
    ids=["nan", "inf", "both"],
)
def test_values_that_are_not_finite_are_refused_by_name_and_counted(
    check: Any, tensor: str, values: list[float], found: str
) -> None:
    model = net()
    with torch.no_grad():
        model.state_dict()[tensor].view(-1)[1 : 1 + len(values)] = torch.tensor(values)
    with pytest.raises(ModelError) as error:
        check(model)
    assert str(error.value) == (
        f"{tensor}: expected finite values, found {found}. Go back to a checkpoint from before the "
        "training diverged."
    )


def test_buffers_of_integers_and_truths_pass() -> None:
    model = net()
    model.register_buffer("mask", torch.ones(4, dtype=torch.bool))
    check_model(model)


def test_is_prepared_looks_for_an_nm_layer_anywhere_inside() -> None:
    model = net()
    assert not is_prepared(model)
    make_nm(model[2], Pattern(2, 4), SRSTE(), keep_masks=False)
    assert is_prepared(model)
    assert is_prepared(nn.Sequential(nn.Sequential(model)))


def test_finite_weights_may_have_an_infinite_sum() -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(3e38)
    check_tensors(model)
    with torch.no_grad():
        model.weight[1, 2] = torch.inf
        model.weight[2, 1] = -torch.inf
    with pytest.raises(ModelError, match=r"weight: .* found 0 NaN and 2 infinite values"):
        check_tensors(model)
