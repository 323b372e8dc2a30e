"""Filters for Winograd's filtering: of which layers, made of what, and with how much memory."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spre_fx import ModelError, OptionError, Pattern, masks
from spre_fx.engine import Kind
from spre_fx.packed_layers import PackedConv2d
from spre_fx.weight_layout import pack, pack_winograd
from spre_fx.winograd_filters import transform_packed, winograd_refusal


def sparse(conv: nn.Conv2d, pattern: str = "1:4") -> nn.Conv2d:
    kept = masks.nm_mask(conv.weight, Pattern.parse(pattern))
    conv.weight = nn.Parameter(torch.where(kept, conv.weight, 0.0).detach())
    return conv.requires_grad_(False)


class Storages(TorchDispatchMode):
    """Notes the bytes of each piece of memory that operations return tensors in."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[Tensor] = []  # so that no memory is used again
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Do as told, and look at what comes of it."""
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor):
                self.alive.append(each)
                self.sizes[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
        return made


@pytest.mark.parametrize("way", [{}, {"planar": True}, {"quartered": True}], ids=str)
@pytest.mark.parametrize("side", [2, 4])
@pytest.mark.parametrize("shape", [(20, 35, 3, 3), (48, 16, 3, 3)])
def test_packed_weights_are_transformed_like_dense_ones(shape, side, way):
    weight = sparse(nn.Conv2d(shape[1], shape[0], 3), "2:4").weight
    filters = transform_packed(pack(weight, **way), shape, side)
    assert filters.is_contiguous()
    assert torch.equal(filters, pack_winograd(weight, side))


def test_nothing_but_the_filters_themselves_is_large():
    shape = (16 * 64, 32, 3, 3)
    packed = pack(sparse(nn.Conv2d(32, 16 * 64, 3), "2:4").weight)
    with Storages() as storages:
        filters = transform_packed(packed, shape, 4)
    known = {packed.data_ptr(), filters.data_ptr()}
    others = [size for place, size in storages.sizes.items() if place not in known]
    assert max(others) <= 4 * filters.nbytes / 64  # in float64, and twice the size before a sum


@pytest.mark.parametrize("side", [2, 4])
def test_layers_that_plans_compute_by_winograds_filtering(side):
    conv = sparse(nn.Conv2d(20, 12, 3, padding=1))
    packed = PackedConv2d.from_dense(conv, winograd=side)
    x = torch.randn(2, 20, 7, 9)
    torch.testing.assert_close(packed(x), conv(x), rtol=0, atol=1e-5)
    assert f"winograd={side}" in str(packed)
    assert packed.state_dict().keys() == {"packed", "bias"}
    assert torch.equal(packed.dense_weight(), conv.weight)
    step = packed.step(x)
    assert (step.kind, step.winograd) == (Kind.WINOGRAD_CONV, side)
    assert torch.equal(packed.step_weight(), pack_winograd(conv.weight, side))


def test_transformed_filters_follow_the_weight():
    first, second = (sparse(nn.Conv2d(20, 12, 3)) for _ in range(2))
    packed = PackedConv2d.from_dense(first, winograd=4)
    before = packed.step_weight()
    assert packed.step_weight() is before
    assert PackedConv2d.from_dense(first).step_weight().dtype == torch.int32
    packed.load_state_dict(PackedConv2d.from_dense(second).state_dict())
    assert torch.equal(packed.step_weight(), pack_winograd(second.weight, 4))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(packed)))
    assert torch.equal(copied.step_weight(), packed.step_weight())
    for conv in (first, second) * 5:  # memory of one may become that of the next
        packed.packed = None
        packed.packed = PackedConv2d.from_dense(conv).packed
        assert torch.equal(packed.step_weight(), pack_winograd(conv.weight, 4))


def test_no_filters_are_made_of_a_weight_that_may_change_unseen():
    packed = PackedConv2d.from_dense(sparse(nn.Conv2d(20, 12, 3)), winograd=4)
    with torch.inference_mode():
        packed.packed = packed.packed.clone()
    assert packed.step_weight() is packed.packed
    assert packed.step(torch.randn(1, 20, 5, 5)).kind == Kind.SPARSE_CONV


@pytest.mark.parametrize(
    ("conv", "found"),
    [
        (nn.Conv2d(16, 8, 1), r"found torch.float32 with \(1, 1\) in 1"),
        (nn.Conv2d(16, 8, 3).bfloat16(), r"found torch.bfloat16 with \(3, 3\) in 1"),
        (nn.Conv2d(16, 8, 3, groups=2), r"found torch.float32 with \(3, 3\) in 2"),
        (nn.Conv2d(16, 8, 3, stride=2), r"found \(2, 2\) and \(1, 1\)"),
        (nn.Conv2d(16, 8, 3, dilation=(1, 2)), r"found \(1, 1\) and \(1, 2\)"),
    ],
)
def test_what_winograds_filtering_cannot_compute_is_refused(conv, found):
    assert winograd_refusal(conv) is not None
    with pytest.raises(ModelError, match=f"Winograd's filtering cannot .*{found}"):
        PackedConv2d.from_dense(conv, winograd=2)


@pytest.mark.parametrize("side", [1, 3, -1])
def test_tiles_of_another_side_are_refused(side):
    with pytest.raises(OptionError, match=f"expected winograd to be 0, 2 or 4, found {side}"):
        PackedConv2d.from_dense(nn.Conv2d(16, 8, 3), winograd=side)
