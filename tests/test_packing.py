"""Packing: any N:M weight comes back bit for bit, and what was not packed is refused in words."""

from math import ceil, log2, prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spre_fx import Pattern, PatternError, masks
from spre_fx.packing import Packed, index_bits, pack, packed_sizes, unpack

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def sparse(shape: tuple[int, ...], pattern: Pattern, dtype: torch.dtype = torch.float32) -> Tensor:
    weight = torch.randn(shape).to(dtype)
    return torch.where(masks.nm_mask(weight, pattern), weight, torch.zeros_like(weight))


def there_and_back(weight: Tensor, pattern: Pattern) -> Tensor:
    packed = pack(weight, pattern)
    assert packed is not None
    return unpack(packed, tuple(weight.shape), pattern)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "1:8", "2:8", "1:16", "3:7", "5:32"])
@pytest.mark.parametrize("shape", [(6, 35, 3, 3), (5, 64), (4, 33, 7), (2, 40, 1, 3, 2)])
def test_round_trip_is_exact_and_as_small_as_promised(shape, pattern, dtype):
    pattern = Pattern.parse(pattern)
    weight = sparse(shape, pattern, dtype)
    packed = pack(weight, pattern)
    assert torch.equal(bits(unpack(packed, shape, pattern)), bits(weight))
    groups = shape[0] * prod(shape[2:]) * ceil(shape[1] / pattern.m)
    assert packed.values.dtype == dtype
    assert packed.values.numel() == groups * pattern.n
    assert packed.indices.numel() == ceil(groups * pattern.n * ceil(log2(pattern.m)) / 8)
    assert packed_sizes(shape, pattern) == (packed.values.numel(), packed.indices.numel())


@pytest.mark.parametrize(
    ("m", "expected"), [(2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (16, 4), (33, 6)]
)
def test_a_position_takes_the_bits_that_m_needs(m, expected):
    assert index_bits(Pattern(1, m)) == expected == ceil(log2(m))


@given(
    n=st.integers(1, 4),
    extra=st.integers(4, 40),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 90), st.integers(1, 3)),
    dtype=st.sampled_from(FLOATS),
    data=st.data(),
)
def test_any_pattern_any_type_any_bits(n, extra, shape, dtype, data):
    """Random bits, NaNs of every kind and -0.0 among them, in groups with N or fewer values."""
    pattern = Pattern(n, n + extra)
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(integers)
    raw = torch.randint(info.min, info.max, shape, dtype=torch.int64).to(integers)
    keep = masks.nm_mask(torch.rand(shape), pattern) & (torch.rand(shape) < 0.7)
    weight = torch.where(keep, raw, torch.zeros_like(raw)).view(dtype)
    packed = pack(weight, pattern)
    dense = weight.numel() * weight.itemsize
    values, indices = packed_sizes(weight.shape, pattern)
    if values * weight.itemsize + indices >= dense:
        assert packed is None
    else:
        assert torch.equal(bits(unpack(packed, shape, pattern)), bits(weight))


def test_negative_zeros_and_nan_payloads_survive():
    raw = torch.zeros(2, 16, dtype=torch.int32)
    raw[0, 3], raw[0, 4] = -(2**31), 0x7FC12345  # -0.0, a quiet NaN with a payload
    raw[1, 0], raw[1, 15] = 0x7F800001, 1  # a signalling NaN, the smallest denormal
    weight = raw.view(torch.float32)
    assert torch.equal(there_and_back(weight, Pattern(1, 4)).view(torch.int32), raw)


def test_a_group_with_more_than_n_negative_zeros_does_not_fit():
    weight = torch.zeros(1, 8)
    weight[0, :2] = -0.0
    assert pack(weight, Pattern(1, 4)) is None


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.int64]
)
def test_other_types_pack_as_well(dtype):
    weight = torch.zeros(3, 32, dtype=torch.uint8)
    weight[:, ::8] = 1
    weight = weight.view(dtype) if dtype.itemsize == 1 else weight.to(dtype)
    assert torch.equal(bits(there_and_back(weight, Pattern(1, 8))), bits(weight))


def test_strides_do_not_matter():
    weight = sparse((8, 32, 3, 3), Pattern(1, 16)).to(memory_format=torch.channels_last)
    back = there_and_back(weight, Pattern(1, 16))
    assert torch.equal(back, weight)
    assert back.is_contiguous()


@pytest.mark.parametrize(
    ("weight", "pattern"),
    [
        (torch.ones(4, 8), "2:4"),  # dense
        (torch.zeros(4), "2:4"),  # a vector
        (torch.zeros(4, 8, dtype=torch.complex128), "2:4"),  # 16 bytes an element
        (torch.zeros(4, 32), "31:32"),  # would be larger than it is
        (torch.zeros(4, 1), "2:4"),  # padding would make it larger
        (torch.zeros(2, 512), Pattern(1, 257)),  # beyond the largest M
    ],
)
def test_what_does_not_fit_is_left_dense(weight, pattern):
    assert pack(weight, Pattern.parse(pattern)) is None


def test_the_wrong_sizes_are_refused_before_anything_is_allocated():
    packed = pack(sparse((4, 32), Pattern(1, 16)), Pattern(1, 16))
    with pytest.raises(PatternError, match=r"expected 62500000000000000 values .* found 8 values"):
        unpack(packed, (10**9, 10**9), Pattern(1, 16))
    with pytest.raises(
        PatternError, match=r"expected 16 values and 6 bytes .* found 8 values and 4"
    ):
        unpack(packed, (4, 32), Pattern(1, 8))
    wrong = Packed(packed.values, packed.indices.int())
    with pytest.raises(PatternError, match=r"found 8 values and 4 of torch\.int32"):
        unpack(wrong, (4, 32), Pattern(1, 16))
    with pytest.raises(PatternError, match=r"two or more axes and M <= 256, .*pattern 1:1000000"):
        unpack(packed, (4, 32), Pattern(1, 10**6))


def test_positions_outside_a_group_are_refused():
    packed = pack(sparse((2, 10), Pattern(1, 5)), Pattern(1, 5))
    with pytest.raises(PatternError, match=r"positions below M=5, found position 7"):
        unpack(
            Packed(packed.values, torch.full((2,), 255, dtype=torch.uint8)), (2, 10), Pattern(1, 5)
        )
    weight = torch.zeros(1, 9)
    weight[0, 8] = 1.0
    packed = pack(weight, Pattern(1, 8))
    padding = Packed(packed.values, torch.tensor([0b000111_00], dtype=torch.uint8))
    with pytest.raises(
        PatternError, match=r"no values beyond channel 9, found some in the padding"
    ):
        unpack(padding, (1, 9), Pattern(1, 8))


def test_an_empty_weight_has_nothing_to_pack():
    assert pack(torch.zeros(0, 8), Pattern(1, 4)) is None
