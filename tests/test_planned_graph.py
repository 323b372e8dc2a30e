"""Planned graphs compute what their graphs do: small networks of every kind, and every other use."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import randomise
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import spre_fx
from spre_fx import engine
from spre_fx.passes import FuseEpilogues, trace
from spre_fx.passes.edit import replace_module
from spre_fx.passes.planned_graph import PlannedGraphModule, planned
from spre_fx.packed_layers import PackedConv2d, PackedLinear

pytestmark = pytest.mark.skipif(engine.load() is None, reason="needs the engine")


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class ResNet(nn.Module):
    """A stem, max pooling, two residual blocks and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = conv(3, 24, 7, stride=2), nn.MaxPool2d(3, 2, 1)
        self.a1, self.a2 = conv(24, 24), conv(24, 24)
        self.b1, self.b2, self.down = (
            conv(24, 40, stride=2),
            conv(40, 40),
            conv(24, 40, 1, stride=2),
        )
        self.average, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(40, 7)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.stem(x)))
        x = self.relu(self.a2(self.relu(self.a1(x))) + x)
        out = self.b2(self.relu(self.b1(x)))
        x = self.relu(out + self.down(x))
        return self.fc(torch.flatten(self.average(x), 1))


class MobileNet(nn.Module):
    """Inverted residuals with depthwise convs, hardswish and squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 16, stride=2), nn.Hardswish())
        self.expand = nn.Sequential(conv(16, 56, 1), nn.ReLU6())
        self.depthwise = nn.Sequential(conv(56, 56, groups=56), nn.ReLU6())
        self.squeeze, self.excite = conv(56, 8, 1), conv(8, 56, 1)
        self.project = conv(56, 16, 1)
        self.strided = conv(16, 16, 5, stride=2, groups=16)
        self.drop, self.fc = nn.Dropout(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(self.expand(x))
        scale = F.adaptive_avg_pool2d(y, 1)
        y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(scale))))
        x = F.silu(self.strided(x + self.project(y)))
        return self.fc(self.drop(x.mean([2, 3])))


class DenseNet(nn.Module):
    """Batch norms before convs, and concatenations of all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + 12 * i) for i in range(4))
        self.convs = nn.ModuleList(conv(16 + 12 * i, 12) for i in range(3))
        self.transition, self.pool = conv(52, 20, 1), nn.AvgPool2d(2)
        self.branch, self.fc = conv(20, 9, 1), nn.Linear(29, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, layer in zip(self.norms, self.convs, strict=False):
            features.append(layer(F.relu(norm(torch.cat(features, 1)))))
        x = self.pool(self.transition(F.relu(self.norms[3](torch.cat(features, 1)))))
        x = torch.cat([self.branch(x), x], 1)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class Odd(nn.Module):
    """Several outputs, values used twice, what only torch runs, views and in-place operations."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = conv(8, 20), conv(20, 20), conv(20, 12, 1)
        self.norm = nn.GroupNorm(4, 20)

    def forward(self, x: Tensor, scale: float = 2.0) -> Any:
        a = self.one(x)
        b, c = self.norm(self.two(a)).chunk(2, dim=1)
        d = torch.cat([b, a, c, x], 1)
        e = self.three(self.two(a) * scale)
        f = a.reshape(a.size(0), -1)
        a = a.mul_(0.5)
        return {"a": a, "list": [d, e], "f": f.sum(1)}, (e.relu(), x.shape[2], None)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (ResNet, (2, 3, 40, 40)),
    "mobilenet": (MobileNet, (2, 3, 24, 24)),
    "densenet": (DenseNet, (2, 3, 12, 12)),
    "odd": (Odd, (2, 8, 9, 7)),
}
over_models = pytest.mark.parametrize(("build", "shape"), MODELS.values(), ids=MODELS)


def graph_of(model: nn.Module) -> GraphModule:
    """The fused graph of a model, with convs and linears of 8 inputs and more packed."""
    torch.manual_seed(0)
    graph_module = trace(randomise(model).eval())
    for name, layer in list(graph_module.named_modules()):
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels >= 8:
            replace_module(graph_module, name, PackedConv2d.from_dense(layer))
        elif isinstance(layer, nn.Linear):
            replace_module(graph_module, name, PackedLinear.from_dense(layer))
    return FuseEpilogues()(graph_module.requires_grad_(False)).graph_module


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, check_stride=False)


@over_models
def test_a_program_computes_what_its_graph_does(
    build: type[nn.Module], shape: tuple[int, ...]
) -> None:
    gm = graph_of(build())
    program = planned(copy.deepcopy(gm))
    assert isinstance(program, PlannedGraphModule)
    for sizes in (shape, (1, *shape[1:]), (3, shape[1], shape[2] + 8, shape[3] + 4), shape):
        x = torch.randn(sizes)
        for layout in (torch.contiguous_format, torch.channels_last):
            given = x.to(memory_format=layout)
            before = given.clone()
            assert_same(program(given), gm(x.clone()))
            assert program.why_not == ""
            assert torch.equal(given, before)


@over_models
def test_a_program_agrees_with_float64(build: type[nn.Module], shape: tuple[int, ...]) -> None:
    gm = graph_of(build())
    x = torch.randn(shape)
    exact = spre_fx.to_dense(gm).double()(x.double())
    found = planned(gm)(x)
    for one, other in zip(
        torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(exact)
    ):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_a_residual_network_is_one_call_of_the_engine_in_little_memory() -> None:
    program = planned(graph_of(ResNet()))
    plan = program.plan(torch.randn(2, 3, 40, 40))
    assert plan.engine_calls == 1
    assert {row.kind for row in plan.rows} == {
        "dense conv + relu",
        "max pool",
        "sparse conv",
        "sparse conv + relu",
        "sparse conv + residual + relu",
        "average pool",
    }
    assert plan.arena < 0.65 * plan.activations
    assert "1 calls of the engine" in str(plan)


def test_concatenations_are_written_in_place() -> None:
    plan = planned(graph_of(DenseNet())).plan(torch.randn(2, 3, 12, 12))
    assert plan.engine_calls == 1
    kinds = [row.kind for row in plan.rows]
    assert kinds.count("affine + relu") == 4
    assert "copy" not in kinds
