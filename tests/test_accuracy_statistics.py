"""benchmarks/accuracy/seed_statistics.py: numbers by hand, against scipy, and what must hold."""

import importlib
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

FOLDER = Path(__file__).parent.parent / "benchmarks" / "accuracy"
points = st.floats(-100, 100, allow_subnormal=False).map(lambda value: round(value, 4))
arms = st.dictionaries(st.integers(0, 40), points, min_size=1, max_size=15)
pairs = st.dictionaries(st.integers(0, 40), st.tuples(points, points), min_size=2, max_size=15)
probabilities = st.lists(st.floats(0, 1), max_size=12)


@pytest.fixture(scope="module", name="statistics")
def _statistics():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module("seed_statistics")


def by_arm(drawn):
    """Two arms from seed -> (value, value)."""
    return tuple({seed: both[side] for seed, both in drawn.items()} for side in (0, 1))


def test_an_estimate_by_hand(statistics):
    estimate = statistics.Estimate.of([2, 4, 4, 6])
    assert (estimate.n, estimate.mean) == (4, 4)
    assert estimate.standard_error == pytest.approx(math.sqrt(8 / 3) / 2)
    half = 3.182446305284263 * math.sqrt(2 / 3)  # the table's t for 3 degrees of freedom, 97.5 %
    assert estimate.interval == pytest.approx((4 - half, 4 + half))


def test_one_seed_has_a_mean_and_nothing_else(statistics):
    estimate = statistics.Estimate.of([61.5])
    assert (estimate.n, estimate.mean) == (1, 61.5)
    assert estimate.standard_error is None
    assert estimate.interval is None
    assert estimate.p is None
    assert estimate.seeds_for(0.5) is None


def test_no_seed_is_no_estimate(statistics):
    with pytest.raises(ValueError, match="expected the values of one seed or more, found none"):
        statistics.Estimate.of([])


def test_p_of_a_difference_by_hand(statistics):
    arm, other = {1: 3.0, 2: 5.0, 3: 7.0}, {1: 2.0, 2: 3.0, 3: 4.0}
    difference = statistics.PairedDifference.of(arm, other)
    assert difference.by_seed == {1: 1, 2: 2, 3: 3}
    t = 2 / (1 / math.sqrt(3))
    # Student's distribution with 2 degrees of freedom has a closed form.
    assert difference.estimate.p == pytest.approx(1 - t / math.sqrt(2 + t**2))


@given(pairs)
def test_it_is_scipys_paired_t_test(statistics, drawn):
    arm, other = by_arm(drawn)
    estimate = statistics.PairedDifference.of(arm, other).estimate
    assume(estimate.standard_error > 1e-3)  # below, scipy warns of lost digits
    theirs = stats.ttest_rel(list(arm.values()), list(other.values()))
    assert estimate.p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-12)
    assert estimate.interval == pytest.approx(tuple(theirs.confidence_interval(0.95)), abs=1e-6)


def test_differences_that_are_all_the_same(statistics):
    same = statistics.Estimate.of([0.0, 0.0, 0.0])
    assert (same.standard_error, same.interval, same.p) == (0, (0, 0), 1)
    shifted = statistics.Estimate.of([0.5, 0.5])
    assert (shifted.standard_error, shifted.interval, shifted.p) == (0, (0.5, 0.5), 0)


def test_unpaired_seeds_are_left_out_and_named(statistics):
    arm, other = {1: 1.0, 2: 2.0, 9: 100.0}, {2: 1.5, 1: 2.0, 7: -100.0, 5: 3.0}
    difference = statistics.PairedDifference.of(arm, other)
    assert difference.by_seed == {1: -1, 2: 0.5}
    assert difference.unpaired == (5, 7, 9)
    assert difference.wins == 1


def test_without_a_pair_there_is_no_estimate(statistics):
    difference = statistics.PairedDifference.of({1: 1.0}, {2: 1.0})
    assert difference.estimate is None
    assert difference.wins == 0
    assert difference.unpaired == (1, 2)


def test_a_tie_is_no_win(statistics):
    difference = statistics.PairedDifference.of({1: 1.0, 2: 2.0, 3: 1}, {1: 1.0, 2: 1.0, 3: 2.0})
    assert difference.wins == 1


