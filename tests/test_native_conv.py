"""The passes of masked convs by the engine are those of torch with the masked weight."""

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_convs import MaskedConv, assert_close, draw_conv
from torch import Tensor
from torch.nn import functional as F

from spre_fx import engine, native_conv
from spre_fx.native_conv import Geometry

ENGINE = engine.load()
DTYPES = (torch.float32, torch.float64)
THREADS = (1, 2, 3)

many = settings(derandomize=True, deadline=None, max_examples=60, database=None)
few = settings(many, max_examples=30)
pytestmark = pytest.mark.skipif(ENGINE is None, reason="needs the engine")


@pytest.fixture(autouse=True)
def one_thread_afterwards():
    yield
    torch.set_num_threads(1)


@st.composite
def convs(draw: st.DrawFn) -> MaskedConv:
    random = draw(st.randoms(use_true_random=False))
    return draw_conv(random, draw(st.sampled_from(DTYPES)))


def passes(conv: MaskedConv) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of x, gradient of the weight."""
    kept = native_conv.kept_by(conv.mask)
    operands = conv.x, conv.weight, kept
    return (
        native_conv.forward(*operands, conv.bias, conv.geometry),
        native_conv.input_gradient(conv.y_gradient, *operands, conv.geometry),
        native_conv.weight_gradient(conv.y_gradient, conv.x, kept, conv.geometry),
    )


def check(conv: MaskedConv) -> None:
    assert native_conv.takes(conv.x, conv.weight)
    y, x_gradient, weight_gradient = passes(conv)
    assert_close(y, conv.output())
    expected = conv.gradients()
    assert_close(x_gradient, expected[0])
    assert_close(weight_gradient, expected[1])
    assert not weight_gradient[~conv.mask].any()
    of_x = native_conv.memory_format(conv.x)
    of_weight = native_conv.memory_format(conv.mask)
    assert y.is_contiguous(memory_format=of_x)
    assert x_gradient.is_contiguous(memory_format=of_x)
    assert weight_gradient.is_contiguous(memory_format=of_weight)


@many
@given(convs(), st.sampled_from(THREADS))
def test_every_pass_is_that_of_torch(conv: MaskedConv, threads: int) -> None:
    torch.set_num_threads(threads)
    check(conv)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pass_of_many_more_is_that_of_torch(dtype: torch.dtype) -> None:
    for seed in range(1500):
        torch.set_num_threads(THREADS[seed % 3])
        check(draw_conv(Random(seed), dtype))


@few
@given(convs())
def test_the_number_of_threads_changes_at_most_the_rounding_of_weight_gradients(
    conv: MaskedConv,
) -> None:
    torch.set_num_threads(1)
    alone = passes(conv)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        y, x_gradient, weight_gradient = passes(conv)
        assert torch.equal(y, alone[0])
        assert torch.equal(x_gradient, alone[1])
        assert_close(weight_gradient, alone[2].double())


def test_more_threads_than_rows() -> None:
    geometry = Geometry([2, 1], [0, 0], [1, 1], 1)
    x, weight = torch.randn(3, 4, 3, 5), torch.randn(6, 4, 1, 3)
    conv = MaskedConv(x, weight, weight > 0, None, torch.randn(3, 6, 2, 3), geometry)
    for threads in range(1, 9):
        torch.set_num_threads(threads)
        check(conv)


def conv_of_one_weight(kept: bool) -> MaskedConv:
    geometry = Geometry([1, 1], [1, 1], [1, 1], 1)
    operands = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 3, 3), 5.0)
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    mask[0, 0, 1, 1] = kept
    return MaskedConv(*operands, mask, torch.tensor([7.0]), torch.full((1, 1, 1, 1), 2.0), geometry)


def test_by_hand() -> None:
    y, x_gradient, weight_gradient = passes(conv_of_one_weight(kept=True))
    assert y.item() == 3 * 5 + 7
    assert x_gradient.item() == 2 * 5
    assert weight_gradient.flatten().tolist() == [0, 0, 0, 0, 2 * 3, 0, 0, 0, 0]
    y, x_gradient, weight_gradient = passes(conv_of_one_weight(kept=False))
    assert y.item() == 7
    assert x_gradient.item() == 0
    assert not weight_gradient.any()


def test_images_that_share_a_vector_do_not_meet() -> None:
    conv = draw_conv(Random(1), torch.float32)
    x = torch.randn(11, *conv.x.shape[1:])
    x[3] = float("nan")
    every = native_conv.kept_by(torch.ones_like(conv.mask))
    y = native_conv.forward(x, conv.weight, every, None, conv.geometry)
    broken = y.isnan().flatten(1).any(1)
    assert broken.tolist() == [image == 3 for image in range(11)]


@many
@given(convs())
def test_the_shape_of_the_output_is_that_of_torch(conv: MaskedConv) -> None:
    expected = F.conv2d(conv.x.to("meta"), conv.weight.to("meta"), None, *conv.geometry)
    assert native_conv.output_shape(conv.x, conv.weight, conv.geometry) == expected.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_images_lie_together_in_whole_vectors(dtype: torch.dtype) -> None:
    together = native_conv.images_together(dtype.itemsize)
    assert together * dtype.itemsize in (16, 32, 64)


X, W = torch.zeros(2, 4, 5, 5), torch.zeros(6, 4, 3, 3)
HUGE = torch.zeros(1).expand(1, 2**11, 2**8, 2**8)


@pytest.mark.parametrize(
    ("operands", "taken"),
    [
        ((X, W), True),
        ((X.double(), W.double()), True),
        ((X[0], W), False),
        ((X[:0], W), False),
        ((X.bfloat16(), W.bfloat16()), False),
        ((X.half(), W.half()), False),
        ((X.double(), W), False),
        ((X.to("meta"), W.to("meta")), False),
        ((HUGE, W), False),
    ],
    ids=[
        *("float32", "float64", "one image without its axis", "no image", "bfloat16", "float16"),
        *("two types", "another device", "more than 32 bits index"),
    ],
)
def test_what_there_are_kernels_for(operands: tuple[Tensor, Tensor], taken: bool) -> None:
    assert native_conv.takes(*operands) is taken


def test_under_autocast_there_are_none() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert not native_conv.takes(X, W)
        with torch.autocast("cpu", enabled=False):
            assert native_conv.takes(X, W)


def test_memory_formats() -> None:
    last = torch.channels_last
    assert native_conv.memory_format(X) == torch.contiguous_format
    assert native_conv.memory_format(X.to(memory_format=last)) == last
    assert native_conv.memory_format(X.transpose(0, 1)) == torch.contiguous_format
    both = torch.zeros(2, 4, 1, 1)  # lies the same either way
    assert native_conv.memory_format(both.to(memory_format=last)) == torch.contiguous_format
