"""Each kind of node that the engine runs, against the graph, and those like it that it cannot."""

import copy
from collections.abc import Callable

import pytest
import torch
from test_planned_graph import assert_same, conv, graph_of
from torch import Tensor, nn
from torch.nn import functional as F

from spre_fx import engine
from spre_fx.dense_form import to_dense
from spre_fx.passes.planned_graph import planned

pytestmark = pytest.mark.skipif(engine.load() is None, reason="needs the engine")

Forward = Callable[[nn.Module, Tensor], Tensor]


class Then(nn.Module):
    """A packed conv and what follows."""

    def __init__(self, forward: Forward, layer: nn.Module | None) -> None:
        super().__init__()
        self.conv, self.layer = conv(8, 24), layer or nn.Identity()
        self.then = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, self.conv(x))


def steps(forward: Forward, layer: nn.Module | None = None, side: int = 11) -> list[str]:
    """The kinds of steps after the conv, of a plan that computes what its graph does."""
    gm = graph_of(Then(forward, layer))
    model = planned(copy.deepcopy(gm))
    x = torch.randn(2, 8, side, side - 2)
    assert_same(model(x), gm(x))
    return [row.kind for row in model.plan(x).rows][1:]


def call(m: nn.Module, x: Tensor) -> Tensor:
    return m.layer(x)


LAYERS: dict[str, tuple[nn.Module, str]] = {
    "max": (nn.MaxPool2d(2), "max pool"),
    "max, padded": (nn.MaxPool2d(3, 2, 1), "max pool"),
    "max, ceil": (nn.MaxPool2d(3, 2, ceil_mode=True), "max pool"),
    "max, dilated": (nn.MaxPool2d((3, 2), (2, 1), (1, 0), (2, 1)), "max pool"),
    "average": (nn.AvgPool2d(3, 2, 1), "average pool"),
    "average of those inside": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), "average pool"),
    "average, ceil": (nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False), "average pool"),
    "average, ceil, padding counts": (nn.AvgPool2d(2, ceil_mode=True), "torch"),
    "average, divided": (nn.AvgPool2d(2, divisor_override=3), "torch"),
    "global": (nn.AdaptiveAvgPool2d(1), "average pool"),
    "adaptive": (nn.AdaptiveAvgPool2d(3), "torch"),
    "batch norm": (nn.BatchNorm2d(24), "affine"),
    "batch norm, not affine": (nn.BatchNorm2d(24, affine=False), "affine"),
    "batch norm, no statistics": (nn.BatchNorm2d(24, track_running_stats=False), "torch"),
    "depthwise": (conv(24, 24, 5, groups=24), "depthwise conv"),
    "depthwise, dilated": (nn.Conv2d(24, 24, 3, groups=24, dilation=2), "depthwise conv"),
    "depthwise, no bias": (conv(24, 24, groups=24, stride=2, bias=False), "depthwise conv"),
    "depthwise, reflect": (conv(24, 24, groups=24, padding_mode="reflect"), "torch"),
    "group norm": (nn.GroupNorm(3, 24), "torch"),
}


@pytest.mark.parametrize(("layer", "kind"), LAYERS.values(), ids=LAYERS)
@pytest.mark.filterwarnings("ignore:.*even kernel lengths")
def test_layers(layer: nn.Module, kind: str) -> None:
    assert steps(call, layer) == [kind]
    fused = [kind, "torch"] if kind == "torch" else [f"{kind} + relu"]
    assert steps(lambda m, x: m.layer(x).relu(), layer)[:2] in (fused, ["torch", "affine + relu"])


