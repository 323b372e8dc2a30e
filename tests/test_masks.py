"""The masks, against Eq. 3, 4 and 8 of the paper written out as Python loops."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from weights import weights

from spre_fx import masks
from spre_fx.errors import PatternError
from spre_fx.patterns import Pattern

many = settings(derandomize=True, deadline=None, max_examples=250, database=None)

PATTERNS = [Pattern.parse(p) for p in ("1:2", "2:4", "1:4", "1:8", "1:16", "4:8", "8:16", "16:32")]


class Case(NamedTuple):
    weight: Tensor
    pattern: Pattern


def cases() -> st.SearchStrategy[Case]:
    return weights().map(lambda drawn: Case(*drawn))


def by_tap(weight: Tensor) -> Tensor:
    """`(C_out, C_in/groups, taps)`, whatever the kernel's axes."""
    return weight.reshape(*weight.shape[:2], math.prod(weight.shape[2:]))


def largest(magnitudes: list[float], count: int) -> list[int]:
    """Indices of the `count` largest, lower index first among equals."""
    order = sorted(range(len(magnitudes)), key=lambda i: (-magnitudes[i], i))
    return order[:count]


def equation_3(weight: Tensor, n: int, m: int) -> Tensor:
    c_out, c_in, taps = by_tap(weight).shape
    mask = torch.zeros(c_out, c_in, taps, dtype=torch.bool)
    for p, tap in itertools.product(range(c_out), range(taps)):
        row = by_tap(weight)[p, :, tap].abs().tolist()
        for start in range(0, c_in, m):
            for q in largest(row[start : start + m], n):
                mask[p, start + q, tap] = True
    return mask.view(weight.shape)


def unstructured(weight: Tensor, n: int, m: int) -> Tensor:
    flat = weight.abs().flatten().tolist()
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[largest(flat, math.ceil(Fraction(len(flat) * n, m)))] = True
    return mask.view(weight.shape)


def equation_4(mask: Tensor) -> list[Fraction]:
    c_out, c_in, taps = by_tap(mask).shape
    pairs = list(itertools.product(range(c_out), range(c_in)))
    entries = by_tap(mask).tolist()
    return [1 - Fraction(sum(entries[p][q][t] for p, q in pairs), len(pairs)) for t in range(taps)]


@many
@given(cases())
def test_nm_mask_is_equation_3(case: Case) -> None:
    weight, pattern = case
    mask = masks.nm_mask(weight, pattern)
    assert mask.dtype == torch.bool
    assert mask.stride() == weight.stride()
    assert torch.equal(mask, equation_3(weight, pattern.n, pattern.m))
    full = weight.shape[1] // pattern.m * pattern.m
    if full:
        assert (mask[:, :full].unflatten(1, (-1, pattern.m)).sum(2) == pattern.n).all()


@many
@given(cases())
def test_unstructured_mask_keeps_the_largest_of_the_layer(case: Case) -> None:
    weight, (n, m) = case.weight, (case.pattern.n, case.pattern.m)
    mask = masks.unstructured_mask(weight, case.pattern)
    assert mask.stride() == weight.stride()
    assert torch.equal(mask, unstructured(weight, n, m))


@many
@given(cases())
def test_spre_mask_is_equation_8(case: Case) -> None:
    weight, (n, m) = case.weight, (case.pattern.n, case.pattern.m)
    alive = [sparsity < 1 - Fraction(n, m) for sparsity in equation_4(unstructured(weight, n, m))]
    live = masks.live_taps(weight, case.pattern)
    assert live.dtype == torch.bool
    assert live.shape == weight.shape[2:]
    assert live.flatten().tolist() == alive
    expected = equation_3(weight, n, m)
    by_tap(expected)[:, :, [not live for live in alive]] = False
    assert torch.equal(masks.spre_mask(masks.nm_mask(weight, case.pattern), live), expected)


@many
@given(cases())
def test_spatial_sparsity_is_equation_4(case: Case) -> None:
    for mask in (case.weight, masks.unstructured_mask(case.weight, case.pattern)):
        sparsity = masks.spatial_sparsity(mask)
        assert sparsity.dtype == torch.float64
        assert sparsity.shape == mask.shape[2:]
        assert sparsity.flatten().tolist() == [float(exact) for exact in equation_4(mask != 0)]


@many
@given(cases())
def test_obeys_counts_the_non_zeros_of_each_group(case: Case) -> None:
    weight, pattern = case
    mask = masks.nm_mask(weight, pattern)
    assert masks.obeys(mask * weight, pattern)
    if weight.shape[1] > pattern.n:  # one more in the first group
        mask[0, : pattern.n + 1] = True
        assert not masks.obeys(mask, pattern)


