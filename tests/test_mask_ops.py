"""The operators: the rules of torch.library, and the same masks whoever computes them."""

import math

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from weights import weights

from spre_fx import engine, mask_ops
from spre_fx.engine import library
from spre_fx.masked_weight import masked_weight
from spre_fx.patterns import Pattern

many = settings(derandomize=True, deadline=None, max_examples=100, database=None)


@pytest.mark.parametrize("op", ["nm_mask", "unstructured_mask", "live_taps"])
@pytest.mark.parametrize("shape", [(4, 8), (4, 6, 3), (4, 6, 3, 3)], ids=str)
def test_operators_keep_the_rules_of_torch_library(op: str, shape: tuple[int, ...]) -> None:
    operator = getattr(torch.ops.spre_fx, op).default
    torch.library.opcheck(operator, (torch.randn(shape), 2, 4))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_the_spre_mask_keeps_them_too(dtype: torch.dtype) -> None:
    nm, live = torch.rand(4, 6, 3, 3) < 0.5, torch.rand(3, 3) < 0.5
    torch.library.opcheck(torch.ops.spre_fx.spre_mask.default, (nm.to(dtype), live))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_masks_of_numbers_through_the_spre_branch(
    layout: torch.memory_format,
) -> None:
    live = torch.rand(3, 3) < 0.5
    weight, upstream = (torch.randn(4, 6, 3, 3, dtype=torch.float64) for _ in range(2))
    nm = (torch.rand(4, 6, 3, 3) < 0.5).double().contiguous(memory_format=layout).requires_grad_()
    (masked_weight(weight, mask_ops.spre_mask(nm, live)) * upstream).sum().backward()
    assert nm.grad is not None
    assert torch.equal(nm.grad, torch.where((nm != 0) & live, weight * upstream, 0.0))


@many
@given(weights())
def test_selection_without_a_host_sync_is_the_same(drawn: tuple[Tensor, Pattern]) -> None:
    weight, pattern = drawn
    magnitude = weight.abs().flatten().view(mask_ops.BITS[weight.dtype])
    for count in {1, pattern.kept(len(magnitude)), len(magnitude)}:
        expected = mask_ops._largest_on_cpu(magnitude, count)
        assert torch.equal(mask_ops._largest_without_sync(magnitude, count), expected)


@pytest.fixture
def no_engine(monkeypatch):
    monkeypatch.setenv(library.VARIABLE, "none")
    library._loaded.cache_clear()
    yield
    library._loaded.cache_clear()


def test_masks_are_the_same_without_the_engine(no_engine: None) -> None:
    assert engine.load() is None
    weight = torch.randn(6, 10, 3, 3).round(decimals=1)
    found = (mask_ops.nm_mask(weight, 2, 4), mask_ops.live_taps(weight, 2, 4))
    library._loaded.cache_clear()
    expected = (mask_ops.nm_mask(weight, 2, 4), mask_ops.live_taps(weight, 2, 4))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (4, 8, 0)], ids=str)
def test_a_weight_of_no_numbers_has_a_mask_of_none(shape: tuple[int, ...]) -> None:
    assert mask_ops.nm_mask(torch.zeros(shape), 2, 4).shape == shape
    assert math.prod(shape) == 0
