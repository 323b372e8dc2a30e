"""Masks by the engine are those by torch, bit for bit, and None where it has no kernel."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from weights import DTYPES, KINDS, draw_weight, weights

from spre_fx import engine, mask_ops, native_masks
from spre_fx.patterns import Pattern

many = settings(derandomize=True, deadline=None, max_examples=150, database=None)

pytestmark = pytest.mark.skipif(engine.load() is None, reason="needs the engine")

ALL_KINDS = (*KINDS, "special")
LARGE = [(64, 64, 3, 3), (40, 70, 3, 3), (128, 520), (96, 1, 3, 3), (16, 48, 7, 7)]
PATTERNS = ("1:2", "2:4", "1:4", "1:8", "4:8", "1:16", "8:16", "11:64")


@pytest.fixture(autouse=True)
def shares_of_any_size(monkeypatch):
    """Let small weights be divided among threads too."""
    monkeypatch.setattr(native_masks, "_NUMBERS_OF_A_THREAD", 10)
    yield
    torch.set_num_threads(1)


def assert_same_masks(weight: Tensor, pattern: Pattern) -> None:
    n, m = pattern.n, pattern.m
    mask = native_masks.nm_mask(weight, n, m)
    assert mask is not None
    assert mask.stride() == weight.stride()
    assert torch.equal(mask, mask_ops.nm_mask_by_torch(weight, n, m))
    for count in {1, pattern.kept(weight.numel()), weight.numel()}:
        per_tap = native_masks.count_largest(weight, count)
        assert per_tap is not None
        expected = mask_ops.count_per_tap(mask_ops.largest(weight, count))
        assert torch.equal(per_tap, expected)


@many
@given(weights(ALL_KINDS, filters=9), st.integers(1, 3))
def test_masks_of_small_weights(drawn: tuple[Tensor, Pattern], threads: int) -> None:
    torch.set_num_threads(threads)
    assert_same_masks(*drawn)


def usual() -> list[Any]:
    """Every size with every pattern; quick are two of each size, one at least of each pattern."""
    return [
        pytest.param(shape, pattern, marks=[pytest.mark.slow] * ((row + column) % 4 > 0))
        for row, shape in enumerate(LARGE)
        for column, pattern in enumerate(PATTERNS)
    ]


@pytest.mark.parametrize(("shape", "pattern"), usual(), ids=str)
def test_masks_of_weights_of_usual_size(shape: tuple[int, ...], pattern: str) -> None:
    for seed, kind in enumerate(ALL_KINDS):
        torch.set_num_threads(1 + seed % 2)
        dtype = (torch.float32, torch.bfloat16)[seed % 2]
        weight = draw_weight(shape, dtype, kind, seed)
        assert_same_masks(weight, Pattern.parse(pattern))
        if len(shape) == 4:
            last = weight.to(memory_format=torch.channels_last)
            assert_same_masks(last, Pattern.parse(pattern))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("taps", [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 25, 49])
def test_the_largest_of_each_group_with_any_number_of_taps(taps: int, threads: int) -> None:
    torch.set_num_threads(threads)
    for seed, (m, channels) in enumerate(itertools.product((2, 3, 4, 8, 16, 64), (1, 2, 3))):
        kind, dtype = ALL_KINDS[seed % len(ALL_KINDS)], DTYPES[seed % len(DTYPES)]
        for rest in (0, 1, m - 1):
            weight = draw_weight((7, channels * m + rest, taps), dtype, kind, seed)
            mask = native_masks.nm_mask(weight, 1, m)
            assert mask is not None
            assert torch.equal(mask, mask_ops.nm_mask_by_torch(weight, 1, m))


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_counting_in_weights_large_enough_to_be_sampled(dtype: torch.dtype, kind: str) -> None:
    for seed, kernel in enumerate([(3, 3), (1, 1), (5, 5)]):
        torch.set_num_threads(1 + seed)
        taps = kernel[0] * kernel[1]
        weight = draw_weight((131, 2400 // taps, *kernel), dtype, kind, seed)
        for layout in (torch.contiguous_format, torch.channels_last):
            laid_out = weight.contiguous(memory_format=layout)
            for share in (1000, 16, 4, 2):
                count = weight.numel() // share
                per_tap = native_masks.count_largest(laid_out, count)
                expected = mask_ops.count_per_tap(mask_ops.largest(weight, count))
                assert per_tap is not None
                assert torch.equal(per_tap, expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_counting_where_a_sample_of_the_weights_misleads(dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    weight = draw_weight((128, 260, 3, 3), dtype, ALL_KINDS[0], 0)
    line = 64 // weight.itemsize
    period = weight.numel() // line // 4096 | 1  # of the lines that are sampled
    whole = weight.numel() // (period * line) * period * line
    sampled = weight.view(-1)[:whole].unflatten(0, (-1, period, line))
    for scale in (1000, 0.001):
        sampled[:, 0] *= scale
        assert_same_masks(weight, Pattern(1, 4))


def test_masked_weights_and_gradients() -> None:
    for seed, kind in enumerate(ALL_KINDS):
        torch.set_num_threads(1 + seed % 2)
        for dtype in (torch.float32, torch.float64):
            weight = draw_weight((20, 30, 3, 3), dtype, kind, seed)
            gradient, mask = torch.randn_like(weight), torch.rand(weight.shape) < 0.3
            found = native_masks.mask_weight(weight, mask)
            assert_same(found, weight * mask)
            found = native_masks.decay_gradient(gradient, weight, mask, 0.3)
            assert_same(found, torch.where(mask, gradient, gradient + 0.3 * weight))


def test_gradients_of_products_with_masks_of_numbers() -> None:
    for seed, kind in enumerate(ALL_KINDS):
        torch.set_num_threads(1 + seed % 3)
        for dtype in (torch.float32, torch.float64):
            weight = draw_weight((20, 30, 3, 3), dtype, kind, seed)
            gradient = draw_weight(weight.shape, dtype, ALL_KINDS[-seed], seed + 1)
            mask = torch.rand_like(weight).sub(0.5).relu()
            found = native_masks.product_gradients(gradient, weight, mask)
            assert found is not None
            assert_same(found[0], gradient * mask)
            assert_same(found[1], torch.where(mask != 0, gradient * weight, 0))


def assert_same(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit() | found.isnan(), expected.signbit() | expected.isnan())


def test_channels_last_stays_channels_last() -> None:
    weight = torch.randn(6, 8, 3, 3).to(memory_format=torch.channels_last)
    mask, gradient = native_masks.nm_mask(weight, 2, 4), torch.randn_like(weight)
    assert mask is not None
    for found in (
        native_masks.mask_weight(weight, mask),
        native_masks.decay_gradient(gradient, weight, mask, 0.1),
        *(native_masks.product_gradients(gradient, weight, mask.to(weight)) or (None,)),
    ):
        assert found is not None
        assert found.stride() == weight.stride()


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(0, 4, 3, 3),
        torch.zeros(4, 8, 3, 3)[:, ::2],
        torch.zeros(3, 3, 8, 4).permute(3, 2, 1, 0),
        torch.zeros(4, 8, device="meta"),
    ],
    ids=["empty", "strided", "permuted", "elsewhere"],
)
def test_what_the_engine_cannot_read_is_left_to_torch(weight: Tensor) -> None:
    assert native_masks.nm_mask(weight, 2, 4) is None
    assert native_masks.count_largest(weight, 1) is None


def test_more_members_than_the_engine_compares_are_left_to_torch() -> None:
    assert native_masks.nm_mask(torch.randn(2, 128), 1, 64) is not None
    assert native_masks.nm_mask(torch.randn(2, 128), 1, 65) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_types_are_masked_by_torch(dtype: torch.dtype) -> None:
    weight, mask = torch.randn(4, 8, dtype=dtype), torch.rand(4, 8) < 0.5
    assert native_masks.mask_weight(weight, mask) is None
    assert native_masks.decay_gradient(weight, weight, mask, 0.1) is None
    assert native_masks.product_gradients(weight, weight, mask.to(dtype)) is None


def test_operands_that_lie_differently_in_memory_are_left_to_torch() -> None:
    weight = torch.randn(4, 8, 3, 3)
    mask = weight > 0
    last = weight.to(memory_format=torch.channels_last)
    assert native_masks.mask_weight(last, mask) is None
    assert native_masks.mask_weight(weight, mask[:, :1].expand_as(mask)) is None
    assert native_masks.mask_weight(weight, mask.float()) is None
    assert native_masks.decay_gradient(last, weight, mask, 0.1) is None
    assert native_masks.decay_gradient(weight.double(), weight, mask, 0.1) is None
    assert native_masks.product_gradients(last, weight, mask.float()) is None
    assert native_masks.product_gradients(weight, weight, mask) is None
    assert native_masks.product_gradients(weight.double(), weight, mask.float()) is None