def flat_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Groups of M in the order filter, tap, input channel, as `permute(0, 2, 3, 1)` gives it."""
    c_out, c_in, taps = by_tap(weight).shape
    places = list(itertools.product(range(c_out), range(taps), range(c_in)))
    entries = by_tap(weight).abs().tolist()
    mask = torch.zeros(c_out, c_in, taps, dtype=torch.bool)
    for start in range(0, len(places), m):
        group = places[start : start + m]
        for index in largest([entries[p][q][tap] for p, tap, q in group], n):
            p, tap, q = group[index]
            mask[p, q, tap] = True
    return mask.view(weight.shape)


@many
@given(cases())
def test_a_flat_pattern_groups_weights_across_taps_and_filters(case: Case) -> None:
    weight, pattern = case.weight, Pattern(case.pattern.n, case.pattern.m, flat=True)
    mask = masks.nm_mask(weight, pattern)
    assert mask.stride() == weight.stride()
    assert torch.equal(mask, flat_mask(weight, pattern.n, pattern.m))
    assert torch.equal(masks.live_taps(weight, pattern), masks.live_taps(weight, case.pattern))
    assert masks.obeys(mask * weight, pattern)
    assert masks.most_in_a_group(mask, pattern) == min(pattern.n, weight.numel())
    rows = masks.group_rows(weight, pattern)
    assert torch.equal(masks.ungroup_rows(rows, weight.shape, pattern), weight)
    if weight.numel() > pattern.n:  # one more in the first group
        full = masks.group_rows(mask, pattern).clone()
        full[0, : pattern.n + 1] = True
        more = masks.ungroup_rows(full, weight.shape, pattern)
        assert not masks.obeys(more, pattern)
        assert masks.most_in_a_group(more, pattern) > pattern.n


def test_the_flat_mask_of_a_depthwise_conv_is_that_of_the_published_code() -> None:
    weight = torch.randn(8, 1, 3, 3)
    groups = weight.abs().permute(0, 2, 3, 1).reshape(-1, 4)
    removed = groups.argsort(dim=1)[:, :3]
    expected = torch.ones_like(groups).scatter_(1, removed, 0).reshape(8, 3, 3, 1)
    found = masks.nm_mask(weight, Pattern(1, 4, flat=True))
    assert torch.equal(found, expected.permute(0, 3, 1, 2).bool())


@pytest.mark.parametrize("m", range(2, 17))
def test_a_tap_that_keeps_exactly_its_share_is_dead(m: int) -> None:
    for n in range(1, m):
        weight = torch.zeros(3, m, 1, 5)
        weight[:, :n] = 1.0
        assert not masks.live_taps(weight, Pattern(n, m)).any()
        weight[0, 0, 0, 3], weight[0, n, 0, 2] = 0.0, 1.0
        expected = [[False, False, True, False, False]]
        assert masks.live_taps(weight, Pattern(n, m)).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_nan_is_kept_and_breaks_no_count(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 8, 3, 3, dtype=dtype)
    weight[0, 1] = math.nan
    weight[1] = math.nan
    for pattern in (Pattern(1, 4), Pattern(2, 4)):
        mask = masks.nm_mask(weight, pattern)
        assert mask[0, 1].all()
        assert (mask.unflatten(1, (2, 4)).sum(2) == pattern.n).all()
        assert masks.unstructured_mask(weight, pattern).sum() == pattern.kept(weight.numel())


@pytest.mark.parametrize("n", [1, 2, 199])
def test_groups_may_be_longer_than_a_byte_can_count(n: int) -> None:
    weight = torch.randn(2, 450, 2).round(decimals=1)
    assert torch.equal(masks.nm_mask(weight, Pattern(n, 200)), equation_3(weight, n, 200))


def test_a_count_does_not_overflow_with_many_filters() -> None:
    assert masks.spatial_sparsity(torch.zeros(70_000, 1, 2)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_layer_of_usual_size(pattern: Pattern) -> None:
    weight = torch.randn(128, 64, 3, 3)
    grouped = weight.abs().unflatten(1, (-1, pattern.m))
    order = grouped.sort(dim=2, descending=True, stable=True).indices
    mask = torch.zeros_like(grouped, dtype=torch.bool).scatter_(2, order[:, :, : pattern.n], True)
    assert torch.equal(masks.nm_mask(weight, pattern), mask.view(weight.shape))


@pytest.mark.parametrize("function", [masks.nm_mask, masks.unstructured_mask, masks.live_taps])
@pytest.mark.parametrize(
    "weight",
    [torch.zeros(()), torch.zeros(8), torch.zeros(8, 8, dtype=torch.int32)],
    ids=["0-D", "1-D", "int"],
)
def test_what_is_no_weight_is_refused(function: Callable[..., Tensor], weight: Tensor) -> None:
    with pytest.raises(PatternError, match=r"floating-point weight .* found torch\.\w+ of shape"):
        function(weight, Pattern(2, 4))


def spre(weight: Tensor) -> tuple[Tensor, Tensor]:
    nm = masks.nm_mask(weight, Pattern(2, 4))
    return masks.spre_mask(nm, masks.live_taps(weight, Pattern(2, 4))), nm


def test_autograd_records_nothing() -> None:
    weight = torch.randn(4, 8, 3, 3, requires_grad=True)
    for mask in (*spre(weight), masks.unstructured_mask(weight, Pattern(2, 4))):
        assert not mask.requires_grad
    assert torch.randn(4, 8, 3, 3).mul(spre(weight)[0]).grad_fn is None


def test_compiled_once_for_all_values() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(spre, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for weight in (
            torch.randn(8, 10, 3, 3),
            torch.zeros(8, 10, 3, 3),
            -torch.ones(8, 10, 3, 3),
        ):
            assert all(map(torch.equal, compiled(weight), spre(weight)))


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_cuda_gives_the_same_masks_without_a_sync(pattern: Pattern) -> None:
    weight = torch.randn(64, 70, 3, 3).round(decimals=1)
    on_device = weight.cuda()
    functions = (masks.nm_mask, masks.unstructured_mask, masks.live_taps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [function(on_device, pattern) for function in functions]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for function, mask in zip(functions, found, strict=True):
        assert torch.equal(mask.cpu(), function(weight, pattern))
