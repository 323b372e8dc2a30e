"""Random networks go through prepare, training and finalize, and compute what they did.

A network is drawn as plain data, so that hypothesis can shrink one that fails, and print it.
"""

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import assert_same, randomise
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d

import spre_fx
from spre_fx import masks

SIZES = {1: 11, 2: 7, 3: 5}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
ACTIVATIONS = {"relu": lambda: nn.ReLU(inplace=True), "silu": nn.SiLU, "tanh": nn.Tanh}


@dataclass(frozen=True)
class Unit:
    """conv -> norm -> activation."""

    options: tuple[tuple[str, Any], ...]
    norm: str | None
    activation: str | None

    def build(self, rank: int) -> nn.Sequential:
        options = dict(self.options)
        layers = [CONVS[rank](**options)]
        if self.norm is not None:
            layers.append(new_norm(self.norm, rank, options["out_channels"]))
        if self.activation is not None:
            layers.append(ACTIVATIONS[self.activation]())
        return nn.Sequential(*layers)


@dataclass(frozen=True)
class Stage:
    """What happens between one feature map and the next."""

    kind: str
    units: tuple[Unit, ...] = ()
    channels: int = 0


@dataclass(frozen=True)
class Plan:
    rank: int
    channels: int
    stages: tuple[Stage, ...]
    head: tuple[int, ...]
    output: str
    seed: int


def new_norm(kind: str, rank: int, channels: int) -> nn.Module:
    if kind == "frozen":
        return FrozenBatchNorm2d(channels)
    options = {"no affine": {"affine": False}, "no statistics": {"track_running_stats": False}}
    return NORMS[rank](channels, **options.get(kind, {}))


