"""Folding, against the modules themselves run in evaluation, in float64."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spre_fx import masks
from spre_fx.errors import InvariantError
from spre_fx.fold import BatchNormStatistics, Branch, fold_batch_norm, merge
from spre_fx.patterns import Pattern

many = settings(derandomize=True, deadline=None, max_examples=100, database=None)

CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORMS: dict[int, Any] = {
    0: nn.BatchNorm1d,
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}


class Site(NamedTuple):
    """Branches that read the same input and are added; the pattern their weights obey."""

    branches: list[Any]
    pattern: Pattern
    x: Tensor


def randomise(branch: Any) -> None:
    """Values that a wrong fold cannot hide behind."""
    for tensor in (*branch.parameters(), *branch.buffers()):
        if tensor.is_floating_point():
            nn.init.normal_(tensor)
    for bn in branch[1:]:
        bn.running_var.abs_()
        bn.eps = 0.01


@st.composite
def sites(draw: st.DrawFn) -> Site:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    axes, groups, per_group = draw(st.integers(0, 3)), draw(st.integers(1, 2)), 5
    c_in, c_out, padding = per_group * groups, 3 * groups, draw(st.integers(0, 2))
    options: dict[str, Any] = {
        "kernel_size": draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes)),
        "stride": draw(st.integers(1, 2)),
        "padding": padding,
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }
    branches: list[Any] = []
    for _ in range(draw(st.integers(1, 3))):
        bias = draw(st.booleans())
        layer = (
            CONVS[axes](c_in, c_out, bias=bias, **options) if axes else nn.Linear(c_in, c_out, bias)
        )
        bn = BATCH_NORMS[axes](c_out, affine=draw(st.booleans()))
        branches.append(nn.Sequential(layer, *([bn] if draw(st.booleans()) else [])))
        branches[-1].double().eval()
        randomise(branches[-1])
    pattern = Pattern(*draw(st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 5)])))
    mask = masks.nm_mask(branches[0][0].weight, pattern)
    for branch in branches:
        branch[0].weight.data *= mask
        mask = masks.spre_mask(mask, torch.rand(mask.shape[2:]) < 0.5)  # a SpRe branch's, maybe 0
    return Site(branches, pattern, torch.randn(2, c_in, *[5] * axes, dtype=torch.float64))


def as_branch(branch: Any) -> Branch:
    layer, bn = branch[0], branch[1] if len(branch) > 1 else None
    statistics = bn and BatchNormStatistics(
        bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    return Branch(layer.weight, layer.bias, statistics)


def run(layer: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """`layer(x)` with another weight and bias."""
    linear = isinstance(layer, nn.Linear)
    y: Tensor = (nn.functional.linear if linear else layer._conv_forward)(x, weight, bias)
    return y


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@many
@given(sites())
def test_a_folded_branch_computes_what_the_branch_did(site: Site) -> None:
    branch = site.branches[0]
    weight, bias = fold_batch_norm(as_branch(branch))
    assert weight.dtype == torch.float64
    assert not weight.requires_grad
    assert (weight[branch[0].weight == 0] == 0).all()
    assert_same(run(branch[0], weight, bias, site.x), branch(site.x))
    assert (bias is None) == (branch[0].bias is None and len(branch) == 1)


@many
@given(sites())
def test_merged_branches_compute_their_sum_and_stay_nm(site: Site) -> None:
    weight, bias = merge([as_branch(branch) for branch in site.branches])
    expected = torch.stack([branch(site.x) for branch in site.branches]).sum(0)
    assert_same(run(site.branches[0][0], weight, bias, site.x), expected)
    assert (weight[site.branches[0][0].weight == 0] == 0).all()
    assert masks.obeys(weight, site.pattern)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes_are_folded_in_float64(dtype: torch.dtype) -> None:
    branch: Any = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).to(dtype).eval()
    randomise(branch)
    weight, bias = merge([as_branch(branch)])
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert bias is not None
    assert weight.dtype == bias.dtype == torch.float64
    assert_same(run(branch[0], weight, bias, x), branch.double()(x))


def test_an_infinite_scale_leaves_masked_weights_zero() -> None:
    zeros = torch.zeros(2)
    bn = BatchNormStatistics(zeros, zeros, 0.0, None, None)
    weight = torch.tensor([[0.0, -0.0], [0.0, 1.0]])
    folded, _ = fold_batch_norm(Branch(weight, None, bn))
    assert folded.tolist() == [[0.0, 0.0], [0.0, torch.inf]]


def test_a_zero_that_a_mask_left_negative_comes_out_positive() -> None:
    weight, _ = fold_batch_norm(Branch(torch.tensor([[-0.0, -1.0]]), None, None))
    assert torch.signbit(weight).tolist() == [[False, True]]


def test_nothing_is_changed_in_place_or_shared() -> None:
    weight, bias = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    before = weight.clone(), bias.clone()
    merged, shift = merge([Branch(weight, bias, None)])
    assert shift is not None
    merged.zero_()
    shift.zero_()
    assert all(map(torch.equal, before, (weight, bias)))


def test_what_does_not_add_up_is_refused() -> None:
    branches = [Branch(torch.ones(2, 4, k, k), None, None) for k in (1, 3)]
    with pytest.raises(InvariantError, match=r"one shape, found .*\(2, 4, 1, 1\), \(2, 4, 3, 3\)"):
        merge(branches)
    with pytest.raises(InvariantError, match="one shape"):
        merge([])
