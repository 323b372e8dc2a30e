"""2:4 layers against float64, on the CPU: GEMM, patches, copies, files, compile, export."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from spre_fx import cuda_layers
from spre_fx.cuda_layers import (
    CONV_METHODS,
    SemiStructuredConv2d,
    SemiStructuredLinear,
    why_no_gemm,
)
from spre_fx.errors import ModelError, OptionError
from spre_fx.masks import nm_mask
from spre_fx.patterns import Pattern
from spre_fx.semi_structured_ops import semi_structured_linear, why_not

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(1, 8), Pattern(1, 16)]
LIBRARIES = ["cusparselt", "cutlass"]


def sparsify(layer, pattern=PATTERNS[0], dtype=torch.float16):
    with torch.no_grad():
        layer.weight *= nm_mask(layer.weight, pattern)
    return layer.to(dtype).eval()


def conv(*args, pattern=PATTERNS[0], dtype=torch.float16, **options):
    return sparsify(nn.Conv2d(*args, **options), pattern, dtype)


def assert_close_to_float64(layer, dense, x):
    y = layer(x)
    expected = copy.deepcopy(dense).double()(x.double())
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    error = (y.double() - expected).abs().max() / expected.abs().max()
    assert error < 4 * torch.finfo(x.dtype).eps
    return y


GEOMETRIES = {
    "1x1": {"kernel_size": 1},
    "1x1 stride 2": {"kernel_size": 1, "stride": 2},
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3 stride 2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "3x3 unequal": {"kernel_size": 3, "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    "5x1 same": {"kernel_size": (5, 1), "padding": "same"},
    "4x2 same": {"kernel_size": (4, 2), "padding": "same"},
    "3x3 valid": {"kernel_size": 3, "padding": "valid"},
    "7x7": {"kernel_size": 7, "stride": 2, "padding": 3},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_conv_agrees_with_float64(geometry, library):
    dense = conv(16, 40, **GEOMETRIES[geometry])
    layer = SemiStructuredConv2d.from_dense(dense, library)
    x = torch.randn(3, 16, 11, 9, dtype=torch.float16)
    y = assert_close_to_float64(layer, dense, x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("channels", [(3, 5), (6, 32), (64, 64), (70, 33)], ids=str)
def test_a_conv_of_any_size_and_pattern_agrees_with_float64(channels, pattern, dtype):
    dense = conv(*channels, 3, padding=1, pattern=pattern, dtype=dtype, bias=channels[0] != 6)
    layer = SemiStructuredConv2d.from_dense(dense)
    assert_close_to_float64(layer, dense, torch.randn(2, channels[0], 7, 5, dtype=dtype))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("shape", [(10, 48), (2, 3, 48), (48,), (0, 48)], ids=str)
def test_a_linear_agrees_with_float64(shape, library):
    dense = sparsify(nn.Linear(48, 20))
    layer = SemiStructuredLinear.from_dense(dense, library)
    x = torch.randn(shape, dtype=torch.float16)
    if x.numel():
        assert_close_to_float64(layer, dense, x)
    else:
        assert layer(x).shape == (0, 20)


def test_one_sample_without_a_batch():
    dense = conv(16, 32, 3)
    layer = SemiStructuredConv2d.from_dense(dense)
    assert_close_to_float64(layer, dense, torch.randn(16, 6, 6, dtype=torch.float16))


def test_a_1x1_conv_multiplies_the_input_where_it_lies(monkeypatch):
    layer = SemiStructuredConv2d.from_dense(conv(16, 32, 1))
    x = torch.randn(2, 16, 5, 5, dtype=torch.float16).to(memory_format=torch.channels_last)
    places = []

    def spy(matrix, *args, **kwargs):
        places.append((matrix.data_ptr(), matrix.is_contiguous()))
        return semi_structured_linear(matrix, *args, **kwargs)

    monkeypatch.setattr(cuda_layers, "semi_structured_linear", spy)
    layer(x)
    assert places == [(x.data_ptr(), True)]


@pytest.mark.parametrize("padding", [(1, 2), "same", "valid"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_dense_layer_comes_back(library, padding):
    dense = conv(6, 10, 3, stride=(1, 1), padding=padding, dilation=(2, 1))
    back = SemiStructuredConv2d.from_dense(dense, library).to_dense()
    assert torch.equal(back.weight, dense.weight)
    assert torch.equal(back.bias, dense.bias)
    assert repr(back) == repr(dense)
    linear = sparsify(nn.Linear(10, 7, bias=False))
    back = SemiStructuredLinear.from_dense(linear, library).to_dense()
    assert torch.equal(back.weight, linear.weight)
    assert back.bias is None


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish", None])
def test_it_adds_and_activates_what_comes_out(activation):
    function = getattr(nn.functional, activation) if activation else nn.Identity()
    dense = conv(16, 40, 3)
    layer = SemiStructuredConv2d.from_dense(dense)
    x = torch.randn(2, 16, 5, 5, dtype=torch.float16)
    residual = torch.randn(2, 40, 3, 3, dtype=torch.float16)
    y = layer(x)
    layer.activation = activation
    torch.testing.assert_close(layer(x), function(y))
    torch.testing.assert_close(layer(x, residual), function(y + residual))
    linear = SemiStructuredLinear.from_dense(sparsify(nn.Linear(32, 32)))
    x = torch.randn(4, 32, dtype=torch.float16)
    y = linear(x)
    linear.activation = activation
    torch.testing.assert_close(linear(x, x), function(y + x))
    assert ("activation" in repr(layer)) == (activation is not None)


def test_copies_pickles_and_state_dicts_are_the_layer():
    layer = SemiStructuredConv2d.from_dense(conv(16, 40, 3, padding=1))
    x = torch.randn(2, 16, 6, 6, dtype=torch.float16)
    expected = layer(x)
    assert set(layer.state_dict()) == {"values", "metadata", "bias"}
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    other = SemiStructuredConv2d.from_dense(conv(16, 40, 3, padding=1))
    assert not torch.equal(other(x), expected)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), expected)


def test_a_copy_of_a_tuned_layer_holds_nothing_of_the_device():
    layer = SemiStructuredLinear.from_dense(sparsify(nn.Linear(32, 32)))
    layer.compressed = torch.zeros(32, 18, dtype=torch.float16)  # as if on a device
    assert copy.deepcopy(layer).compressed is None
    assert "compressed" not in layer.state_dict()
    assert layer.compressed is not None


def test_another_type_of_the_same_size():
    dense = conv(16, 32, 3)
    layer = SemiStructuredConv2d.from_dense(dense).to(torch.bfloat16)
    x = torch.randn(1, 16, 5, 5, dtype=torch.bfloat16)
    assert_close_to_float64(layer, dense.to(torch.bfloat16), x)


@pytest.mark.parametrize(
    ("dense", "reason"),
    [
        (nn.Conv2d(8, 8, 3, groups=2), "groups=2"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.Conv1d(8, 8, 3), "found Conv1d"),
        (nn.ConvTranspose2d(8, 8, 3), "found ConvTranspose2d"),
    ],
)
def test_a_conv_that_is_no_gemm_is_refused_with_the_reason(dense, reason):
    assert reason in why_no_gemm(dense)
    with pytest.raises(ModelError, match=reason):
        SemiStructuredConv2d.from_dense(dense)


def test_types_and_weights_that_no_tensor_core_takes_are_refused():
    with pytest.raises(ModelError, match=r"found torch.float32: convert the model"):
        SemiStructuredLinear.from_dense(sparsify(nn.Linear(32, 32), dtype=torch.float32))
    with pytest.raises(ModelError, match="at most two non-zeros in every four"):
        SemiStructuredLinear.from_dense(nn.Linear(32, 32).half())


def test_a_library_there_is_not_is_refused():
    with pytest.raises(OptionError, match="expected one of cusparselt, cutlass"):
        SemiStructuredLinear.from_dense(sparsify(nn.Linear(32, 32)), "cublas")


def test_inputs_of_another_type_are_refused():
    layer = SemiStructuredLinear.from_dense(sparsify(nn.Linear(32, 32)))
    with pytest.raises(
        ModelError, match=r"inputs of torch.float16, the type the layer was lowered"
    ):
        layer(torch.randn(4, 32))


def test_a_method_of_ones_own_runs_the_conv(monkeypatch):
    class Dense:
        def run(self, layer, x):
            return nn.functional.conv2d(x, layer.dense_weight(), layer.bias[:40]) + 1

        def tune(self, layer, x):
            layer.tuned = tuple(x.shape)

    monkeypatch.setitem(CONV_METHODS, "dense", Dense())
    dense = conv(16, 40, 3)
    layer = SemiStructuredConv2d.from_dense(dense, method="dense")
    x = torch.randn(16, 6, 6, dtype=torch.float16)
    torch.testing.assert_close(layer(x), dense(x) + 1)
    layer.tune(x)
    assert layer.tuned == (1, 16, 6, 6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole_it_computes_the_same(dynamic):
    layer = SemiStructuredConv2d.from_dense(conv(16, 40, 3, padding=1))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 16, 6, 6, dtype=torch.float16)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))


def test_exported_with_a_batch_of_any_size():
    model = nn.Sequential(
        SemiStructuredConv2d.from_dense(conv(16, 40, 3, padding=1)),
        nn.ReLU(),
        SemiStructuredConv2d.from_dense(conv(40, 8, 1, stride=2)),
        nn.Flatten(),
        SemiStructuredLinear.from_dense(sparsify(nn.Linear(72, 10))),
    )
    x = torch.randn(3, 16, 6, 6, dtype=torch.float16)
    exported = torch.export.export(
        model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
    )
    for batch in (2, 3, 9):
        x = torch.randn(batch, 16, 6, 6, dtype=torch.float16)
        assert torch.equal(exported.module()(x), model(x))


@pytest.mark.cuda
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("geometry", ["1x1", "3x3", "3x3 stride 2", "3x3 unequal"])
def test_cuda_agrees_with_float64(geometry, dtype, library):
    reason = why_not(library, torch.cuda.get_device_capability())
    if reason is not None:
        pytest.skip(reason)
    dense = conv(64, 96, dtype=dtype, **GEOMETRIES[geometry]).cuda()
    layer = SemiStructuredConv2d.from_dense(dense, library)
    x = torch.randn(5, 64, 15, 13, dtype=dtype, device="cuda")
    assert_close_to_float64(layer, dense, x)
    layer.tune(x)
    assert_close_to_float64(layer, dense, x)
    assert_close_to_float64(copy.deepcopy(layer).cpu(), dense.cpu(), x.cpu())


@pytest.mark.cuda
def test_cuda_runs_in_graphs_and_compiled():
    layer = SemiStructuredConv2d.from_dense(conv(64, 96, 3, padding=1).cuda())
    x = torch.randn(4, 64, 14, 14, dtype=torch.float16, device="cuda")
    with torch.inference_mode():
        expected = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        y.zero_()
        graph.replay()
        torch.testing.assert_close(y, expected)
        compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.cuda
def test_cuda_moves_to_the_cpu_and_back():
    layer = SemiStructuredLinear.from_dense(sparsify(nn.Linear(64, 64)).cuda())
    x = torch.randn(8, 64, dtype=torch.float16, device="cuda")
    expected = layer(x)
    assert layer.compressed is not None
    layer.cpu()
    assert layer.compressed is None
    assert torch.equal(pickle.loads(pickle.dumps(layer.cuda()))(x), expected)
    assert torch.equal(layer(x), expected)
