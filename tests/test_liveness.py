"""Offsets by liveness: nothing that is alive at one time overlaps, and memory is used again."""

from hypothesis import given
from hypothesis import strategies as st

from spre_fx.liveness import ALIGNMENT, Lifetime, assign_offsets

LIFETIMES = st.lists(
    st.builds(
        lambda size, first, length: Lifetime(size, first, first + length),
        st.integers(1, 5000),
        st.integers(0, 20),
        st.integers(0, 8),
    ),
    max_size=25,
)


@given(LIFETIMES)
def test_what_is_alive_at_one_time_never_overlaps(lifetimes: list[Lifetime]) -> None:
    offsets, peak = assign_offsets(lifetimes)
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    ranges = [(o, o + e.size) for o, e in zip(offsets, lifetimes, strict=True)]
    assert all(stop <= peak for _, stop in ranges)
    for i, one in enumerate(lifetimes):
        for j, other in enumerate(lifetimes[:i]):
            if one.meets(other):
                assert ranges[i][1] <= ranges[j][0] or ranges[j][1] <= ranges[i][0]


@given(LIFETIMES)
def test_no_more_than_all_of_them_and_no_less_than_those_of_any_step(
    lifetimes: list[Lifetime],
) -> None:
    _, peak = assign_offsets(lifetimes)
    assert peak <= sum(-(-each.size // ALIGNMENT) * ALIGNMENT for each in lifetimes)
    for step in range(30):
        assert peak >= sum(e.size for e in lifetimes if e.first <= step <= e.last)


@given(LIFETIMES)
def test_the_same_every_time(lifetimes: list[Lifetime]) -> None:
    assert assign_offsets(lifetimes) == assign_offsets(list(lifetimes))


def test_a_chain_needs_its_two_largest_neighbours() -> None:
    chain = [Lifetime(640, step, step + 1) for step in range(50)]
    assert assign_offsets(chain)[1] == 2 * 640


def test_the_smallest_gap_that_fits_is_taken() -> None:
    lifetimes = [
        Lifetime(1024, 0, 9),  # 0
        Lifetime(512, 0, 0),  # 1024, free from step 1
        Lifetime(500, 0, 9),  # 1536
        Lifetime(192, 0, 0),  # 2048, free from step 1
        Lifetime(191, 0, 9),  # 2240
        Lifetime(128, 1, 9),
    ]
    offsets, _ = assign_offsets(lifetimes)
    assert offsets == [0, 1024, 1536, 2048, 2240, 2048]


def test_nothing_needs_nothing() -> None:
    assert assign_offsets([]) == ([], 0)
