"""The operators of packed layers against float64, on each engine that is here and without one."""

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from spre_fx import ModelError, Pattern, masks, packed_ops
from spre_fx.engine import library
from spre_fx.packed_ops import ACTIVATIONS
from spre_fx.weight_layout import pack, pack_bias

OPERATORS = torch.ops.spre_fx
PATTERNS = ("1:2", "2:4", "1:4", "1:8", "1:16", "8:16", "1:32", "2:32", "3:5", None)
FOUND = {isa: library.find(Path(library.__file__).parent, (isa,)) for isa in library.ISAS}
ENGINES = {isa: found for isa, found in FOUND.items() if not isinstance(found, str)}
ENGINES["none"] = None
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}


@pytest.fixture(params=list(ENGINES))
def isa(request, monkeypatch):
    """Run a test on each engine that is here, and without one."""
    monkeypatch.setattr(packed_ops, "load", lambda: ENGINES[request.param])
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def nm_weight(*shape: int, pattern: str | None = "2:4") -> Tensor:
    weight = torch.randn(shape)
    if pattern is None:
        return weight
    return torch.where(masks.nm_mask(weight, Pattern.parse(pattern)), weight, 0.0)


class Conv:
    """One convolution, packed, and what float64 makes of it."""

    def __init__(self, weight, bias=None, *, groups=1, activation=None, dtype=torch.float32, **how):
        self.weight, self.bias = weight.to(dtype), bias
        self.geometry = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], **how}
        self.geometry["groups"] = groups
        sizes = {"in_channels": weight.shape[1] * groups, "out_channels": weight.shape[0]}
        sizes["kernel_size"] = list(weight.shape[2:])
        self.options = {**sizes, **self.geometry, "activation": activation}
        self.operands = (pack(self.weight, groups), pack_bias(bias, groups))

    def __call__(self, x, residual=None):
        return OPERATORS.packed_conv2d(x, *self.operands, residual, *self.options.values())

    def exactly(self, x, residual=None):
        bias = None if self.bias is None else self.bias.double()
        y = F.conv2d(x.double(), self.weight.double(), bias, **self.geometry)
        y = y if residual is None else y + residual.double()
        return ACTIVATIONS[self.options["activation"]][1](y)


def assert_close(y: Tensor, exact: Tensor) -> None:
    scale = max(1.0, float(exact.abs().max())) if exact.numel() else 1.0
    tolerance = TOLERANCE[y.dtype] * scale
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern(pattern, dtype, isa, threads):
    conv = Conv(
        nm_weight(40, 72, 3, 3, pattern=pattern), torch.randn(40), padding=[1, 1], dtype=dtype
    )
    x = torch.randn(2, 72, 9, 7, dtype=dtype)
    y = conv(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, conv.exactly(x))


geometries = st.fixed_dictionaries(
    {
        "kernel": st.tuples(st.integers(1, 5), st.integers(1, 4)),
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)).map(list),
        "padding": st.tuples(st.integers(0, 4), st.integers(0, 3)).map(list),
        "dilation": st.tuples(st.integers(1, 2), st.integers(1, 3)).map(list),
        "groups": st.integers(1, 3),
    }
)


@pytest.mark.parametrize("name", list(ENGINES))
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_every_geometry(name, data, seed):
    torch.manual_seed(seed)
    geometry = data.draw(geometries)
    kernel, groups = geometry.pop("kernel"), geometry["groups"]
    # At these, with an image of few columns, torch 2.14's own conv crashes.
    assume(kernel[1] > 1 or geometry["dilation"][1] == 1 or geometry["padding"][1] == 0)
    most = (40, 40, 13, 13, 3)
    outputs, channels, *image, batch = (data.draw(st.integers(1, size)) for size in most)
    least = [d * (k - 1) + 1 for d, k in zip(geometry["dilation"], kernel, strict=True)]
    with_bias, with_residual, channels_last = (data.draw(st.booleans()) for _ in range(3))
    weight = torch.randn(outputs * groups, channels, *kernel)
    weight = weight.where(torch.rand(weight.shape) < torch.rand(()), 0.0)
    bias = torch.randn(outputs * groups) if with_bias else None
    activation = data.draw(st.sampled_from(list(ACTIVATIONS)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    conv = Conv(weight, bias, activation=activation, dtype=dtype, **geometry)
    x = torch.randn(batch, channels * groups, *map(max, image, least)).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    residual = torch.randn(conv.exactly(x).shape).to(dtype) if with_residual else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_ops, "load", lambda: ENGINES[name])
        assert_close(conv(x, residual), conv.exactly(x, residual))


@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48), (0, 48), (2, 0, 48), (1, 2, 1, 48)])
def test_linear_takes_any_rank(shape, isa, threads):
    weight, bias = nm_weight(21, 48), torch.randn(21)
    x, residual = torch.randn(shape), torch.randn(*shape[:-1], 21)
    y = OPERATORS.packed_linear(
        *(x, pack(weight[..., None, None]), pack_bias(bias), residual), 48, 21, "silu"
    )
    exact = F.linear(x.double(), weight.double(), bias.double()) + residual.double()
    assert y.is_contiguous()
    assert_close(y, F.silu(exact))