FUNCTIONS: dict[str, tuple[Forward, list[str]]] = {
    "max_pool2d": (lambda m, x: F.max_pool2d(x, 3, stride=2, padding=1), ["max pool"]),
    "max_pool2d, defaults": (lambda m, x: F.max_pool2d(x, 2), ["max pool"]),
    "avg_pool2d": (lambda m, x: F.avg_pool2d(x, 3, 1), ["average pool"]),
    "adaptive_avg_pool2d": (lambda m, x: F.adaptive_avg_pool2d(x, (1, 1)), ["average pool"]),
    "mean": (lambda m, x: x.mean((2, 3)), ["average pool"]),
    "mean, kept": (lambda m, x: torch.mean(x, [-1, -2], keepdim=True), ["average pool"]),
    "mean over another axis": (lambda m, x: x.mean((1, 3)), ["torch"]),
    "flattened": (lambda m, x: torch.flatten(F.adaptive_avg_pool2d(x, 1), 1), ["average pool"]),
    "numbers without an axis": (lambda m, x: F.relu(x.sum()) + x.mean(), ["torch"] * 4),
    "sum": (lambda m, x: F.avg_pool2d(x, 1) + x, ["average pool", "affine + residual"]),
    "sum, in place": (
        lambda m, x: F.relu_(F.avg_pool2d(x, 1).add_(x)),
        ["average pool", "affine + residual + relu"],
    ),
    "twice": (lambda m, x: (y := F.max_pool2d(x, 2)) + y, ["max pool", "affine + residual"]),
    "broadcast sum": (lambda m, x: x.mean((2, 3), keepdim=True) + x, ["average pool", "torch"]),
    "cat": (
        lambda m, x: torch.cat([F.max_pool2d(x, 1), F.avg_pool2d(x, 1)], dim=1),
        ["max pool", "average pool"],
    ),
    "cat of one thing twice": (
        lambda m, x: torch.cat([y := F.max_pool2d(x, 2), y], 1),
        ["max pool", "copy", "copy"],
    ),
    "cat of two cats": (
        lambda m, x: torch.cat([torch.cat([x, F.max_pool2d(x, 1)], 1), F.avg_pool2d(x, 1)], 1),
        ["max pool", "average pool"],
    ),
    "cat along rows": (lambda m, x: torch.cat([x, x], 2), ["torch"]),
    "activation of two readers": (
        lambda m, x: F.hardswish(y := F.max_pool2d(x, 2)) + y,
        ["max pool", "affine + hardswish", "affine + residual"],
    ),
}


@pytest.mark.parametrize(("forward", "kinds"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions(forward: Forward, kinds: list[str]) -> None:
    assert steps(forward) == kinds


def test_types_that_the_engine_does_not_know_run_in_torch() -> None:
    assert steps(lambda m, x: F.max_pool2d(x.double(), 2).float()) == ["torch"] * 3


BFLOAT16: dict[str, tuple[nn.Module, str]] = {
    "stem": (conv(3, 8, 5, stride=2), "dense conv"),
    "stem of an even row": (conv(3, 8, 4), "dense conv"),
    "depthwise": (nn.Sequential(conv(8, 8, groups=8)), "depthwise conv"),
    "batch norm": (nn.BatchNorm2d(8), "affine"),
}


@pytest.mark.skipif(getattr(engine.load(), "isa", "") != "avx512_bf16", reason="needs bfloat16")
@pytest.mark.parametrize(("layer", "kind"), BFLOAT16.values(), ids=BFLOAT16)
def test_bfloat16(layer: nn.Module, kind: str) -> None:
    before = [] if kind == "dense conv" else [conv(8, 8)]
    gm = graph_of(nn.Sequential(*before, copy.deepcopy(layer), conv(8, 8)).bfloat16())
    model = planned(copy.deepcopy(gm))
    x = torch.randn(2, 8 if before else 3, 15, 17).bfloat16()
    exact = to_dense(gm).float()(x.float())
    torch.testing.assert_close(model(x).float(), exact, rtol=0.02, atol=0.02)
    assert kind in [row.kind for row in model.plan(x).rows]


DENSE: dict[str, tuple[nn.Module, str]] = {
    "stem": (conv(3, 20, 5, stride=2), "dense conv"),
    "many channels": (conv(50, 20, 3), "dense conv"),
    "1x1": (conv(24, 20, 1), "dense conv"),
    "dilation": (conv(8, 20, 3, dilation=2), "torch"),
    "groups": (conv(8, 20, 3, groups=2), "torch"),
}


@pytest.mark.parametrize(("layer", "kind"), DENSE.values(), ids=DENSE)
def test_dense_convs_without_groups_and_dilation_are_the_engines(
    layer: nn.Conv2d, kind: str
) -> None:
    gm = graph_of(nn.Sequential(copy.deepcopy(layer), conv(20, 8)))
    gm.set_submodule("0", copy.deepcopy(layer).requires_grad_(False))  # not packed
    model = planned(copy.deepcopy(gm))
    x = torch.randn(2, layer.in_channels, 15, 17)
    assert_same(model(x), gm(x))
    assert model.plan(x).rows[0].kind == kind
