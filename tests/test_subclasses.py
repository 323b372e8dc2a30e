"""Subclasses of torch's layers: which compute what their base does, and who listens to them."""

import pytest
import torch
from models import Renamed, Standardised, double, shift
from torch import nn

from spre_fx.subclasses import carry_hooks, has_hooks, own_method, plain_base

KINDS = (nn.Conv1d, nn.Conv2d, nn.Linear)


class OwnState(nn.Conv2d):
    def _save_to_state_dict(self, *args: object) -> None:
        super()._save_to_state_dict(*args)


class OwnCall(nn.Conv2d):
    def __call__(self, x: object) -> object:
        return super().__call__(x)


def with_a_forward_of_its_own() -> nn.Module:
    conv = nn.Conv2d(8, 8, 1)
    conv.forward = lambda x: x
    return conv


@pytest.mark.parametrize(
    ("module", "method"),
    [
        (nn.Conv2d(8, 8, 1), None),
        (Renamed(8, 8, 1), None),
        (Standardised(8, 8, 1), "forward"),
        (OwnCall(8, 8, 1), "__call__"),
        (with_a_forward_of_its_own(), "forward"),
        (OwnState(8, 8, 1), None),
    ],
)
def test_the_first_method_that_may_compute_something_else(
    module: nn.Module, method: str | None
) -> None:
    assert own_method(module, nn.Conv2d) == method
    assert plain_base(module, KINDS) is (nn.Conv2d if method is None else None)


def test_methods_that_keep_the_state_count_where_the_class_is_to_change() -> None:
    assert own_method(OwnState(8, 8, 1), nn.Conv2d, state=True) == "_save_to_state_dict"
    assert plain_base(OwnState(8, 8, 1), KINDS, state=True) is None
    assert plain_base(nn.ReLU(), KINDS) is None


def test_hooks_are_seen_and_copied() -> None:
    conv, other = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    assert not has_hooks(conv)
    conv.register_forward_hook(double)
    conv.register_forward_pre_hook(shift)
    assert has_hooks(conv)
    carry_hooks(conv, other)
    x = torch.randn(2, 8, 3, 3)
    other.load_state_dict(conv.state_dict())
    assert torch.equal(other(x), conv(x))
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        listened = nn.Conv2d(8, 8, 1)
        getattr(listened, register)(lambda *_: None)
        assert has_hooks(listened)