class Block(nn.Module):
    """A stage as a module."""

    def __init__(self, stage: Stage, rank: int) -> None:
        super().__init__()
        self.kind = stage.kind
        self.branches = nn.ModuleList(unit.build(rank) for unit in stage.units)
        if stage.kind == "pool":
            self.pool = POOLS[rank](2)
        if stage.kind in ("norm first", "one norm"):
            self.norm = NORMS[rank](stage.channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "sum":
            return sum(branch(x) for branch in self.branches)
        if self.kind in ("concatenation", "dense"):
            start = [x] if self.kind == "dense" else []
            return torch.cat([*start, *(branch(x) for branch in self.branches)], 1)
        y = self.norm(x).relu() if self.kind == "norm first" else x
        for branch in self.branches:
            y = branch(y)
            if self.kind == "one norm":
                y = self.norm(y)
            if self.kind == "shared":
                y = branch(y)
        if self.kind == "pool":
            y = self.pool(y)
        return y + x if self.kind == "residual" else y


class Network(nn.Module):
    """The stages, pooling and linear layers."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.output = plan.output
        self.blocks = nn.ModuleList(Block(stage, plan.rank) for stage in plan.stages)
        self.head = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(plan.head))

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        y = x.movedim(1, -1) if self.output == "map" else x.flatten(2).mean(2)
        for layer in self.head:
            y = layer(y.relu())
        return {"y": y, "more": (x, y.mean())} if self.output == "several" else y


CHANNELS = (8, 16, 12, 10, 6, 5, 4, 3)


@st.composite
def units(
    draw: st.DrawFn, channels: int, sizes: tuple[int, ...], *, out: int | None, keep: bool
) -> tuple[Unit, tuple[int, ...]]:
    """A unit and the sizes of what it computes; `keep`: those of its input."""
    each = [
        draw(_axis(size, keep)) for size in sizes
    ]  # (kernel, stride, padding, dilation) of each axis
    kernel, stride, padding, dilation = (tuple(values) for values in zip(*each, strict=True))
    if draw(st.integers(0, 3)) == 0:
        groups, out = channels, out or channels * draw(st.integers(1, 2))
    else:
        out = out or draw(st.sampled_from(CHANNELS))
        common = [g for g in (1, 1, 2, 4) if channels % g == out % g == 0]
        groups = draw(st.sampled_from(common))
    if out % groups:
        groups = 1
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    if mode in ("reflect", "circular") and any(
        p >= size for p, size in zip(padding, sizes, strict=True)
    ):
        mode = "replicate"
    words: Any = padding
    if keep and draw(st.booleans()):
        words = "same"
    elif not any(padding) and draw(st.booleans()):
        words = "valid"
    options = {
        "in_channels": channels,
        "out_channels": out,
        "kernel_size": kernel,
        "stride": stride,
        "padding": words,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": mode,
    }
    kinds = ["batch"] * 4 + [None, "no affine", "no statistics"] + ["frozen"] * (len(sizes) == 2)
    unit = Unit(
        tuple(options.items()),
        draw(st.sampled_from(kinds)),
        draw(st.sampled_from([None, *ACTIVATIONS])),
    )
    left = zip(sizes, kernel, stride, padding, dilation, strict=True)
    return unit, tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in left)


@st.composite
def _axis(draw: st.DrawFn, size: int, keep: bool) -> tuple[int, int, int, int]:
    kernel, dilation = draw(st.sampled_from([3, 1, 5])), draw(st.integers(1, 2))
    if keep:
        return kernel, 1, dilation * (kernel - 1) // 2, dilation
    kernel = draw(st.sampled_from([kernel, 2, 4]))
    stride, padding = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    if dilation * (kernel - 1) + 1 > size + 2 * padding:
        kernel, dilation = 1, 1
    return kernel, stride, padding, dilation


@st.composite
def stages(
    draw: st.DrawFn, channels: int, sizes: tuple[int, ...]
) -> tuple[Stage, int, tuple[int, ...]]:
    """A stage, and the channels and sizes of what it computes."""

    def unit(taken: int, out: int | None = None, *, keep: bool = True) -> Unit:
        nonlocal sizes
        drawn, after = draw(units(taken, sizes, out=out, keep=keep))
        sizes = after
        return drawn

    def width(drawn: Unit) -> int:
        return dict(drawn.options)["out_channels"]

    kind = draw(
        st.sampled_from(
            ["chain", "residual", "sum", "concatenation", "dense", "shared", "norm first"]
            + ["one norm"]
            + ["pool"] * (min(sizes) > 2)
        )
    )
    if kind == "pool":
        return Stage(kind), channels, tuple(size // 2 for size in sizes)
    if kind in ("shared", "one norm"):
        drawn = [unit(channels, channels) for _ in range(1 + (kind == "one norm"))]
        out = channels
    elif kind == "residual":
        first, out = unit(channels), channels
        drawn = [first, unit(width(first), channels)]
    elif kind == "sum":
        first = unit(channels)
        out = width(first)
        drawn = [first, unit(channels, out)]
    elif kind in ("concatenation", "dense"):
        drawn = [unit(channels), unit(channels)]
        out = sum(map(width, drawn)) + channels * (kind == "dense")
    else:
        drawn = [unit(channels, keep=False)]
        if kind == "chain":
            drawn.append(unit(width(drawn[0]), keep=False))
        out = width(drawn[-1])
    return Stage(kind, tuple(drawn), channels), out, sizes


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    rank = draw(st.sampled_from([2, 1, 3]))
    first = channels = draw(st.sampled_from(CHANNELS))
    sizes, drawn = (SIZES[rank],) * rank, []
    for _ in range(draw(st.integers(2, 5))):
        stage, channels, sizes = draw(stages(channels, sizes))
        drawn.append(stage)
    head = (channels, *draw(st.lists(st.sampled_from(CHANNELS), max_size=2)))
    output = draw(st.sampled_from(["vector", "map", "several"]))
    return Plan(rank, first, tuple(drawn), head, output, draw(st.integers(0, 2**16)))


RAMP = spre_fx.CubicRamp(1, 3)
SEARCH = spre_fx.ChannelPermutation(sweeps=3, progress=False)
METHODS = [
    {"method": "sr-ste"},
    {"method": "sr-ste", "schedule": spre_fx.EveryK(2)},
    {"method": spre_fx.SRSTE(decay=0.1), "schedule": spre_fx.Freeze(at=1)},
    {"method": "asp"},
    {"method": "asp", "spre_gamma": 1.0},
    {"method": spre_fx.ASP(permute=SEARCH)},
    {"method": "lbc", "schedule": RAMP},
]
OPTIONS = st.fixed_dictionaries(
    {
        "pattern": st.sampled_from(["1:4", "2:4", "3:5", "1:8", "1:2"]),
        "how": st.sampled_from(METHODS),
        "branch": st.sampled_from(["spre", "spre", "same", "inverse", None]),
        "depthwise": st.sampled_from([None, "flat"]),
    }
)


def names_of_layers(model: nn.Module) -> list[str]:
    return sorted(n for n, m in model.named_modules() if isinstance(m, _ConvNd | nn.Linear))


def train(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        outputs = [y for y in tree_leaves(model(x)) if y.requires_grad]
        torch.stack([(y - torch.randn_like(y)).square().mean() for y in outputs]).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def check(plan: Plan, options: dict[str, Any]) -> None:
    torch.manual_seed(plan.seed)
    model = randomise(Network(plan)).double()
    x = torch.randn(3, plan.channels, *[SIZES[plan.rank]] * plan.rank).double()
    before, described = copy.deepcopy(model.state_dict()), repr(model)
    how = {key: value for key, value in options.items() if key not in ("pattern", "how")}
    try:
        prepared = spre_fx.prepare(model, options["pattern"], **how, **options["how"])
    except spre_fx.ModelError as error:
        if "nothing to sparsify" not in str(error):
            raise
        return
    assert sorted(site.name for site in spre_fx.sites(prepared)) == names_of_layers(model)
    train(prepared, x)
    deployed = spre_fx.finalize(prepared)
    assert_same(model.state_dict(), before)
    assert repr(model) == described

    assert sorted(site.name for site in spre_fx.sites(deployed)) == names_of_layers(model)
    for site in spre_fx.sites(deployed):
        if site.pattern is not None:
            weight = deployed.get_submodule(site.name).weight
            assert masks.obeys(weight, spre_fx.Pattern.parse(site.pattern)), site
    with torch.no_grad():
        trained, final = tree_leaves(prepared.eval()(x)), tree_leaves(deployed(x))
    for expected, found in zip(trained, final, strict=True):
        assert expected.isfinite().all()
        assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


def runs(count: int) -> Any:
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@runs(25)
@given(plans(), OPTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_finalized_random_networks_compute_what_was_trained(plan, options):
    check(plan, options)


@pytest.mark.slow
@runs(3000)
@given(plans(), OPTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_thousands_of_random_networks(plan, options):
    check(plan, options)
