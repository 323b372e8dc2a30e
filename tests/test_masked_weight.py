"""B * W and its gradients: by operators in eager mode, as torch computes them."""

import itertools

import pytest
import torch
from torch import Tensor

from spre_fx.masked_weight import StraightThroughDecay, masked_weight

SHAPES = [(6, 8, 3, 3), (6, 8, 1), (2, 4, 2, 3, 1), (5, 8)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    weight = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
    return weight, torch.rand(shape) < 0.5


def gradient(masked: Tensor, weight: Tensor, upstream: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(masked, weight, upstream, create_graph=False)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_they_are_what_torch_computes_to_the_bit(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight, mask = draw(shape, dtype)
    upstream, plain = torch.randn_like(weight), weight.detach()
    ordinary, straight = masked_weight(weight, mask), StraightThroughDecay.apply(weight, mask, 0.3)
    assert torch.equal(ordinary, plain * mask)
    assert torch.equal(straight, plain * mask)
    assert torch.equal(gradient(ordinary, weight, upstream), upstream * mask)
    expected = torch.where(mask, upstream, upstream + 0.3 * plain)
    assert torch.equal(gradient(straight, weight, upstream), expected)


def test_a_gradient_of_another_memory_format() -> None:
    weight, mask = draw((6, 8, 3, 3))
    upstream = torch.randn_like(weight).to(memory_format=torch.channels_last)
    found = gradient(StraightThroughDecay.apply(weight, mask, 0.3), weight, upstream)
    assert torch.equal(found, torch.where(mask, upstream, upstream + 0.3 * weight.detach()))


def test_a_decay_that_is_a_tensor() -> None:
    weight, mask = draw((6, 8, 3, 3))
    upstream = torch.randn_like(weight)
    results = [
        gradient(StraightThroughDecay.apply(weight, mask, decay), weight, upstream)
        for decay in (0.5, torch.tensor(0.5))
    ]
    assert torch.equal(*results)


def test_a_mask_of_numbers_has_a_gradient() -> None:
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        weight, mask = draw(shape, dtype)
        numbers = (mask * torch.rand(shape)).to(dtype).requires_grad_()
        upstream, plain = torch.randn_like(weight), weight.detach()
        masked = masked_weight(weight, numbers)
        assert torch.equal(masked, plain * numbers)
        of_weight, of_mask = torch.autograd.grad(masked, (weight, numbers), upstream)
        assert torch.equal(of_weight, numbers * upstream)
        assert torch.equal(of_mask, torch.where(numbers != 0, plain * upstream, 0.0))


@pytest.mark.parametrize("of", ["weight", "mask"])
def test_a_mask_of_numbers_where_only_one_wants_a_gradient(of: str) -> None:
    weight, mask = draw((6, 8))
    operands = {"weight": weight.detach(), "mask": mask.float()}
    wanted = operands[of].requires_grad_()
    masked_weight(operands["weight"], operands["mask"]).sum().backward()
    assert wanted.grad is not None
    assert torch.equal(wanted.grad, mask.float() if of == "weight" else weight * mask)


def test_gradients_have_gradients() -> None:
    weight, mask = draw((3, 4, 2, 2), torch.float64)
    assert torch.autograd.gradgradcheck(masked_weight, (weight, mask))
    numbers = torch.rand_like(weight).add(0.5).requires_grad_()
    assert torch.autograd.gradcheck(masked_weight, (weight, numbers))
    assert torch.autograd.gradgradcheck(masked_weight, (weight, numbers))
    first = StraightThroughDecay.apply(weight, mask, 0.7)
    upstream = torch.randn_like(weight, requires_grad=True)
    (once,) = torch.autograd.grad(first, weight, upstream, create_graph=True)
    twice = torch.autograd.grad(once.sum(), (weight, upstream))
    assert torch.equal(twice[0], 0.7 * (~mask).double())
    assert torch.equal(twice[1], torch.ones_like(weight))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck
def test_operators_keep_the_rules_of_torch_library() -> None:
    weight, mask = draw((4, 6, 3, 3))
    upstream = torch.randn_like(weight, requires_grad=True)
    decay_gradient = torch.ops.spre_fx.decay_gradient.default
    torch.library.opcheck(torch.ops.spre_fx.mask_weight.default, (weight, mask))
    torch.library.opcheck(decay_gradient, (upstream, weight, mask, 0.1))
    product_gradients = torch.ops.spre_fx.product_gradients.default
    torch.library.opcheck(product_gradients, (*torch.randn(3, 4, 6, 3, 3),))
    arguments = (torch.randn(4, 6, 3, 3), weight.detach(), mask, 0.1)
    torch.library.opcheck(torch.ops.spre_fx.decay_gradient.default, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles(backend: str) -> None:
    torch._dynamo.reset()

    def loss(weight: Tensor, mask: Tensor) -> Tensor:
        straight: Tensor = StraightThroughDecay.apply(weight, mask, 0.3)
        numbers = masked_weight(weight, mask.float())
        return (straight + masked_weight(weight, mask) + 2 * numbers).pow(2).sum()

    weight, mask = draw((4, 6, 3, 3))
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    gradients = [torch.autograd.grad(run(weight, mask), weight)[0] for run in (compiled, loss)]
    torch.testing.assert_close(*gradients)
