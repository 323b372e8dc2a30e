"""2:4 values and metadata: equal to torch's own, and back to the bit; the sizes libraries ask."""

import itertools

import pytest
import torch
from torch.sparse import (
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from spre_fx.errors import PatternError
from spre_fx.masks import nm_mask
from spre_fx.patterns import Pattern
from spre_fx.semi_structured import (
    SHAPE_RULES,
    TwoFour,
    compress,
    decompress,
    filter_matrix,
    filters,
    is_two_four,
    padded_shape,
)

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(1, 8), Pattern(1, 16)]
HALVES = [torch.float16, torch.bfloat16]


def sparse(shape, pattern, dtype=torch.float16):
    weight = torch.randn(shape)
    return (weight * nm_mask(weight, pattern)).to(dtype)


def bits(tensor):
    return tensor.view(torch.int16)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", [(32, 64), (64, 128), (96, 64), (160, 576)], ids=str)
def test_values_and_metadata_are_those_of_torch(shape, pattern, dtype):
    matrix = sparse(shape, pattern, dtype)
    found = compress(matrix)
    values, metadata = sparse_semi_structured_from_dense_cutlass(matrix)
    assert torch.equal(found.values, values)
    assert torch.equal(found.metadata, metadata)
    assert torch.equal(
        sparse_semi_structured_to_dense_cutlass(found.values, found.metadata), matrix
    )


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
@pytest.mark.parametrize("pattern", [*PATTERNS, Pattern(2, 8), Pattern(1, 3)], ids=str)
@pytest.mark.parametrize("shape", [(32, 32), (64, 96), (96, 160)], ids=str)
def test_what_was_compressed_comes_back(shape, pattern, dtype):
    matrix = sparse(shape, pattern, dtype)
    assert torch.equal(decompress(compress(matrix)), matrix)


def test_every_group_with_two_or_fewer_comes_back_to_the_bit():
    special = torch.tensor([1.0, float("nan"), float("inf"), 6e-8, -2.0], dtype=torch.float16)
    groups = [
        [number if position in kept else 0.0 for position in range(4)]
        for number in special.tolist()
        for count in range(3)
        for kept in itertools.combinations(range(4), count)
    ]
    matrix = torch.zeros(32 * 32, dtype=torch.float16)
    flat = torch.tensor(groups, dtype=torch.float16).flatten()
    matrix[: len(flat)] = flat
    matrix = matrix.view(32, 32)
    assert torch.equal(bits(decompress(compress(matrix))), bits(matrix))


def test_a_negative_zero_is_a_zero():
    matrix = torch.full((32, 32), -0.0, dtype=torch.float16)
    matrix[:, ::4] = 3.0
    assert torch.equal(decompress(compress(matrix)), matrix)


def test_three_in_a_group_are_refused_by_row_and_column():
    matrix = torch.zeros(64, 64, dtype=torch.float16)
    matrix[37, 20:23] = 1.0
    assert not is_two_four(matrix)
    with pytest.raises(PatternError, match="found 3 in columns 20 to 23 of row 37"):
        compress(matrix)


@pytest.mark.parametrize("shape", [(31, 64), (32, 48), (32,), (2, 32, 32)], ids=str)
def test_a_matrix_that_fills_no_tiles_is_refused(shape):
    with pytest.raises(PatternError, match="multiples of 32 rows and 32 columns"):
        compress(torch.zeros(shape))


def test_metadata_of_another_matrix_is_refused():
    good = compress(torch.zeros(32, 64, dtype=torch.float16))
    with pytest.raises(PatternError, match=r"metadata of shape \(32, 4\)"):
        decompress(TwoFour(good.values, good.metadata[:, :2]))
    with pytest.raises(PatternError, match="int32"):
        decompress(TwoFour(good.values, good.metadata.int()))
    with pytest.raises(PatternError, match="ascending positions"):
        decompress(TwoFour(good.values, torch.zeros_like(good.metadata)))


def test_the_rules_are_no_laxer_than_those_torch_checks():
    classes = {
        "cusparselt": SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": SparseSemiStructuredTensorCUTLASS,
    }
    for library, rules in SHAPE_RULES.items():
        for dtype, rule in rules.items():
            theirs = classes[library]._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert rule.rows == theirs.sparse_min_rows
            assert rule.columns == theirs.sparse_min_cols
            assert rule.dense == theirs.dense_min_rows == theirs.dense_min_cols


@pytest.mark.parametrize(
    ("library", "shape", "expected"),
    [
        ("cusparselt", (64, 64), (64, 64)),
        ("cusparselt", (1, 1), (32, 32)),
        ("cusparselt", (1000, 96), (1024, 96)),
        ("cutlass", (64, 96), (64, 128)),
        ("cutlass", (33, 65), (64, 128)),
    ],
)
def test_sizes_are_padded_to_the_next_multiple(library, shape, expected):
    assert padded_shape(library, torch.bfloat16, shape) == expected


@pytest.mark.parametrize("library", SHAPE_RULES)
def test_types_and_sizes_without_a_rule_are_refused_in_words(library):
    assert "found torch.float32" in padded_shape(library, torch.float32, (64, 64))
    assert "found shape (0, 64)" in padded_shape(library, torch.float16, (0, 64))


@pytest.mark.parametrize("shape", [(8, 8), (6, 5, 3), (4, 6, 3, 3), (4, 16, 1, 1), (2, 4, 5, 1)])
def test_filters_are_rows_tap_by_tap(shape):
    weight = torch.randn(shape)
    matrix = filter_matrix(weight)
    channels = -(-shape[1] // 4) * 4
    assert matrix.shape == (shape[0], weight[0, 0].numel() * channels)
    assert torch.equal(filters(matrix, shape), weight)
    taps = weight.view(*shape[:2], -1)
    assert torch.equal(matrix[:, : shape[1]], taps[:, :, 0])
    if taps.shape[2] > 1:
        assert torch.equal(matrix[:, channels : channels + shape[1]], taps[:, :, 1])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("channels", [6, 8, 18, 32])
def test_filters_of_the_papers_patterns_are_two_four(pattern, channels):
    weight = sparse((8, channels, 3, 3), pattern)
    assert is_two_four(filter_matrix(weight))


def test_other_patterns_are_two_four_if_their_zeros_are():
    assert not is_two_four(sparse((8, 32), Pattern(3, 4)))
    assert is_two_four(sparse((8, 32), Pattern(1, 2)))
    assert not is_two_four(torch.ones(1, 3))
