import itertools

import pytest
import torch

from spre_fx import ChannelPermutation, OptionError, masks
from spre_fx.patterns import Pattern
from spre_fx.permutation import Consumer, best_order


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices on a busy machine take many times longer with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def heavy_tailed(channels: int, rows: int, seed: int, power: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(channels, rows, generator=generator, dtype=torch.float64).abs() ** power


def kept(magnitude: torch.Tensor, pattern: Pattern) -> float:
    weight = magnitude.T.contiguous()
    return float((weight * masks.nm_mask(weight, pattern)).sum())


def order_of(magnitude: torch.Tensor, pattern: Pattern, **options: object) -> torch.Tensor:
    consumer = Consumer(magnitude, pattern, torch.arange(len(magnitude)))
    return best_order([consumer], ChannelPermutation(**options))


def groupings(channels: list[int], sizes: list[int]) -> list[list[int]]:
    """Every way of dealing channels into groups, as orders; equal groups in one order only."""
    if not sizes:
        return [[]]
    first = itertools.combinations(channels, sizes[0])
    if len(sizes) > 1 and all(size == sizes[0] for size in sizes):
        first = (group for group in first if group[0] == channels[0])
    return [
        [*group, *rest]
        for group in first
        for rest in groupings([c for c in channels if c not in group], sizes[1:])
    ]


CASES = [
    *[("2:4", 8, [4, 4], seed) for seed in range(20)],
    *[("1:4", 8, [4, 4], seed) for seed in range(10)],
    *[("2:4", 10, [4, 4, 2], seed) for seed in range(3)],
    *[("1:3", 8, [3, 3, 2], seed) for seed in range(5)],
    *[("1:2", 6, [2, 2, 2], seed) for seed in range(5)],
    *[("3:5", 7, [5, 2], seed) for seed in range(5)],
]


@pytest.mark.parametrize(("text", "channels", "sizes", "seed"), CASES)
def test_finds_what_exhaustive_search_finds(text, channels, sizes, seed):
    pattern, magnitude = Pattern.parse(text), heavy_tailed(channels, 12, seed)
    best = max(kept(magnitude[o], pattern) for o in groupings(list(range(channels)), sizes))
    found = kept(magnitude[order_of(magnitude, pattern)], pattern)
    assert found == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("text", ["2:4", "1:4", "1:8", "1:16", "3:5", "4:8"])
@pytest.mark.parametrize("channels", [32, 37])
def test_is_an_order_and_keeps_more(text, channels):
    pattern, magnitude = Pattern.parse(text), heavy_tailed(channels, 40, seed=0)
    order = order_of(magnitude, pattern, sweeps=20)
    assert sorted(order.tolist()) == list(range(channels))
    assert kept(magnitude[order], pattern) > kept(magnitude, pattern)


def test_more_sweeps_never_keep_less():
    magnitude, pattern = heavy_tailed(64, 40, seed=0), Pattern(2, 4)
    found = [
        kept(magnitude[order_of(magnitude, pattern, sweeps=sweeps)], pattern)
        for sweeps in (1, 2, 5, 20, 80)
    ]
    assert found == sorted(found)


def test_the_seed_decides():
    magnitude, pattern = heavy_tailed(64, 40, seed=0), Pattern(2, 4)
    orders = [order_of(magnitude, pattern, seed=seed).tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_does_not_depend_on_or_advance_the_global_generator():
    magnitude, pattern = heavy_tailed(16, 10, seed=0), Pattern(2, 4)
    before = torch.random.get_rng_state()
    first = order_of(magnitude, pattern)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(9)
    assert torch.equal(order_of(magnitude, pattern), first)


@pytest.mark.parametrize("magnitude", [torch.zeros(8, 5), torch.ones(8, 5), torch.eye(8) * 0.0])
def test_leaves_an_order_that_nothing_betters(magnitude):
    assert order_of(magnitude, Pattern(2, 4)).tolist() == list(range(8))


def test_a_perfect_order_is_found():
    """Channels that are never large in the same rows belong into one group: nothing is lost."""
    blocks = torch.block_diag(*[torch.ones(1, 3, dtype=torch.float64)] * 4)
    magnitude = blocks.repeat_interleave(4, 0)  # four like channels in every group: 1:4 loses most
    order = order_of(magnitude, Pattern(1, 4))
    assert kept(magnitude[order], Pattern(1, 4)) == float(magnitude.sum())


def test_one_order_serves_layers_of_different_patterns():
    magnitudes = [heavy_tailed(16, 12, seed) for seed in range(3)]
    patterns = [Pattern(2, 4), Pattern(1, 8), Pattern(1, 3)]
    consumers = [
        Consumer(magnitude, pattern, torch.arange(16))
        for magnitude, pattern in zip(magnitudes, patterns, strict=True)
    ]
    order = best_order(consumers, ChannelPermutation())
    before = sum(map(kept, magnitudes, patterns))
    assert sum(map(kept, [m[order] for m in magnitudes], patterns)) > before


def test_slots_are_filled_and_other_channels_stay():
    magnitude, pattern = heavy_tailed(12, 30, seed=0), Pattern(2, 4)
    slots = torch.tensor([1, 2, 3, 6, 7, 9])
    order = best_order([Consumer(magnitude, pattern, slots)], ChannelPermutation())
    after = magnitude.clone()
    after[slots] = magnitude[slots[order]]
    best = max(
        kept(magnitude.index_copy(0, slots, magnitude[slots[list(p)]]), pattern)
        for p in itertools.permutations(range(6))
    )
    assert kept(after, pattern) == pytest.approx(best, rel=1e-12)


def test_padding_in_one_layer_and_a_channel_that_stays_in_another():
    pattern, slots = Pattern(1, 4), torch.arange(7)
    padded, full = heavy_tailed(7, 9, seed=3), heavy_tailed(8, 9, seed=4)
    order = best_order([Consumer(m, pattern, slots) for m in (padded, full)], ChannelPermutation())
    before = kept(padded, pattern) + kept(full, pattern)
    after = kept(padded[order], pattern) + kept(torch.cat([full[order], full[7:]]), pattern)
    assert sorted(order.tolist()) == slots.tolist()
    assert after > before


def test_a_time_limit_ends_the_search_early():
    magnitude = heavy_tailed(64, 40, seed=0)
    consumer = Consumer(magnitude, Pattern(2, 4), torch.arange(64))
    order = best_order([consumer], ChannelPermutation(sweeps=10**6), seconds=0.2)
    assert kept(magnitude[order], Pattern(2, 4)) > kept(magnitude, Pattern(2, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sweeps": 0}, r"ChannelPermutation\(sweeps=0\): expected sweeps >= 1"),
        ({"seconds": 0}, r"ChannelPermutation\(seconds=0\): expected seconds > 0, or None"),
        ({"seconds": float("nan")}, r"seconds=nan\): expected seconds > 0, or None"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        ChannelPermutation(**options)
