"""Verification: it lets every right fold through and catches wrong ones, however slightly wrong."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from layers import CONVS, LAYERS, Make, every_layer
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from spre_fx.errors import VerificationError
from spre_fx.masks import nm_mask
from spre_fx.modules import new_plain
from spre_fx.patterns import Pattern
from spre_fx.verify import BranchModules, check_agreement, check_pattern

PATTERN = Pattern(2, 4)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LIMIT = {"float64": "1e-10", "float32": "1e-05", "bfloat16": "6e-02", "float16": "8e-03"}


def batch_norm(layer: Any, kind: Make | None = None, eps: float = 1e-3) -> Any:
    """A batch norm for the outputs of `layer`, with nothing in it left as it was made."""
    kinds: dict[int, Make] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 5: nn.BatchNorm3d}
    kind = kind or kinds.get(layer.weight.dim(), nn.BatchNorm2d)
    bn: Any = kind(len(layer.weight), eps=eps).to(layer.weight.dtype)
    with torch.no_grad():
        for tensor in (bn.weight, bn.bias, bn.running_mean):
            tensor.normal_()
        bn.running_var.uniform_(0.3, 3)
    return bn


def branches(make: Make, dtype: torch.dtype = torch.float64) -> list[BranchModules]:
    """An N:M branch and a second one inside it, in training mode, as a site has them."""
    layers = [make(dtype=dtype), make(dtype=dtype)]
    mask = nm_mask(layers[0].weight.detach(), PATTERN)
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(mask)
    return [BranchModules(layer, batch_norm(layer)) for layer in layers]


def fold(branches: list[BranchModules]) -> Any:
    """The one float64 layer that computes the sum of the branches: algebra, written once more."""
    weights, biases = [], []
    for branch in branches:
        layer: Any = branch.layer
        bn: Any = branch.bn
        weight = layer.weight.detach().double()
        bias = torch.zeros(len(weight)).double() if layer.bias is None else layer.bias.double()
        if bn is not None:
            scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
            bias = (bias - bn.running_mean.double()) * scale + bn.bias.double()
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        weights.append(weight)
        biases.append(bias)
    layer = branches[0].layer
    return new_plain(layer, torch.stack(weights).sum(0).detach(), sum(biases).detach())


def check(branches: list[BranchModules], exact: Any, folded: Any = None) -> None:
    """Compare branches, their fold, and the fold in the type of the branches."""
    dtype = branches[0].layer.weight.dtype
    folded = copy.deepcopy(exact).to(dtype) if folded is None else folded
    check_agreement("layer1.0.conv1", branches, exact, folded)


def refused(
    branches: list[BranchModules], exact: Any, folded: Any = None, precision: str = "float64"
) -> float:
    """The difference that a fold is refused for, in a message that names site and precision."""
    with pytest.raises(VerificationError) as error:
        check(branches, exact, folded)
    message = str(error.value)
    assert message.startswith("layer1.0.conv1: expected folded and two-branch outputs to agree in ")
    assert f"{precision} to {LIMIT[precision]} of the largest output, found " in message
    assert "running variances" in message
    return float(message.rpartition("found ")[2].partition(". ")[0])


def state(*modules: Any) -> list[Tensor]:
    """Copies of all tensors."""
    return [t.clone() for module in modules for t in module.state_dict().values()]


@every_layer
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_right_folds_pass_in_every_type(make: Make, dtype: torch.dtype) -> None:
    both = branches(make, dtype)
    check(both, fold(both))
    check(both[:1], fold(both[:1]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_right_folds_of_a_wide_layer_with_uneven_statistics_pass(dtype: torch.dtype) -> None:
    both = branches(lambda dtype: nn.Conv2d(512, 32, 3, bias=False, dtype=dtype), dtype)
    for branch in both:
        with torch.no_grad():
            branch.bn.running_var.copy_(torch.logspace(-3, 2, 32))
    check(both, fold(both))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@every_layer
def test_layers_without_a_batch_norm_pass(make: Make, dtype: torch.dtype) -> None:
    alone = [BranchModules(make(dtype=dtype), None)]
    check(alone, fold(alone))


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, FrozenBatchNorm2d, nn.BatchNorm2d])
def test_every_kind_of_batch_norm_is_evaluated(kind: Make) -> None:
    conv = LAYERS["2d"]()
    branch = [BranchModules(conv, batch_norm(conv, kind).train())]
    check(branch, fold(branch))


@every_layer
def test_one_weight_wrong_by_a_millionth_is_caught_at_every_tap(make: Make) -> None:
    both = branches(make)
    right = fold(both)
    for tap in itertools.product(*map(range, right.weight.shape[2:])):
        wrong = copy.deepcopy(right)
        with torch.no_grad():
            wrong.weight[(1, -1, *tap)] += 1e-6
        assert 1e-10 < refused(both, wrong) < 1e-5


@every_layer
@pytest.mark.parametrize("channel", [0, -1])
def test_one_bias_wrong_by_a_millionth_is_caught(make: Make, channel: int) -> None:
    both = branches(make)
    wrong = fold(both)
    with torch.no_grad():
        wrong.bias[channel] += 1e-6
    assert 1e-10 < refused(both, wrong) < 1e-5


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_short_type_hides_no_wrong_fold(dtype: torch.dtype) -> None:
    both = branches(CONVS["2d"], dtype)
    wrong = fold(both)
    with torch.no_grad():
        wrong.weight[0, 0, 0, 0] += 1e-6
    assert 1e-10 < refused(both, wrong) < 1e-5


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_a_layer_wrong_only_in_its_own_type_is_caught_and_the_type_named(
    dtype: torch.dtype,
) -> None:
    both = branches(CONVS["2d"], dtype)
    exact = fold(both)
    folded = copy.deepcopy(exact).to(dtype)
    check(both, exact, folded)
    with torch.no_grad():
        folded.bias[1] += 2.0
    precision = str(dtype).removeprefix("torch.")
    assert 0.06 < refused(both, exact, folded, precision) < 2


def test_a_branch_left_out_a_bias_left_out_and_another_eps_are_caught() -> None:
    both = branches(CONVS["2d"])
    refused(both, fold(both[:1]))
    refused(both, fold(both[1:]))
    refused(both, new_plain(both[0].layer, fold(both).weight.detach(), None))
    both[1].bn.eps = 1e-5
    wrong = fold(both)
    both[1].bn.eps = 2e-5
    refused(both, wrong)


@pytest.mark.parametrize("branch", [0, 1])
def test_a_variance_that_is_no_number_is_caught(branch: int) -> None:
    both = branches(CONVS["2d"])
    right = fold(both)
    with torch.no_grad():
        both[branch].bn.running_var[2] = float("nan")
    assert math.isnan(refused(both, right))
    assert math.isnan(refused(both, fold(both)))


def test_a_variance_of_zero_without_an_eps_is_caught() -> None:
    conv = CONVS["2d"](dtype=torch.float64)
    branch = [BranchModules(conv, batch_norm(conv, eps=0.0))]
    check(branch, fold(branch))
    with torch.no_grad():
        branch[0].bn.running_var[2] = 0.0
    assert math.isnan(refused(branch, fold(branch)))


def test_a_fold_that_overflows_its_own_type_only_is_caught_and_the_type_named() -> None:
    both = branches(CONVS["2d"], torch.float16)
    with torch.no_grad():
        both[0].bn.running_var.fill_(0)
        both[0].bn.weight.fill_(60_000)
    assert not math.isfinite(refused(both, fold(both), precision="float16"))


def test_nothing_is_touched_and_no_random_number_is_drawn() -> None:
    both = branches(CONVS["2d"], torch.float32)
    exact = fold(both)
    folded = copy.deepcopy(exact).to(torch.float32)
    modules = [exact, folded, *(m for b in both for m in (b.layer, b.bn))]
    before, dtypes = state(*modules), [t.dtype for t in state(*modules)]
    generator = torch.get_rng_state()
    check(both, exact, folded)
    assert all(map(torch.equal, state(*modules), before))
    assert [t.dtype for t in state(*modules)] == dtypes
    assert all(module.training for module in modules)
    assert torch.equal(torch.get_rng_state(), generator)


@every_layer
def test_weights_of_the_pattern_pass_and_one_more_is_refused(make: Make) -> None:
    layer = make()
    with torch.no_grad():
        layer.weight.mul_(nm_mask(layer.weight, PATTERN))
    check_pattern("fc", layer, PATTERN)
    with torch.no_grad():
        layer.weight[(3, 4, *[0] * (layer.weight.dim() - 2))] = 0
        layer.weight[(3, 5, *[0] * (layer.weight.dim() - 2))] = 1e-30
        layer.weight[(3, 6, *[0] * (layer.weight.dim() - 2))] = 1.0
        layer.weight[(3, 7, *[0] * (layer.weight.dim() - 2))] = 2.0
    with pytest.raises(VerificationError) as error:
        check_pattern("fc", layer, PATTERN)
    assert str(error.value).startswith(
        "fc: expected at most 2 non-zeros in every 4 consecutive input channels after folding, "
        "found a group with more."
    )
    check_pattern("fc", layer, Pattern(3, 4))


def test_any_zero_pattern_is_seen_group_by_group() -> None:
    layer = nn.Linear(8, 1, bias=False)
    for kept in itertools.product([0.0, 1.0], repeat=8):
        layer.weight = nn.Parameter(torch.tensor([kept]))
        if sum(kept[:4]) <= 2 and sum(kept[4:]) <= 2:
            check_pattern("fc", layer, PATTERN)
        else:
            with pytest.raises(VerificationError, match="fc: expected at most 2"):
                check_pattern("fc", layer, PATTERN)


def test_a_flat_pattern_is_checked_in_its_own_groups() -> None:
    layer, pattern = nn.Conv2d(6, 6, 3, groups=6), Pattern(1, 4, flat=True)
    with torch.no_grad():
        layer.weight.mul_(nm_mask(layer.weight, pattern))
    check_pattern("conv", layer, pattern)
    with torch.no_grad():
        layer.weight[0, 0, 2, 2] = layer.weight[1, 0, 0, 0] = 1.0
    with pytest.raises(VerificationError, match=r"non-zeros in every 4 consecutive weights of the"):
        check_pattern("conv", layer, pattern)
