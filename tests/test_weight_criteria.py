"""Scores of weights over time, by hand."""

import pytest
import torch

import spre_fx


def test_the_running_mean_is_that_of_the_magnitudes():
    criterion = spre_fx.RunningMean(decay=0.75)
    memory = criterion.start(torch.tensor([-4.0, 1.0]))
    memory = criterion.advance(memory, torch.tensor([0.0, -5.0]))
    assert memory.tolist() == [3.0, 2.0]
    assert criterion.scores(memory, torch.tensor([9.0, 9.0])).tolist() == [3.0, 2.0]


def test_the_change_is_counted_from_the_first_weights():
    criterion = spre_fx.Change()
    first = torch.tensor([1.0, -2.0])
    memory = criterion.start(first)
    first.zero_()  # the weights go on; what is remembered does not
    memory = criterion.advance(memory, torch.tensor([7.0, 7.0]))
    assert criterion.scores(memory, torch.tensor([3.0, -2.0])).tolist() == [2.0, 0.0]


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(spre_fx.OptionError, match="expected 0 <= decay < 1"):
        spre_fx.RunningMean(decay)
