"""Programs: which steps go to the engine in one call, what feeds them, and where operands lie."""

from collections.abc import Callable

import pytest
import torch
from test_plan_memory import After, X, program
from test_planned_graph import graph_of
from torch import Tensor
from torch.nn import functional as F

from spre_fx import engine
from spre_fx.planned import ARENA, Call, Native, PlannedProgram

pytestmark = pytest.mark.skipif(engine.load() is None, reason="needs the engine")


def built(then: Callable[[Tensor], object]) -> PlannedProgram:
    found = program(graph_of(After(then)), X)
    assert found is not None
    return found


def test_neighbouring_steps_are_one_call() -> None:
    found = built(lambda x: F.max_pool2d(torch.cumsum(F.max_pool2d(x, 1), 2), 1))
    first, torchs, last = found.items
    assert isinstance(first, Native)
    assert isinstance(torchs, Call)
    assert isinstance(last, Native)
    assert (len(first.steps), len(last.steps)) == (2, 1)
    assert [node.name for node in first.feeds] == ["x"]
    assert [node.name for node in last.feeds] == ["cumsum"]
    assert [node.name for node in torchs.views] == ["max_pool2d"]
    assert found.plan.engine_calls == 2


def test_steps_read_where_others_wrote() -> None:
    (native,) = built(lambda x: F.max_pool2d(F.avg_pool2d(x, 1), 1)).items
    assert isinstance(native, Native)
    conv, average, pool = native.steps
    (feed,) = native.feeds.values()
    assert (conv.x, conv.x_offset, conv.x_stride) == (feed.buffer, 0, 8)
    for before, after in ((conv, average), (average, pool)):
        assert (after.x, after.x_offset, after.x_stride) == (
            *(before.y, before.y_offset, before.y_stride),
        )
    assert (conv.y, average.y) == (ARENA, ARENA)
    assert pool.y == 1  # the first that leaves


def test_a_concatenation_is_read_as_one_value() -> None:
    (native,) = built(lambda x: F.max_pool2d(torch.cat([x, F.avg_pool2d(x, 1)], 1), 1)).items
    assert isinstance(native, Native)
    conv, average, pool = native.steps
    assert (conv.y_stride, average.y_stride, pool.x_stride) == (16, 16, 16)
    assert average.x_stride == 16
    assert average.y_offset == conv.y_offset + 8 * 4
    assert (pool.x_offset, pool.channels) == (conv.y_offset, 16)


def test_a_residual_is_read_where_the_sum_is_written() -> None:
    (native,) = built(lambda x: F.max_pool2d(F.avg_pool2d(x, 1) + x, 1)).items
    assert isinstance(native, Native)
    add = native.steps[2]
    assert (add.residual, add.residual_offset) == (add.y, add.y_offset)


def test_packed_weights_are_read_where_they_lie() -> None:
    gm = graph_of(After(torch.relu))
    found = program(gm, X)
    assert found is not None
    addresses = {tensor.data_ptr() for tensor in found.keep}
    (weight,) = (tensor for name, tensor in gm.named_buffers() if name.endswith("packed"))
    assert (weight.data_ptr() in addresses) == (weight.data_ptr() % 64 == 0)
    assert addresses <= set(found.buffers)


def test_a_value_that_leaves_under_two_names_is_one_tensor() -> None:
    found = built(lambda x: (y := F.adaptive_avg_pool2d(x, 1), y.flatten(1)))
    assert len(found.outputs) == 1
    image, row = found([X])
    assert (image.shape, row.shape) == ((2, 8, 1, 1), (2, 8))
    assert image.data_ptr() == row.data_ptr()
