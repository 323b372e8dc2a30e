"""What the CUDA backend offers, refuses and chooses; its layers in a graph that is lowered."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from two_four_on_cpu import OnCPU

import spre_fx
from spre_fx.backends import is_lowered
from spre_fx.choice import Timings
from spre_fx.cuda_backend import CUDABackend, libraries, ways
from spre_fx.cuda_layers import CONV_METHODS, SemiStructuredConv2d, SemiStructuredLinear
from spre_fx.dense_form import to_dense
from spre_fx.lowering import choose_backend
from spre_fx.masks import nm_mask
from spre_fx.passes.pipeline import lowering_pipeline
from spre_fx.patterns import Pattern

AMPERE, HOPPER, TURING = (8, 0), (9, 0), (7, 5)
PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(1, 8), Pattern(1, 16)]


@pytest.fixture(autouse=True)
def _with_cusparselt(monkeypatch):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)


def sparsify(layer, pattern=PATTERNS[0], dtype=torch.float16):
    with torch.no_grad():
        layer.weight *= nm_mask(layer.weight, pattern)
    return layer.to(dtype).eval()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", [nn.Linear(33, 5), nn.Conv2d(17, 7, 3), nn.Conv2d(32, 8, 1)])
def test_every_pattern_of_the_paper_has_libraries(layer, dtype, pattern):
    layer = sparsify(copy.deepcopy(layer), pattern, dtype)
    assert libraries(layer, pattern, AMPERE) == ("cusparselt", "cutlass")
    assert libraries(layer, pattern, HOPPER) == ("cusparselt",)


@pytest.mark.parametrize(
    ("layer", "capability", "reason"),
    [
        (nn.Linear(32, 32).float(), HOPPER, "found torch.float32: pass dtype="),
        (nn.Linear(32, 32).double(), HOPPER, "found torch.float64: convert the model"),
        (sparsify(nn.Conv2d(32, 32, 3, groups=2)), HOPPER, "found groups=2"),
        (sparsify(nn.Conv1d(32, 32, 3)), HOPPER, "found Conv1d"),
        (sparsify(nn.Linear(32, 32)), TURING, "came with compute capability 8.0, found 7.5"),
    ],
)
def test_a_layer_without_libraries_is_refused_with_the_reason(layer, capability, reason):
    with torch.no_grad():
        layer.weight *= nm_mask(layer.weight, Pattern(2, 4))
    assert reason in libraries(layer, Pattern(2, 4), capability)


def test_a_pattern_that_is_not_two_four_is_refused_by_its_zeros():
    layer = sparsify(nn.Linear(32, 32), Pattern(3, 4))
    assert "3:4 is not 2:4" in libraries(layer, Pattern(3, 4), HOPPER)
    assert libraries(sparsify(nn.Linear(32, 32)), Pattern(3, 4), HOPPER) == ("cusparselt",)


def test_without_cusparselt_hopper_has_none(monkeypatch):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    reason = libraries(sparsify(nn.Linear(32, 32)), Pattern(2, 4), HOPPER)
    assert "built without cuSPARSELt" in reason
    assert "8.x only, found 9.0" in reason


def test_a_layer_elsewhere_is_refused():
    assert "found it on cpu" in CUDABackend().candidates(nn.Linear(8, 8), Pattern(2, 4))


def test_a_conv_has_a_way_for_each_method(monkeypatch):
    monkeypatch.setitem(CONV_METHODS, "by hand", CONV_METHODS["patch matrix"])
    found = ways(sparsify(nn.Conv2d(32, 32, 3)), "cusparselt")
    assert [way.why for way in found] == [
        "2:4 by cusparselt on its patch matrix",
        "2:4 by cusparselt on its by hand",
    ]
    assert [way.module.method for way in found] == ["patch matrix", "by hand"]
    assert len(ways(sparsify(nn.Linear(32, 32)), "cutlass")) == 1


def test_without_measuring_it_stays_dense_and_says_so():
    layer = sparsify(nn.Linear(32, 32))
    found = ways(layer, "cusparselt") + ways(layer, "cutlass")
    lowered = CUDABackend().rule(layer, Pattern(2, 4), found, (8, 32))
    assert lowered.module is layer
    assert lowered.why == (
        "dense: whether cusparselt or cutlass is faster is only measured, with example_inputs"
    )


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.down = nn.Conv2d(16, 32, 1, stride=2)
        self.grouped = nn.Conv2d(32, 32, 3, groups=2)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(x)
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        y = self.grouped((y + self.down(x)).relu())
        return self.head(y.mean((2, 3)))


def deployed():
    prepared = spre_fx.prepare(Block(), "2:4")
    prepared(torch.randn(4, 3, 12, 12))
    return spre_fx.finalize(prepared, backend="dense").to(torch.float16)


def relative(y, expected):
    return float((y.double() - expected.double()).abs().max() / expected.double().abs().max())


def test_a_lowered_graph_computes_the_same_and_comes_back():
    dense = to_dense(deployed())
    lowered, _ = lowering_pipeline(OnCPU(), {}, Timings("test"))(dense)
    kinds = {name: type(m) for name, m in lowered.named_modules() if is_lowered(m)}
    assert kinds == {
        "conv1": SemiStructuredConv2d,
        "conv2": SemiStructuredConv2d,
        "down": SemiStructuredConv2d,
        "head": SemiStructuredLinear,
    }
    notes = {site.name: site.note for site in spre_fx.sites(lowered)}
    assert "found groups=2" in notes["grouped"]
    assert notes["conv1"].endswith("2:4 by cusparselt on its patch matrix")
    x = torch.randn(2, 3, 12, 12, dtype=torch.float16)
    with torch.no_grad():
        expected = copy.deepcopy(dense).double()(x.double())
        assert relative(lowered(x), expected) < 5e-3
        assert relative(copy.deepcopy(lowered)(x), expected) < 5e-3
        back = to_dense(lowered)
        assert torch.equal(back(x), dense(x))


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_model_on_a_device_is_lowered_for_it(name, monkeypatch):
    parameter = SimpleNamespace(device=torch.device("cuda:1"))
    model = SimpleNamespace(parameters=lambda: iter([parameter]))
    assert choose_backend(model, name, stacklevel=1) == CUDABackend()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cuda_finalize_measures_every_layer_and_is_right(dtype, monkeypatch):
    monkeypatch.setenv("SPRE_FX_CACHE", "off")
    prepared = spre_fx.prepare(Block(), "2:4").cuda()
    x = torch.randn(4, 3, 12, 12, device="cuda")
    prepared(x)
    exact = spre_fx.finalize(prepared, backend="dense").double()
    lowered = spre_fx.finalize(prepared, backend="cuda", example_inputs=x, dtype=dtype)
    measured = [site for site in spre_fx.sites(lowered) if site.dense_ms is not None]
    assert {site.name for site in measured} == {"conv1", "conv2", "down", "head"}
    assert all(site.chosen_ms <= site.dense_ms for site in measured)
    with torch.no_grad():
        assert relative(lowered(x.to(dtype)), exact(x.double())) < 16 * torch.finfo(dtype).eps


@pytest.mark.cuda
def test_cuda_float32_runs_dense_and_says_why():
    prepared = spre_fx.prepare(Block(), "2:4").cuda()
    lowered = spre_fx.finalize(prepared, backend="auto", example_inputs=torch.randn(2, 3, 12, 12))
    assert not any(map(is_lowered, lowered.modules()))
    assert any("found torch.float32" in site.note for site in spre_fx.sites(lowered))
