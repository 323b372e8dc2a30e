"""Counts and ratios: how they are rounded, summed and shown."""

from fractions import Fraction

from spre_fx.cost_report import Amount, Cost, SiteCost, times, total


def site(train: int | None, test: int) -> SiteCost:
    amount = Amount(dense_train=16, train=train, dense_test=8, test=test)
    return SiteCost("a", "1:8", (2, 4), None, 1, amount, amount)


def test_ratios_round_halves_up_as_the_paper_does():
    assert [times(Fraction(1, n)) for n in (8, 16, 3)] == ["0.13x", "0.06x", "0.33x"]
    assert times(None) == "-"


def test_a_total_has_no_training_figure_where_a_layer_has_none():
    assert total([site(12, 1), site(8, 3)]).flops == Amount(32, 20, 16, 4)
    assert total([site(12, 1), site(None, 3)]).flops == Amount(32, None, 16, 4)


def test_no_layers_have_no_ratio():
    nothing = total([]).parameters
    assert (nothing.train_ratio, nothing.test_ratio) == (None, None)


def test_counts_are_shown_with_a_unit():
    amount = Amount(3_000_000, 2_250_000, 1_000_000, 125_000)
    sites = (SiteCost("a", "1:8", (2, 4), (4, 9), 1, amount, amount),)
    text = Cost(sites, total(sites), total(sites)).text()
    assert all(word in text for word in ("1 M", "0.75x", "0.13x", "4/9", "2x4"))
