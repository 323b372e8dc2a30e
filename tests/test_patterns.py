"""Patterns: what is read, what is refused, and the exact number of weights kept."""

import math
import pickle
from dataclasses import FrozenInstanceError
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spre_fx.errors import PatternError
from spre_fx.patterns import Pattern


def patterns(largest: int = 64) -> st.SearchStrategy[Pattern]:
    """Any N:M with M up to `largest`."""
    return st.integers(2, largest).flatmap(
        lambda m: st.builds(Pattern, st.integers(1, m - 1), st.just(m))
    )


@pytest.mark.parametrize(
    ("text", "n", "m"),
    [
        ("2:4", 2, 4),
        ("1:4", 1, 4),
        ("1:8", 1, 8),
        ("1:16", 1, 16),
        ("4:8", 4, 8),
        ("15:16", 15, 16),
    ],
)
def test_parse_reads_n_and_m(text: str, n: int, m: int) -> None:
    pattern = Pattern.parse(text)
    assert (pattern.n, pattern.m) == (n, m)
    assert str(pattern) == text


def test_a_flat_pattern_is_read_back_and_another_pattern() -> None:
    flat = Pattern(1, 4, flat=True)
    assert str(flat) == "1:4 flat"
    assert Pattern.parse("1:4 flat") == flat != Pattern(1, 4)
    assert (flat.density, flat.kept(9)) == (0.25, 3)
    assert pickle.loads(pickle.dumps(flat)) == flat


@pytest.mark.parametrize("text", ["1:4flat", "1:4 Flat", "1:4 flat flat", "flat"])
def test_flat_in_other_words_is_refused(text: str) -> None:
    with pytest.raises(PatternError, match="is not an N:M pattern"):
        Pattern.parse(text)


def test_parse_ignores_space_around_the_text() -> None:
    assert Pattern.parse(" 2:4\n") == Pattern(2, 4)


def test_parse_returns_a_pattern_as_it_is() -> None:
    pattern = Pattern(1, 8)
    assert Pattern.parse(pattern) is pattern


@given(patterns())
def test_parse_reads_what_str_writes(pattern: Pattern) -> None:
    assert Pattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    "text",
    ["abc", "", "2", "2:", ":4", "2:4:8", "2/4", "-1:4", "+1:4", "1.5:4", "2 :4", 24, None, b"2:4"],
)
def test_what_is_not_two_numbers_is_refused_and_quoted(text: object) -> None:
    with pytest.raises(PatternError) as refusal:
        Pattern.parse(text)
    assert str(refusal.value) == (
        f"{text!r} is not an N:M pattern: expected a string such as '2:4' or '1:16'."
    )


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "0:0", "1:1", "16:1"])
def test_n_outside_1_to_m_is_refused_with_the_way_to_a_dense_layer(text: str) -> None:
    with pytest.raises(PatternError) as refusal:
        Pattern.parse(text)
    message = str(refusal.value)
    assert message.startswith(f"{text} is not an N:M pattern: expected 1 <= N < M")
    assert "None in `overrides`" in message


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 4)])
def test_the_constructor_refuses_what_parse_refuses(n: int, m: int) -> None:
    with pytest.raises(PatternError, match=rf"^{n}:{m} is not an N:M pattern"):
        Pattern(n, m)


def test_a_pattern_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="4:2"):
        Pattern.parse("4:2")


@given(patterns())
def test_density_is_the_nearest_float_to_n_over_m(pattern: Pattern) -> None:
    assert pattern.density == float(Fraction(pattern.n, pattern.m))


@given(patterns(), st.integers(0, 2**62))
def test_kept_is_the_exact_ceiling_beyond_what_floats_can_hold(
    pattern: Pattern, numel: int
) -> None:
    assert pattern.kept(numel) == math.ceil(Fraction(numel * pattern.n, pattern.m))


@pytest.mark.parametrize(
    ("text", "numel", "kept"),
    [("2:4", 0, 0), ("2:4", 1, 1), ("2:4", 8, 4), ("1:3", 9, 3), ("1:3", 10, 4), ("1:16", 17, 2)],
)
def test_kept_of_small_layers(text: str, numel: int, kept: int) -> None:
    assert Pattern.parse(text).kept(numel) == kept


def test_kept_is_right_where_floating_point_is_not() -> None:
    numel = 3 * 2**53 + 3  # numel / 3 is no float64
    assert Pattern(1, 3).kept(numel) == 2**53 + 1
    assert math.ceil(numel / 3) != 2**53 + 1


@given(patterns(), patterns())
def test_patterns_are_ordered_by_n_then_m(a: Pattern, b: Pattern) -> None:
    assert (a < b) == ((a.n, a.m) < (b.n, b.m))
    assert (a == b) == ((a.n, a.m) == (b.n, b.m))


def test_equal_patterns_are_one_key() -> None:
    assert {Pattern(2, 4): "a", Pattern.parse("2:4"): "b"} == {Pattern(2, 4): "b"}


def test_patterns_are_frozen_and_survive_pickling() -> None:
    pattern = Pattern(1, 4)
    with pytest.raises(FrozenInstanceError):
        pattern.n = 2  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(pattern)) == pattern
