"""conv2d with masked weights: that of torch whatever passes go which way; the rule that says so."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from operator import or_
from random import Random

import pytest
import torch
from masked_convs import LAYOUTS, MaskedConv, assert_close, draw_conv, laid_out
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from spre_fx import engine
from spre_fx.engine import library
from spre_fx.masked_conv import Pass, SparseCompute, masked_conv2d, sparse_passes
from spre_fx.masked_weight import Product
from spre_fx.native_conv import Geometry, kept_by

EVERY = Pass.FORWARD | Pass.INPUT_GRADIENT | Pass.WEIGHT_GRADIENT
COMBINATIONS = [Pass(number) for number in range(int(EVERY) + 1)]
PRODUCTS = [Product(), Product(decay=0.0), Product(decay=0.3)]
LAST = torch.channels_last

pytestmark = pytest.mark.skipif(engine.load() is None, reason="needs the engine")


def draw(seed: int, dtype: torch.dtype = torch.float64) -> MaskedConv:
    """A conv with a bias, whose weights are 0 where the mask is."""
    conv = draw_conv(Random(seed), dtype)
    conv.weight = (conv.weight * conv.mask).contiguous()  # torch refuses some other strides
    conv.bias = torch.randn(len(conv.weight), dtype=dtype)
    return conv


def small(dtype: torch.dtype = torch.float64) -> MaskedConv:
    geometry = Geometry([2, 1], [1, 1], [1, 1], 2)
    x, weight = torch.randn(3, 6, 4, 3, dtype=dtype), torch.randn(4, 3, 3, 3, dtype=dtype)
    mask = torch.rand(weight.shape) < 0.5
    y_gradient = torch.randn(3, 4, 2, 3, dtype=dtype)
    return MaskedConv(x, weight * mask, mask, torch.randn(4, dtype=dtype), y_gradient, geometry)


def most_kept(passes: Pass) -> list[int]:
    """Limits that let some passes leave out what a mask does, whatever it keeps."""
    return [10**9 if each in passes else -1 for each in Pass]


def run(
    conv: MaskedConv, passes: Pass, *operands: Tensor | None, product: Product | None = None
) -> Tensor:
    x, weight, bias = operands
    assert x is not None
    assert weight is not None
    limits = most_kept(passes)
    how = {"geometry": conv.geometry, "most_kept": limits, "product": product}
    return masked_conv2d(x, weight, conv.mask, bias, **how)


def how(product: Product | None) -> tuple[bool, float | None]:
    """A product, as operators are told of it."""
    return product is None, product.decay if product else None


def leaves(conv: MaskedConv, wanted: tuple[bool, ...] = (True,) * 3) -> list[Tensor]:
    """x, weight and bias."""
    operands = (conv.x, conv.weight, conv.bias)
    return [t.detach().requires_grad_(w) for t, w in zip(operands, wanted, strict=True)]


@pytest.mark.parametrize("passes", COMBINATIONS, ids=str)
def test_output_and_gradients_are_those_of_torch(passes: Pass) -> None:
    for seed in range(6):
        conv = draw(seed)
        ours, theirs = leaves(conv), leaves(conv)
        y, expected = run(conv, passes, *ours), F.conv2d(*theirs, *conv.geometry)
        assert_close(y.detach(), expected.detach())
        y.backward(conv.y_gradient)
        expected.backward(conv.y_gradient)
        if passes & Pass.WEIGHT_GRADIENT:
            theirs[1].grad *= conv.mask
        for found, leaf in zip(ours, theirs, strict=True):
            assert_close(found.grad, leaf.grad)


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
@pytest.mark.parametrize("passes", COMBINATIONS, ids=str)
def test_it_makes_the_product_and_its_gradient_itself(passes: Pass, product: Product) -> None:
    if product.decay is not None:
        passes &= ~Pass.WEIGHT_GRADIENT
    for seed, create_graph in itertools.product(range(6), (False, True)):
        conv = draw(seed)
        conv.weight = torch.where(conv.mask, conv.weight, torch.randn_like(conv.weight))
        ours, theirs = leaves(conv), leaves(conv)
        y = run(conv, passes, *ours, product=product)
        x, weight, bias = theirs
        expected = F.conv2d(x, product.of(weight, conv.mask), bias, *conv.geometry)
        assert_close(y.detach(), expected.detach())
        found = torch.autograd.grad(y, ours, conv.y_gradient, create_graph=create_graph)
        for one, other in zip(
            found, torch.autograd.grad(expected, theirs, conv.y_gradient), strict=True
        ):
            assert_close(one.detach(), other)


def test_the_product_is_not_stored() -> None:
    conv = small()
    x, weight, bias = leaves(conv)
    stored: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (stored.append(t), t)[1], lambda t: t):
        run(conv, Pass(0), x, weight, bias, product=Product(decay=0.1))
    numbers = [each for each in stored if each.dtype.is_floating_point]
    assert {each.data_ptr() for each in numbers} <= {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("passes", [EVERY, Pass(0)], ids=str)
@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3)), ids=str)
def test_only_what_is_asked_for_has_a_gradient(wanted: tuple[bool, ...], passes: Pass) -> None:
    conv = small()
    operands, every = leaves(conv, wanted), leaves(conv)
    y = run(conv, passes, *operands)
    assert y.requires_grad is any(wanted)
    if not any(wanted):
        return
    y.backward(conv.y_gradient)
    run(conv, passes, *every).backward(conv.y_gradient)
    for leaf, full, want in zip(operands, every, wanted, strict=True):
        assert (leaf.grad is not None) is want
        assert not want or torch.equal(leaf.grad, full.grad)


@pytest.mark.parametrize("passes", COMBINATIONS, ids=str)
def test_each_pass_goes_the_way_it_is_told(passes: Pass) -> None:
    conv = small()
    # Removed weights that are not 0: dense passes see them, and the kernels do not.
    x, weight = conv.x.requires_grad_(), torch.randn_like(conv.weight).requires_grad_()
    y = run(conv, passes, x, weight, None)
    of_x, of_weight = torch.autograd.grad(y, (x, weight), conv.y_gradient)

    def by_torch(seen: Tensor) -> tuple[Tensor, Tensor]:
        expected = F.conv2d(x, seen, None, *conv.geometry)
        return expected.detach(), torch.autograd.grad(expected, x, conv.y_gradient)[0]

    sparse, dense = by_torch(weight * conv.mask), by_torch(weight)
    assert_close(y.detach(), (sparse if passes & Pass.FORWARD else dense)[0])
    assert_close(of_x, (sparse if passes & Pass.INPUT_GRADIENT else dense)[1])
    assert bool(of_weight[~conv.mask].any()) is not bool(passes & Pass.WEIGHT_GRADIENT)


@pytest.mark.parametrize("passes", [EVERY, Pass.FORWARD, Pass(0)], ids=str)
def test_gradients_of_gradients_are_those_of_torch(passes: Pass) -> None:
    conv = small()

    def penalty(conv2d: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        x, weight, bias = operands = leaves(conv)
        y = conv2d(x, weight * conv.mask, bias)
        first = torch.autograd.grad(y.square().sum(), operands, create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in first), operands)

    found = penalty(lambda *operands: run(conv, passes, *operands))
    expected = penalty(lambda *operands: F.conv2d(*operands, *conv.geometry))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("product", [None, Product()], ids=str)
@pytest.mark.parametrize("passes", [EVERY, Pass.INPUT_GRADIENT], ids=str)
def test_gradients_are_derivatives(passes: Pass, product: Product | None) -> None:
    conv = small()
    operands = leaves(conv)

    def masked(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight = weight * conv.mask if product is None else weight
        return run(conv, passes, x, weight, bias, product=product)

    assert torch.autograd.gradcheck(masked, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(masked, operands, fast_mode=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck
@pytest.mark.parametrize("product", [None, *PRODUCTS], ids=str)
@pytest.mark.parametrize("passes", [EVERY, Pass(0)], ids=str)
def test_operators_keep_the_rules_of_torch_library(passes: Pass, product: Product | None) -> None:
    conv = small(torch.float32)
    operands = (conv.x.to(memory_format=LAST), conv.weight)
    others = (conv.mask, conv.bias, *conv.geometry, most_kept(passes), *how(product))
    ops = torch.ops.spre_fx
    leaves = (each.requires_grad_() for each in operands)
    torch.library.opcheck(ops.masked_conv.default, (*leaves, *others))
    plain = (conv.y_gradient, *(each.detach() for each in operands), conv.mask)
    arguments = (*plain, *conv.geometry, most_kept(passes), *how(product), [True, True])
    torch.library.opcheck(ops.masked_conv_backward.default, arguments)


@pytest.mark.parametrize("passes", [EVERY, Pass(0)], ids=str)
def test_a_mask_of_numbers_keeps_what_is_not_zero(passes: Pass) -> None:
    conv = small()
    operands = leaves(conv)
    numbers = replace(conv, mask=2.0 * conv.mask)
    both = [run(each, passes, *operands) for each in (conv, numbers)]
    assert torch.equal(*both)
    for create_graph in (False, True):
        one, other = (
            torch.autograd.grad(y.square().sum(), operands, create_graph=create_graph)
            for y in (run(each, passes, *operands) for each in (conv, numbers))
        )
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("product", [None, *PRODUCTS], ids=str)
@pytest.mark.parametrize("passes", COMBINATIONS, ids=str)
def test_compilers_are_told_how_results_lie_in_memory(
    passes: Pass, product: Product | None
) -> None:
    conv, ops = small(torch.float32), torch.ops.spre_fx
    for of_x, of_weight in itertools.product(LAYOUTS, repeat=2):
        x, gradient = laid_out(conv.x, of_x), laid_out(conv.y_gradient, of_weight)
        operands = x, laid_out(conv.weight, of_weight), laid_out(conv.mask, of_x)
        rest = (*conv.geometry, most_kept(passes), *how(product))
        real = [
            ops.masked_conv(*operands, conv.bias, *rest),
            *ops.masked_conv_backward(gradient, *operands, *rest, [True, True]),
        ]
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(each) for each in (*operands, conv.bias, gradient)]
            told = [
                ops.masked_conv(*fakes[:4], *rest),
                *ops.masked_conv_backward(fakes[4], *fakes[:3], *rest, [True, True]),
            ]
        assert [(t.shape, t.stride()) for t in told] == [(t.shape, t.stride()) for t in real]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_whole_it_computes_the_same_by_the_same_kernels(backend: str) -> None:
    torch._dynamo.reset()
    conv = small(torch.float32)

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (run(conv, EVERY, x.sin(), weight, bias) * conv.y_gradient).sum()

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    plain = leaves(conv)
    expected = torch.autograd.grad(loss(*plain), plain)
    torch.autograd.grad(compiled(*plain), plain)
    with torch.profiler.profile() as profile:
        found = torch.autograd.grad(compiled(*plain), plain)
    names = [event.name for event in profile.events()]
    for name in ("spre_fx::masked_conv", "spre_fx::masked_conv_backward"):
        assert names.count(name) == 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_bias_of_another_type_is_refused_as_by_torch() -> None:
    conv = small(torch.float64)
    assert conv.bias is not None
    with pytest.raises(RuntimeError, match="bias"):
        run(conv, EVERY, conv.x, conv.weight, conv.bias.float())


# Of ResNets: channels in and out, side of the image, kernel, stride, groups.
LAYERS = [
    *((64, 64, 56, 1, 1, 1), (64, 64, 56, 3, 1, 1), (64, 256, 56, 1, 1, 1)),
    *((128, 128, 28, 3, 2, 1), (256, 256, 14, 3, 1, 1), (512, 512, 7, 3, 1, 1)),
    *((1024, 256, 14, 1, 1, 1), (256, 512, 14, 1, 2, 1), (128, 128, 28, 3, 1, 32)),
    *((16, 16, 32, 3, 1, 1), (32, 64, 32, 3, 1, 1), (8, 8, 6, 3, 1, 1), (64, 64, 28, 3, 1, 64)),
]


def asked(
    layer: tuple[int, ...],
    density: float,
    images: int = 32,
    *,
    kept_gradient: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Pass:
    """What the rule says of a layer, on which it must touch no number."""
    channels, filters, side, kernel, stride, groups = layer
    x = torch.zeros(1, dtype=dtype).expand(images, channels, side, side)
    weight = torch.zeros(1, dtype=dtype).expand(filters, channels // groups, kernel, kernel)
    geometry = Geometry([stride] * 2, [kernel // 2] * 2, [1, 1], groups)
    most = SparseCompute(geometry, density, kept_gradient).most_kept(x, weight)
    return Pass(0) if most is None else chosen(density * weight.numel(), most)


def chosen(kept: float, most: list[int]) -> Pass:
    passes = (each for each, limit in zip(Pass, most, strict=True) if kept <= limit)
    return reduce(or_, passes, Pass(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_fewer_weights_are_never_a_reason_against(
    layer: tuple[int, ...], dtype: torch.dtype
) -> None:
    densities = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
    found = [asked(layer, density, dtype=dtype) for density in densities]
    assert all(more & fewer == more for fewer, more in itertools.pairwise(found))
    assert found[-1] == Pass(0)  # of no zeros dense kernels make more


@pytest.mark.parametrize("density", [1 / 4, 1 / 8, 1 / 16])
@pytest.mark.parametrize(
    "layer", [(64, 64, 56, 3, 1, 1), (256, 256, 14, 3, 1, 1), (512, 512, 7, 3, 1, 1)], ids=str
)
def test_of_usual_layers_every_pass_is_worth_it(layer: tuple[int, ...], density: float) -> None:
    assert asked(layer, density) == EVERY
    assert asked(layer, density, kept_gradient=False) == Pass.FORWARD | Pass.INPUT_GRADIENT


@pytest.mark.parametrize(
    ("layer", "images"),
    [
        ((64, 64, 28, 3, 1, 64), 32),  # depthwise
        ((1, 2, 6, 3, 1, 1), 32),
        ((8, 8, 32, 1, 1, 1), 32),
        ((256, 256, 14, 3, 1, 1), 1),
    ],
    ids=["depthwise", "few channels", "few products for a number", "one image"],
)
def test_where_little_is_left_out_nothing_is(layer: tuple[int, ...], images: int) -> None:
    assert asked(layer, 1 / 4, images) == Pass(0)


def test_the_rule_depends_on_shapes_alone() -> None:
    compute = SparseCompute(Geometry([1, 1], [1, 1], [1, 1], 1), 1 / 4, True)
    x, weight = torch.randn(32, 64, 14, 14), torch.randn(64, 64, 3, 3)
    for number, kind, threads in itertools.product((0.0, 1.0), LAYOUTS, (1, 3)):
        torch.set_num_threads(threads)
        found = compute.most_kept(*(laid_out(each, kind) for each in (x * number, weight * number)))
        assert found is not None
        assert chosen(weight.numel() / 4, found) == EVERY
        assert found == compute.most_kept(x, weight)
    torch.set_num_threads(1)


def test_a_mask_that_keeps_too_much_for_a_pass_makes_it_dense() -> None:
    mask = torch.arange(60).view(3, 5, 2, 2) < 20
    for limit in (19, 20):
        for which, each in enumerate(Pass):
            limits = [-1, -1, -1]
            limits[which] = limit
            assert sparse_passes(kept_by(mask), limits) == (each if limit == 20 else Pass(0))
    for shuffled in (laid_out(mask, kind) for kind in LAYOUTS):
        assert sparse_passes(kept_by(shuffled), [20, 19, 20]) == Pass.FORWARD | Pass.WEIGHT_GRADIENT
    none = kept_by(torch.zeros_like(mask))
    assert sparse_passes(none, [0, -1, 0]) == Pass.FORWARD | Pass.WEIGHT_GRADIENT


@pytest.mark.parametrize("shape", [(32, 60, 14, 14), (32, 64, 2, 14), (32, 64, 2, 2)], ids=str)
def test_what_torch_refuses_is_left_to_torch(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.randn(64, 64, 5, 5)
    compute = SparseCompute(Geometry([1, 1], [0, 0], [1, 1], 1), 1 / 16, True)
    assert compute.most_kept(x, weight) is None
    with pytest.raises(RuntimeError, match=r"channels|Kernel size"):
        F.conv2d(x, weight)


def test_under_autocast_every_pass_is_dense() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert asked((256, 256, 14, 3, 1, 1), 1 / 16) == Pass(0)


def test_without_the_engine_every_pass_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = (256, 256, 14, 3, 1, 1)
    assert asked(layer, 1 / 16)
    with monkeypatch.context() as patch:
        patch.setenv(library.VARIABLE, "none")
        library._loaded.cache_clear()
        assert engine.load() is None
        assert asked(layer, 1 / 16) == Pass(0)
    library._loaded.cache_clear()
    assert asked(layer, 1 / 16)