def test_linear_takes_any_strides(isa):
    weight = nm_weight(8, 32)
    x = torch.randn(32, 6, 4).permute(2, 1, 0)
    y = OPERATORS.packed_linear(*(x, pack(weight[..., None, None]), None, None), 32, 8, None)
    assert_close(y, F.linear(x.double(), weight.double()))


@pytest.mark.parametrize("shape", [(0, 32, 5, 5), (2, 32, 1, 1), (1, 32, 3, 4)])
def test_small_and_empty_inputs(shape, isa):
    conv = Conv(nm_weight(16, 32, 1, 1), torch.randn(16))
    x = torch.randn(shape)
    assert_close(conv(x), conv.exactly(x))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x[:, ::2],
        lambda x: x.contiguous(memory_format=torch.channels_last)[:, 8:40],
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :, 1:, ::2],
        lambda x: x[:1].expand(3, -1, -1, -1),
    ],
)
def test_inputs_and_residuals_of_any_strides(view, isa):
    x = view(torch.randn(2, 64, 8, 6))
    conv = Conv(nm_weight(64, x.shape[1], 3, 3), padding=[1, 1])
    residual = (
        torch.randn(x.shape[0], 64, *x.shape[2:]).transpose(0, 1).contiguous().transpose(0, 1)
    )
    assert_close(conv(x, residual), conv.exactly(x, residual))


