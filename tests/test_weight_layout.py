"""The engine's weight layouts: what they look like, and that weights come back bit for bit."""

from collections import Counter
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spre_fx import ModelError, Pattern, masks
from spre_fx.weight_layout import (
    layout,
    pack,
    pack_bias,
    pack_dense,
    pack_depthwise,
    pack_winograd,
    padded_outputs,
    unpack,
    unpack_bias,
    weight_dtype,
)

PATTERNS = ("1:2", "2:4", "1:4", "1:8", "1:16", "8:16", "1:32", "2:32", "3:5", None)
FLOATS = (torch.float32, torch.bfloat16)


def nm_weight(shape: tuple[int, ...], pattern: str | None, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(shape).to(dtype)
    if pattern is None:
        return weight
    kept = masks.nm_mask(weight, Pattern.parse(pattern))
    return torch.where(kept, weight, torch.zeros_like(weight))


def layout_of(packed: Tensor, weight: Tensor, groups: int = 1) -> tuple[int, int, int]:
    found = layout(tuple(packed.shape), tuple(weight.shape), groups, weight.dtype)
    assert found.planar is (packed.ndim == 6)
    return found[:3]


def entries(packed: Tensor) -> dict[tuple[int, ...], list[tuple[int, int]]]:
    """(group, output, channel group, tap): its (channel, value bits), read as engine.h says."""
    pairs = packed.shape[7] // 16
    quartered = packed.shape[4] == 4
    slots = packed.flatten(4, 5).movedim(5, -1)
    where = (slots[..., 0] != 0).nonzero()
    found: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for place, (value, channel) in zip(where.tolist(), slots[tuple(where.T)].tolist(), strict=True):
        group, block, cut, tap, _, lane = place
        key = (group, block * 16 + lane // pairs, cut, tap)
        found.setdefault(key, []).append((of_bytes(channel) if quartered else channel, value))
    return found


def of_bytes(places: int) -> int:
    first, *others = places.to_bytes(4, "little")
    assert others == [first + 1, first + 2, first + 3]
    return first // 4


def planar_entries(packed: Tensor) -> dict[tuple[int, ...], list[tuple[int, int]]]:
    """The same of a planar weight."""
    found: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for *key, slot in (packed[..., 0] != 0).nonzero().tolist():
        value, channel = packed[(*key, slot)].tolist()
        found.setdefault(tuple(key), []).append((channel, value))
    return found


def parts_are_apart(packed: Tensor) -> bool:
    parts = packed.shape[4]
    values, channels = packed.movedim(4, 0).unbind(6)
    if parts == 4:
        channels = (channels & 0xFF) // 4
    part = torch.arange(parts).view(-1, *[1] * (values.ndim - 1))
    return bool(((channels // (16 // parts) == part) | (values == 0)).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((20, 35, 3, 3), 1), ((16, 64, 1, 1), 1), ((6, 5, 1, 3), 2), ((51, 40, 2, 1), 3)],
)
def test_round_trip_is_exact(shape, groups, pattern, dtype):
    weight = nm_weight(shape, pattern, dtype)
    packed = pack(weight, groups)
    back = unpack(packed, shape, groups)
    assert back.dtype == weight_dtype(packed.dtype) == dtype
    assert back.is_contiguous()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(back.view(bits), weight.view(bits))
    if dtype == torch.float32:
        for way in ("planar", "quartered"):
            back = unpack(pack(weight, groups, **{way: True}), shape, groups)
            assert back.is_contiguous()
            assert torch.equal(back.view(bits), weight.view(bits))


@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (40, 70, 3, 3))),
    groups=st.integers(1, 3),
    density=st.floats(0, 1),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**32),
)
def test_the_layout_is_that_of_engine_h(sizes, groups, density, dtype, seed):
    outputs, channels, *kernel = sizes
    torch.manual_seed(seed)
    shape = (outputs * groups, channels, *kernel)
    weight = torch.randn(shape).to(dtype).where(torch.rand(shape) < density, 0.0)
    packed = pack(weight, groups)
    assert torch.equal(unpack(packed, shape, groups), weight)
    slots, size, parts = layout_of(packed, weight, groups)
    taps, lanes = kernel[0] * kernel[1], 16 if dtype == torch.float32 else 32
    expected = (groups, ceil(outputs / 16), ceil(channels / size), taps, parts, slots // parts)
    assert packed.shape == (*expected, 2, lanes)
    assert packed.is_contiguous()
    assert parts == 1 or parts_are_apart(packed)
    bits = weight.view(packed.dtype).flatten(2)
    values = bits.tolist()

    def read_in(size: int) -> dict[tuple[int, ...], list[tuple[int, int]]]:
        found: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for output, channel, tap in bits.nonzero().tolist():
            group, inside = divmod(output, outputs)
            key = (group, inside, channel // size, tap)
            found.setdefault(key, []).append((channel % size, values[output][channel][tap]))
        return found

    by_hand, by_16 = read_in(size), read_in(16)
    assert entries(packed) == by_hand
    if dtype == torch.float32:
        planar = pack(weight, groups, planar=True)
        assert planar.shape == (groups, outputs, ceil(channels / size), taps, slots, 2)
        assert planar.is_contiguous()
        assert layout_of(planar, weight, groups) == (slots, size, 1)
        assert planar_entries(planar) == by_hand
        quartered = pack(weight, groups, quartered=True)
        *_, parts = layout_of(quartered, weight, groups)
        fullest = (
            max(Counter(quarters).values(), default=1)
            for quarters in (
                [(*key, channel // 4) for key, entry in by_16.items() for channel, _ in entry],
                [key for key, entry in by_16.items() for _ in entry],
            )
        )
        most_4, most_16 = fullest
        assert (parts == 4) is (most_16 == 4 * most_4)
        assert parts == 1 or parts_are_apart(quartered)
        assert entries(quartered) == (by_16 if parts == 4 else by_hand)
    assert slots == max(1, *(ceil(len(entry) * 16 / lanes) for entry in by_hand.values()), 0)


@pytest.mark.parametrize(
    ("pattern", "dtype", "channel_group", "slots", "parts"),
    [
        ("1:2", torch.float32, 16, 8, 2),
        ("2:4", torch.float32, 16, 8, 2),
        ("1:8", torch.float32, 16, 2, 2),
        ("1:16", torch.float32, 16, 1, 1),
        ("1:32", torch.float32, 32, 1, 1),
        (None, torch.float32, 16, 16, 2),
        ("1:2", torch.bfloat16, 32, 8, 1),
        ("1:16", torch.bfloat16, 32, 1, 1),
        ("1:32", torch.bfloat16, 32, 1, 1),
    ],
)
def test_as_few_slots_as_the_pattern_needs(pattern, dtype, channel_group, slots, parts):
    weight = nm_weight((32, 128, 1, 1), pattern, dtype)
    assert layout_of(pack(weight), weight) == (slots, channel_group, parts)
    in_fours = dtype == torch.float32 and pattern in ("1:2", "2:4", None)
    quartered = (slots, channel_group, 4 if in_fours else parts)
    assert layout_of(pack(weight, quartered=True), weight) == quartered


def test_free_slots_hold_value_0_and_channel_0():
    weight = torch.zeros(2, 16, 1, 1)
    weight[0, [3, 9]] = 1.0
    weight[1, 5] = 2.0
    packed = pack(weight)
    one, two = (int(torch.tensor(value).view(torch.int32)) for value in (1.0, 2.0))
    assert packed[0, 0, 0, 0, ..., :3].flatten(0, 1).tolist() == [
        [[one, two, 0], [3, 5, 0]],
        [[one, 0, 0], [9, 0, 0]],
    ]


def test_free_slots_of_quarters_hold_value_0_and_channel_0():
    weight = torch.zeros(2, 16, 1, 1)
    weight[0, [2, 3, 12]] = 1.0
    weight[1, 0::4] = weight[1, 1::4] = 2.0
    (values, places) = pack(weight, quartered=True)[0, 0, 0, 0, ..., 0].unbind(-1)
    one = int(torch.tensor(1.0).view(torch.int32))
    assert values.tolist() == [[one, one], [0, 0], [0, 0], [one, 0]]
    named = [[0x0B0A0908, 0x0F0E0D0C], [0x03020100] * 2, [0x03020100] * 2, [0x33323130, 0x03020100]]
    assert places.tolist() == named


def test_zeros_of_either_sign_take_no_slot():
    weight = torch.full((4, 32, 1, 1), -0.0)
    weight[:, 7] = torch.nan
    packed = pack(weight)
    assert layout_of(packed, weight) == (1, 32, 1)
    back = unpack(packed, (4, 32, 1, 1))
    assert back[:, 7].isnan().all()
    assert back.view(torch.int32).count_nonzero() == 4


def test_a_weight_without_non_zeros_keeps_one_free_slot():
    weight = torch.zeros(4, 32, 3, 3)
    assert layout_of(pack(weight), weight) == (1, 32, 1)


def test_strides_do_not_matter():
    weight = nm_weight((16, 32, 3, 3), "2:4", torch.float32)
    assert torch.equal(pack(weight.to(memory_format=torch.channels_last)), pack(weight))


def test_planar_weights_are_of_float32():
    with pytest.raises(ModelError, match=r"a weight of float32, found torch\.bfloat16"):
        pack(torch.zeros(4, 16, 1, 1, dtype=torch.bfloat16), planar=True)


@pytest.mark.parametrize("shape", [(1, 4, 1, 9, 1, 2), (1, 5, 2, 9, 1, 2), (1, 5, 1, 9, 0, 2)])
def test_a_planar_tensor_of_another_weight_is_refused(shape):
    with pytest.raises(ModelError, match=r"expected a packed weight of shape \(1, 5, 1, 9, ."):
        unpack(torch.zeros(shape, dtype=torch.int32), (5, 16, 3, 3))


def test_other_types_are_refused():
    with pytest.raises(ModelError, match=r"expected .* float32 or bfloat16, found torch\.float16"):
        pack(torch.zeros(4, 16, 1, 1, dtype=torch.float16))


def test_a_packed_tensor_of_another_weight_is_refused():
    packed = pack(torch.ones(16, 32, 3, 3))
    with pytest.raises(
        ModelError, match=r"expected a packed weight of shape \(1, 2, .*found \(1, 1"
    ):
        unpack(packed, (32, 32, 3, 3))


@pytest.mark.parametrize(("dtype", "pairs"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_dense_weights(dtype, pairs):
    weight = torch.randn(20, 3, 5, 3, dtype=dtype)
    packed = pack_dense(weight)
    assert packed.shape == (2, 5, 9 if pairs == 1 else 5, 16, pairs)
    for output, channel, u, v in [(0, 0, 0, 0), (17, 2, 4, 2), (19, 1, 2, 0), (15, 2, 0, 1)]:
        number, pair = divmod(v * 3 + channel, pairs)
        found = packed[output // 16, u, number, output % 16, pair]
        assert found == weight[output, channel, u, v]
    assert packed[1, :, :, 4:].count_nonzero() == 0
    assert packed.count_nonzero() == weight.count_nonzero()


@pytest.mark.parametrize("side", [2, 4])
def test_filters_transformed_for_winograd(side):
    weight = torch.randn(20, 3, 3, 3)
    packed = pack_winograd(weight, side)
    assert packed.shape == (2, side + 2, side + 2, 3, 16)
    assert packed.dtype == torch.float32
    assert packed.is_contiguous()
    assert packed[1, :, :, :, 4:].count_nonzero() == 0
    # The points 0 and infinity are rows of their own, which only read the taps at the corners.
    for output, channel in ((0, 0), (17, 2)):
        filters = packed[output // 16, :, :, channel, output % 16]
        corners = weight[output, channel, ::2, ::2]
        assert torch.equal(filters[:: side + 1, :: side + 1], corners)


def test_depthwise_weights():
    weight = torch.randn(20, 1, 3, 2).bfloat16()
    packed = pack_depthwise(weight)
    assert packed.dtype == torch.bfloat16
    assert packed.is_contiguous()
    assert torch.equal(packed[:, :20].t().reshape(weight.shape), weight)
    assert packed.shape == (6, 32)
    assert packed[:, 20:].count_nonzero() == 0


def test_biases_are_padded_group_by_group():
    bias = torch.randn(36).bfloat16()
    packed = pack_bias(bias, groups=2)
    assert packed.dtype == torch.float32
    assert packed.shape == (padded_outputs(36, 2),) == (64,)
    assert torch.equal(packed.view(2, 32)[:, :18].flatten(), bias.float())
    assert packed.view(2, 32)[:, 18:].count_nonzero() == 0
    assert torch.equal(unpack_bias(packed, 36, groups=2), bias.float())
    assert pack_bias(None) is None