def test_seeds_for_a_standard_error(statistics):
    estimate = statistics.Estimate(n=4, mean=1.0, standard_error=1.0)  # a deviation of 2
    assert estimate.seeds_for(0.5) == 16
    assert estimate.seeds_for(0.51) == 16
    assert estimate.seeds_for(0.49) == 17
    assert estimate.seeds_for(1.0) == 4
    assert estimate.seeds_for(50.0) == 2  # one has no standard error
    with pytest.raises(ValueError, match=r"expected a standard error above 0, found 0"):
        estimate.seeds_for(0)


def test_the_interval_covers_the_true_difference(statistics):
    """Where a seed moves both arms much more than they differ, as it does in training."""
    random = np.random.default_rng(0)
    true, experiments, seeds = 1.2, 4000, 10
    shared = random.normal(60, 5, (experiments, seeds))
    arm = shared + true + random.normal(0, 1.5, shared.shape)
    other = shared + random.normal(0, 0.7, shared.shape)
    covered = 0
    for one, two in zip(arm.tolist(), other.tolist(), strict=True):
        difference = statistics.PairedDifference.of(dict(enumerate(one)), dict(enumerate(two)))
        low, high = difference.estimate.interval
        covered += low <= true <= high
    assert 0.93 < covered / experiments < 0.97


@given(pairs, st.randoms(use_true_random=False))
def test_the_order_of_the_seeds_does_not_matter(statistics, drawn, random):
    shuffled = list(drawn.items())
    random.shuffle(shuffled)
    first = statistics.PairedDifference.of(*by_arm(drawn))
    second = statistics.PairedDifference.of(*by_arm(dict(shuffled)))
    assert first == second
    assert list(first.by_seed) == list(second.by_seed)
    assert first.estimate == second.estimate


@given(arms, arms)
def test_arms_exchanged_mirror_the_difference(statistics, arm, other):
    there = statistics.PairedDifference.of(arm, other)
    back = statistics.PairedDifference.of(other, arm)
    assert there.unpaired == back.unpaired
    assert there.wins + back.wins <= len(there.by_seed)
    if there.estimate is not None:
        assert there.estimate.mean == -back.estimate.mean
        assert there.estimate.p == back.estimate.p
    if there.estimate is not None and there.estimate.interval is not None:
        assert there.estimate.interval == tuple(-side for side in reversed(back.estimate.interval))


@given(pairs)
def test_p_is_below_five_percent_where_the_interval_excludes_zero(statistics, drawn):
    estimate = statistics.PairedDifference.of(*by_arm(drawn)).estimate
    low, high = estimate.interval
    assert low <= estimate.mean <= high
    assume(abs(estimate.p - 0.05) > 1e-9)
    assert (estimate.p < 0.05) == (low > 0 or high < 0)


def test_holm_by_hand(statistics):
    # Sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, 0.04 * 1, and none below the one before it.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.5]) == [1, 1]
    assert statistics.holm([0.04]) == [0.04]
    assert statistics.holm([]) == []


@given(probabilities)
def test_holm_lies_between_no_correction_and_bonferronis(statistics, ps):
    corrected = statistics.holm(ps)
    for p, found in zip(ps, corrected, strict=True):
        assert p <= found <= min(1, len(ps) * p)
    for (p, found), (q, other) in itertools.combinations(zip(ps, corrected, strict=True), 2):
        assert p != q or found == other
        assert p >= q or found <= other
        assert p <= q or found >= other


@given(probabilities, st.floats(0.001, 0.5))
def test_holm_rejects_what_the_step_down_procedure_rejects(statistics, ps, level):
    """The procedure as it is defined: stop at the first p that is too large for its rank."""
    ranked = sorted(range(len(ps)), key=ps.__getitem__)
    tests = [ps[index] * (len(ps) - rank) < level for rank, index in enumerate(ranked)]
    accepted = tests.index(False) if False in tests else len(tests)
    corrected = statistics.holm(ps)
    assert {i for i, p in enumerate(corrected) if p < level} == set(ranked[:accepted])
