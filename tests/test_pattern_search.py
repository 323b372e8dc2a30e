"""The pattern a weight was made for is found, and what chance gives is none."""

import pytest
import torch
from torch import Tensor

from spre_fx import Pattern, masks
from spre_fx.pattern_search import LIMIT, chance, largest_count, obeyed_patterns


def sparse(pattern: str, shape: tuple[int, ...] = (32, 64, 3, 3)) -> Tensor:
    weight = torch.randn(shape)
    return weight * masks.nm_mask(weight, Pattern.parse(pattern))


@pytest.mark.parametrize("shape", [(32, 64, 3, 3), (40, 96), (16, 100, 5)])
@pytest.mark.parametrize(
    "pattern",
    ["2:4", "1:4", "1:8", "1:16", "1:2", "2:8", "4:8", "3:8", "2:16", "3:16", "1:32", "5:32"],
)
def test_the_first_that_is_no_chance_is_the_one_it_was_made_for(pattern, shape):
    found = obeyed_patterns(sparse(pattern, shape))
    assert next(str(each.pattern) for each in found if each.chance <= LIMIT) == pattern


@pytest.mark.parametrize("density", [0.5, 0.1, 0.01])
def test_unstructured_zeros_are_chance(density):
    weight = torch.randn(64, 64, 3, 3) * (torch.rand(64, 64, 3, 3) < density)
    assert all(each.chance > LIMIT for each in obeyed_patterns(weight))


def test_all_zeros_and_no_zeros():
    assert {each.chance for each in obeyed_patterns(torch.zeros(8, 32))} == {1.0}
    assert obeyed_patterns(torch.ones(8, 32)) == []


def test_a_tiny_weight_may_be_chance():
    weight = sparse("2:4", (2, 4))
    assert weight.count_nonzero() == 4
    assert chance(weight, Pattern(2, 4)) == pytest.approx((11 / 16) ** 2)


def test_groups_larger_than_the_channels_are_not_tried():
    found = obeyed_patterns(sparse("1:4", (64, 4, 3, 3)))
    assert [str(each.pattern) for each in found] == ["1:4", "1:2"]


def test_a_dead_channel_makes_no_odd_pattern():
    weight = sparse("2:4", (64, 16, 3, 3))
    weight[:, 0] = 0
    assert str(obeyed_patterns(weight)[0].pattern) == "2:4"


def test_largest_count_knows_the_last_partial_group():
    weight = torch.zeros(2, 11, 2)
    weight[1, 8:, 1] = 1
    assert largest_count(weight, 4) == 3
    assert largest_count(weight[:, :4], 8) == 0
