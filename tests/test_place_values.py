"""Which values share memory: concatenations, sums over their residuals, and those that must not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_divide_work import Then, divided
from torch import Tensor
from torch.nn import functional as F

from spre_fx import engine
from spre_fx.passes.place_values import Place, Placement, place_values
from spre_fx.planned import ARENA

pytestmark = pytest.mark.skipif(engine.load() is None, reason="needs the engine")


def placed(then: Then) -> tuple[Placement, dict[str, Place]]:
    """Where the values lie of a conv of 8 channels, 2 images of 6x6, and what follows it."""
    placement = place_values(*divided(then))
    return placement, {node.name: place for node, place in placement.places.items()}


def copies(placement: Placement) -> int:
    return sum(item.copied_to is not None for item in placement.items)


def pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


BYTES = 2 * 8 * 6 * 6 * 4


def test_operands_of_a_concatenation_lie_side_by_side() -> None:
    placement, places = placed(lambda x: pool(torch.cat([x, pool(x)], 1)))
    conv, second, whole = places["conv"], places["max_pool2d"], places["cat"]
    assert conv.root is second.root is whole.root
    assert (conv.channel, second.channel, whole.channel) == (0, 8, 0)
    assert second.offset == conv.offset + 8 * 4
    assert whole.root.stride == 16
    assert copies(placement) == 0


def test_an_operand_of_two_concatenations_lies_in_one_of_them() -> None:
    placement, places = placed(
        lambda x: pool(torch.cat([x, F.avg_pool2d(torch.cat([x, pool(x)], 1), 1)], 1))
    )
    assert places["cat"].root is not places["cat_1"].root
    assert places["conv"].root is places["cat_1"].root
    assert copies(placement) == 1


def test_a_prefix_of_a_larger_concatenation_is_no_copy() -> None:
    def features(x: Tensor) -> Tensor:
        y = pool(x)
        z = F.avg_pool2d(torch.cat([x, y], 1), 1)
        return pool(torch.cat([x, y, z], 1))

    placement, places = placed(features)
    assert places["cat"].root is places["cat_1"].root
    assert places["avg_pool2d"].channel == 16
    assert copies(placement) == 0


COPIED: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "an operand twice": (lambda x: pool(torch.cat([x, x], 1)), 2),
    "an operand that leaves": (lambda x: (pool(torch.cat([x, y := pool(x)], 1)), y), 1),
    "an operand that torch makes": (lambda x: pool(torch.cat([x, torch.cumsum(x, 2)], 1)), 1),
    "an operand that torch writes": (lambda x: (torch.cat([x, y := pool(x)], 1), y.mul_(2))[0], 1),
}


@pytest.mark.parametrize(("then", "count"), COPIED.values(), ids=COPIED)
def test_what_cannot_lie_there_is_copied(then: Callable[[Tensor], Any], count: int) -> None:
    placement, _ = placed(then)
    assert copies(placement) == count


def test_a_sum_lies_where_its_residual_did() -> None:
    placement, places = placed(lambda x: pool(F.avg_pool2d(x, 1) + x))
    assert places["add"].root is places["conv"].root
    assert placement.arena == 2 * BYTES


def test_a_residual_that_lives_on_is_not_written_over() -> None:
    _, places = placed(lambda x: (pool(F.avg_pool2d(x, 1) + x), x))
    assert places["add"].root is not places["conv"].root
    _, places = placed(lambda x: pool((y := F.avg_pool2d(x, 1)) + x) + y + pool(x))
    assert places["add"].root is not places["conv"].root
    assert places["add"].root is not places["avg_pool2d"].root


def test_what_leaves_has_buffers_of_its_own() -> None:
    placement, places = placed(lambda x: (y := pool(x), pool(y), pool(x)))
    assert placement.leaving == 3
    buffers = {places[name].root.buffer for name in ("max_pool2d", "max_pool2d_1", "max_pool2d_2")}
    assert buffers == {1, 2, 3}
    assert places["conv"].root.buffer == ARENA
    assert placement.arena == BYTES


def test_a_chain_takes_the_memory_of_two() -> None:
    def chain(x: Tensor) -> Tensor:
        for _ in range(6):
            x = pool(x)
        return x

    placement, _ = placed(chain)
    assert placement.arena == 2 * BYTES