def test_two_threads_of_python_at_once(isa, threads):
    conv = Conv(nm_weight(64, 64, 3, 3), padding=[1, 1])
    inputs = [torch.randn(1, 64, 12 + i, 12) for i in range(2)]
    alone = [conv(x) for x in inputs]
    wrong = []

    def work(x: Tensor, expected: Tensor) -> None:
        wrong.extend(i for i in range(50) if not torch.equal(conv(x), expected))

    running = [threading.Thread(target=work, args=pair) for pair in zip(inputs, alone, strict=True)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert wrong == []


def test_a_weight_anywhere_in_memory(isa):
    conv = Conv(nm_weight(32, 32, 1, 1))
    packed = conv.operands[0]
    moved = torch.empty(packed.numel() + 1, dtype=packed.dtype)[1:].view(packed.shape).copy_(packed)
    assert moved.data_ptr() % 64 != 0
    conv.operands = (moved, None)
    x = torch.randn(1, 32, 4, 4)
    assert_close(conv(x), conv.exactly(x))


def test_the_engine_is_what_runs(monkeypatch):
    if library.load() is None:
        pytest.skip(library.why_not())
    monkeypatch.setattr(packed_ops, "unpack", None)  # what only torch needs
    conv = Conv(nm_weight(32, 32, 1, 1))
    x = torch.randn(1, 32, 4, 4)
    assert_close(conv(x), conv.exactly(x))


@pytest.mark.parametrize(
    ("x", "residual", "message"),
    [
        (torch.ones(1, 31, 5, 5), None, r"\(N, 32, H, W\), found \(1, 31, 5, 5\)"),
        (torch.ones(32, 5, 5), None, r"\(N, 32, H, W\), found \(32, 5, 5\)"),
        (torch.ones(1, 32, 2, 5), None, r"kernel of \(3, 3\) .* found \(1, 32, 2, 5\)"),
        (torch.ones(1, 32, 5, 5).bfloat16(), None, r"float32, .* found torch.bfloat16.*dtype="),
        (torch.ones(1, 32, 5, 5).double(), None, r"float32, .* found torch.float64.*dtype="),
    ],
)
def test_wrong_inputs_are_one_clear_error(x, residual, message, isa):
    with pytest.raises(ModelError, match=message):
        Conv(nm_weight(16, 32, 3, 3))(x, residual)


@pytest.mark.parametrize(
    "residual",
    [torch.randn(16, 1, 1), torch.randn(3, 2, 16, 3, 3), torch.randn(2, 16, 3, 3).double()],
    ids=["smaller", "larger", "promoted"],
)
def test_a_residual_of_another_shape_or_type_is_added_as_torch_adds(residual, isa):
    conv = Conv(nm_weight(16, 32, 3, 3), activation="relu")
    x = torch.randn(2, 32, 5, 5)
    y = conv(x, residual)
    assert y.dtype == residual.dtype
    torch.testing.assert_close(y.double(), conv.exactly(x, residual), rtol=0, atol=1e-4)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = conv(*(mode.from_tensor(each) for each in (x, residual)))
    assert (fake.shape, fake.dtype, fake.stride()) == (y.shape, y.dtype, y.stride())


def test_an_input_that_is_smaller_than_the_kernel_is_refused(isa):
    with pytest.raises(ModelError) as error:
        Conv(nm_weight(16, 32, 3, 3))(torch.ones(1, 32, 2, 5))
    assert str(error.value) == (
        "expected an input that a kernel of (3, 3) with padding (0, 0) and dilation (1, 1) fits "
        "in, found (1, 32, 2, 5)."
    )


def test_an_unknown_activation_is_refused(isa):
    operands = (torch.ones(1, 48), pack(nm_weight(16, 48, 1, 1)), None, None)
    with pytest.raises(ModelError) as error:
        OPERATORS.packed_linear(*operands, 48, 16, "gelu")
    assert str(error.value) == (
        "expected an activation of None, relu, relu6, silu, hardswish, found 'gelu'."
    )


@pytest.mark.parametrize("shape", [(), (4, 47)])
def test_wrong_inputs_of_linear_are_one_clear_error(shape, isa):
    packed = pack(nm_weight(16, 48, 1, 1))
    with pytest.raises(ModelError, match=r"\(\.\.\., 48\), found \("):
        OPERATORS.packed_linear(torch.ones(shape), packed, None, None, 48, 16, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_channels": 48}, r"packed weight of shape \(1, 3, .* found \(1, 1, "),
        ({"kernel_size": [1, 1]}, r"packed weight of shape \(1, 1, 2, 1, .* found \(1, 1, 2, 9, "),
        ({"activation": "gelu"}, r"activation of None, relu, .* found 'gelu'"),
    ],
)
def test_options_of_another_weight_are_one_clear_error(change, message, isa):
    conv = Conv(nm_weight(16, 32, 3, 3))
    conv.options |= change
    with pytest.raises(ModelError, match=message):
        conv(torch.ones(1, 32, 5, 5))


def test_a_bias_that_is_not_packed_is_one_clear_error(isa):
    conv = Conv(nm_weight(10, 32, 1, 1))
    conv.operands = (conv.operands[0], torch.ones(10))
    with pytest.raises(ModelError, match=r"packed bias of 16 float32 .* of shape \(10,\)"):
        conv(torch.ones(1, 32, 5, 5))


@pytest.mark.parametrize("compiled", [False, True])
def test_backward_is_one_clear_error(compiled):
    conv = Conv(nm_weight(16, 32, 1, 1))
    call = torch.compile(conv, backend="aot_eager") if compiled else conv
    y = call(torch.ones(1, 32, 2, 2, requires_grad=True))
    with pytest.raises(ModelError, match=r"computes no gradients: train the graph"):
        y.sum().backward()


@pytest.mark.parametrize("residual", [False, True])
def test_conv2d_keeps_the_rules_of_operators(residual):
    conv = Conv(nm_weight(16, 32, 3, 3), torch.randn(16), padding=[1, 1], activation="relu")
    extra = torch.randn(2, 16, 5, 4) if residual else None
    arguments = (torch.randn(2, 32, 5, 4), *conv.operands, extra, *conv.options.values())
    torch.library.opcheck(OPERATORS.packed_conv2d.default, arguments)


def test_linear_keeps_the_rules_of_operators():
    arguments = (torch.randn(2, 3, 32), pack(nm_weight(16, 32, 1, 1)), None, None, 32, 16, "silu")
    torch.library.opcheck(OPERATORS.packed_linear.default, arguments)


def test_a_linear_layer_and_a_convolution_of_one_shape_do_not_share_a_plan(isa):
    conv, x = Conv(nm_weight(16, 16, 1, 1)), torch.randn(16, 16, 16, 16)
    y = OPERATORS.packed_linear(x, *conv.operands, None, 16, 16, None)
    assert_close(y, F.linear(x.double(), conv.weight.double().flatten(1)))
    assert_close(conv(x), conv.exactly(x))


def test_operands_on_two_devices_are_one_clear_error():
    conv = Conv(nm_weight(16, 32, 1, 1))
    conv.operands = (conv.operands[0].to("meta"), None)
    with pytest.raises(ModelError, match="on one device, found cpu and meta"):
        packed_ops._conv2d(torch.ones(1, 32, 2, 2), *conv.operands, None, *conv.options.values())
