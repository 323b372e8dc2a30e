"""Selections: ties, masks, rows."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from spre_fx.selection import grow, rows_of, shrink, top, unrows


def bools(text: str) -> torch.Tensor:
    return torch.tensor([[mark == "1" for mark in text]])


def test_the_largest_with_ties_to_the_lower_index():
    values = torch.tensor([[1.0, 2.0, 2.0, 0.0], [0.0, 0.0, -1.0, 0.0]])
    assert top(values, 1).tolist() == [[False, True, False, False], [True, False, False, False]]
    assert top(values, 0).sum() == 0
    assert top(values, 4).all()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.data())
def test_as_sorting_by_value_then_index(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(values)))
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    found = top(torch.tensor([values], dtype=torch.float32), count)[0].nonzero()[:, 0].tolist()
    assert found == sorted(order)


def test_shrinking_stays_inside_and_growing_outside():
    mask, values = bools("0110"), torch.tensor([[9.0, 1.0, 2.0, 0.0]])
    assert torch.equal(shrink(mask, values, 1), bools("0010"))
    assert torch.equal(shrink(mask, values, 3), mask)
    assert torch.equal(grow(mask, values, 1), bools("1110"))
    assert torch.equal(grow(mask, values, 0), mask)


def test_zero_gradients_grow_all_the_same():
    assert grow(bools("0110"), torch.zeros(1, 4), 2).all()


def test_rows_of_a_weight():
    weight = torch.arange(2 * 3 * 4.0).view(2, 3, 2, 2)
    assert rows_of(weight, None).shape == (1, 24)
    spatial = rows_of(weight, "spatial")
    assert torch.equal(spatial[1], weight[:, :, 0, 1].flatten())
    equal = rows_of(weight, "equal")
    assert torch.equal(equal, weight.reshape(2, 2, 2, 3).flatten(2).flatten(0, 1))
    assert torch.equal(equal[0], torch.arange(6.0))
    for rule in (None, "spatial", "equal"):
        assert torch.equal(unrows(rows_of(weight, rule), weight.shape, rule), weight)
    assert rows_of(torch.zeros(5, 4), "spatial").shape == (1, 20)
