"""Mask methods: the forward B * W, the gradient each gives to W, and a method of one's own."""

import pickle
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.autograd.gradcheck import GradcheckError

from spre_fx.errors import OptionError
from spre_fx.masked_weight import Product
from spre_fx.methods import ASP, SRSTE, MaskMethod
from spre_fx.modules import make_nm
from spre_fx.patterns import Pattern
from spre_fx.schedules import EveryStep, Freeze

METHODS = [SRSTE(), SRSTE(decay=0.3), ASP()]
SHAPES = [(6, 8, 3, 3), (6, 8, 1), (2, 4, 2, 3, 1), (5, 8)]


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A weight that wants a gradient, and a mask with both values in it."""
    weight = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
    mask = torch.rand(shape) < 0.5
    assert mask.any()
    assert not mask.all()
    return weight, mask


def gradient(method: MaskMethod, weight: Tensor, mask: Tensor, upstream: Tensor) -> Tensor:
    """The gradient W receives when B * W receives `upstream`."""
    (result,) = torch.autograd.grad(method.masked(weight, mask), weight, upstream)
    return result


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_forward_is_mask_times_weight(method: MaskMethod, shape: tuple[int, ...]) -> None:
    weight, mask = draw(shape)
    masked = method.masked(weight, mask)
    assert torch.equal(masked[mask], weight[mask])
    assert masked[~mask].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_short_types_are_kept_forward_and_backward(method: MaskMethod, dtype: torch.dtype) -> None:
    weight, mask = draw((6, 8, 3, 3), dtype)
    assert method.masked(weight, mask).dtype is dtype
    assert gradient(method, weight, mask, torch.ones_like(weight)).dtype is dtype


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("decay", [0.0, 2e-4, 0.7])
def test_sr_ste_passes_the_gradient_and_pulls_removed_weights(
    decay: float, shape: tuple[int, ...]
) -> None:
    weight, mask = draw(shape)
    upstream = torch.randn_like(weight)
    expected = upstream + decay * (~mask).double() * weight.detach()
    found = gradient(SRSTE(decay), weight, mask, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_sr_ste_without_an_upstream_gradient_only_decays_removed_weights() -> None:
    weight, mask = draw((6, 8, 3, 3))
    found = gradient(SRSTE(0.5), weight, mask, torch.zeros_like(weight))
    assert torch.equal(found, torch.where(mask, 0.0, 0.5 * weight.detach()))


def test_sr_ste_is_straight_through_a_whole_loss() -> None:
    weight, mask = draw((6, 8))
    x = torch.randn(3, 8, dtype=torch.float64)
    masked = (weight.detach() * mask).requires_grad_()
    (upstream,) = torch.autograd.grad((x @ masked.T).exp().sum(), masked)
    (found,) = torch.autograd.grad((x @ SRSTE(0.1).masked(weight, mask).T).exp().sum(), weight)
    torch.testing.assert_close(found, upstream + 0.1 * weight.detach() * ~mask, rtol=1e-12, atol=0)


def test_sr_ste_asks_for_no_gradient_of_frozen_weights() -> None:
    weight, mask = draw((6, 8))
    masked = SRSTE(0.5).masked(weight.detach(), mask)
    assert not masked.requires_grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_asp_gives_removed_weights_no_gradient(shape: tuple[int, ...]) -> None:
    weight, mask = draw(shape)
    upstream = torch.randn_like(weight)
    assert torch.equal(gradient(ASP(), weight, mask, upstream), mask * upstream)


def test_asp_passes_gradcheck() -> None:
    weight, mask = draw((3, 4, 2, 2))
    assert torch.autograd.gradcheck(lambda w: ASP().masked(w, mask), (weight,))


def test_sr_ste_is_no_true_gradient_but_where_nothing_is_removed() -> None:
    weight, mask = draw((3, 4, 2, 2))
    method = SRSTE(decay=0.7)
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda w: method.masked(w, mask), (weight,))
    kept = torch.ones_like(mask)
    assert torch.autograd.gradcheck(lambda w: method.masked(w, kept), (weight,))


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_default_mask_keeps_the_largest_magnitudes_of_each_group(method: MaskMethod) -> None:
    weight = torch.tensor([[0.1, -3.0, 2.0, 0.0, 5.0, -4.0, 4.5, 1.0]])
    mask = method.nm_mask(weight, Pattern(2, 4))
    assert mask.dtype is torch.bool
    assert mask.tolist() == [[False, True, True, False, True, False, True, False]]


def test_defaults_from_scratch_and_on_pre_trained_weights() -> None:
    assert SRSTE().decay == 2e-4
    assert (SRSTE.schedule, SRSTE.spre_gamma) == (EveryStep(), 1.0)
    assert (ASP.schedule, ASP.spre_gamma) == (Freeze(at=0), 0.0)
    assert (MaskMethod.schedule, MaskMethod.spre_gamma) == (EveryStep(), 1.0)


def test_a_negative_decay_is_refused() -> None:
    with pytest.raises(OptionError) as refusal:
        SRSTE(decay=-1e-4)
    assert str(refusal.value) == "SRSTE(decay=-0.0001): expected decay >= 0."


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_methods_are_frozen_hashable_and_survive_pickling(method: MaskMethod) -> None:
    with pytest.raises(FrozenInstanceError):
        method.decay = 1.0  # type: ignore[attr-defined]
    copy = pickle.loads(pickle.dumps(method))
    assert copy == method
    assert hash(copy) == hash(method)


def test_methods_are_equal_when_their_options_are() -> None:
    assert SRSTE() == SRSTE(2e-4) != SRSTE(1e-4)
    assert SRSTE() != ASP()


def test_a_method_that_does_not_say_how_it_masks_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="masked"):
        MaskMethod()  # type: ignore[abstract]


@dataclass(frozen=True)
class FirstChannels(MaskMethod):
    """Keeps the first N of each M and passes half the gradient: a method in a few lines."""

    spre_gamma = 0.5
    share: float = 0.5

    def nm_mask(self, weight: Tensor, pattern: Pattern) -> Tensor:
        channel = torch.arange(weight.shape[1]).view(-1, *[1] * (weight.dim() - 2))
        return (channel % pattern.m < pattern.n).expand_as(weight)

    def masked(self, weight: Tensor, mask: Tensor) -> Tensor:
        kept = weight * mask
        return kept.detach() + self.share * (kept - kept.detach())


def test_a_method_of_ones_own_decides_mask_and_gradient_of_a_layer() -> None:
    conv = nn.Conv2d(8, 3, 3, bias=False, dtype=torch.float64)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    weight = conv.weight.detach().clone()
    weight[:, [1, 2, 3, 5, 6, 7]] = 0
    dense: Any = nn.functional.conv2d(x, weight.requires_grad_())
    dense.sum().backward()
    layer = make_nm(conv, Pattern(1, 4), FirstChannels(), keep_masks=False)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, dense)
    assert layer.weight.grad is not None
    expected = 0.5 * weight.grad * (weight != 0)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-12, atol=0)
    assert FirstChannels.spre_gamma == 0.5
    assert FirstChannels.schedule == EveryStep()


@pytest.mark.parametrize("method", [*METHODS, SRSTE(scaler=GradScaler("cpu"))], ids=repr)
def test_a_product_is_what_masked_computes(method: MaskMethod) -> None:
    weight, mask = draw((6, 8, 3, 3))
    upstream, product = torch.randn_like(weight), method.product()
    if product is None:  # the decay is a tensor
        assert method == SRSTE()
        return
    assert torch.equal(product.of(weight, mask), method.masked(weight, mask))
    expected = gradient(method, weight, mask, upstream)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found = product.gradient(upstream.clone(), weight.detach(), mask)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_a_method_that_masks_otherwise_has_not_its_base_classes_product() -> None:
    class Twice(SRSTE):
        def masked(self, weight: Tensor, mask: Tensor) -> Tensor:
            return 2 * super().masked(weight, mask)

    class Renamed(SRSTE):
        pass

    assert Twice().product() is None
    assert Renamed(0.5).product() == SRSTE(0.5).product() == Product(0.5)
