"""Models of timm: prepared, trained two steps, finalized, and found to agree."""

import copy
import warnings
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from models import kinds, randomise
from torch import nn

import spre_fx
from spre_fx import State, TraceError
from spre_fx.passes import ModulariseCalls, trace

timm = pytest.importorskip("timm", reason="timm is not installed (an optional test extra)")


@pytest.fixture(autouse=True)
def _warnings_of_timm() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def build(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model(name, num_classes=5, **options)).double()


def check(model: nn.Module, size: int = 32) -> tuple[nn.Module, nn.Module]:
    """Train two steps and finalize: both models, after outputs agreed."""
    before = copy.deepcopy(dict(model.state_dict()))
    gm = spre_fx.prepare(model, "1:4")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert gm.state_dict().keys() >= before.keys()
    optimizer = torch.optim.SGD(gm.train().parameters(), 1e-3)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    for _ in range(2):
        optimizer.zero_grad()
        gm(x).square().mean().backward()
        optimizer.step()
    deployed = spre_fx.finalize(gm)
    with torch.no_grad():
        ours, theirs = deployed(x), gm.eval()(x)
    assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()
    return gm, deployed


def states(model: nn.Module) -> Counter[State]:
    return Counter(site.state for site in spre_fx.sites(model))


def types(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


@pytest.mark.parametrize(
    ("name", "sparse"),
    [
        ("resnet10t", {State.SPRE: 10, State.NM: 4, State.SKIPPED: 1}),
        # BatchNormAct2d and Conv2dSame; all 3x3 convs but the stem are depthwise.
        ("tf_mobilenetv3_small_minimal_100", {State.NM: 24, State.SKIPPED: 12}),
        pytest.param("mobilenetv3_small_050", {State.NM: 42, State.SKIPPED: 12}),
        pytest.param(
            *("tf_efficientnet_lite0", {State.NM: 33, State.SKIPPED: 17}), marks=pytest.mark.slow
        ),
        pytest.param(  # squeeze-excite and BatchNormAct2d with SpRe branches
            *("seresnext26ts", {State.NM: 37, State.SPRE: 10, State.SKIPPED: 1}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("regnetx_002", {State.NM: 31, State.SPRE: 13, State.SKIPPED: 1}),
            marks=pytest.mark.slow,
        ),
        pytest.param(  # BatchNormAct2d in front of its conv
            *("resnetv2_18d", {State.NM: 13, State.SPRE: 9, State.SKIPPED: 1}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_model_is_prepared_trained_and_finalized(name: str, sparse: dict[State, int]) -> None:
    gm, deployed = check(build(name))
    assert states(gm) == sparse
    assert types(gm).isdisjoint({"BatchNormAct2d", "Conv2dSame", "TrainingSwitch", "TrainingFlag"})
    assert not {kind for kind in types(deployed) if "NM" in kind or "SpRe" in kind}


def test_the_sum_of_the_branches_comes_before_the_activation_of_a_batch_norm() -> None:
    layers = timm.layers
    model = nn.Sequential(
        layers.Conv2dSame(8, 8, 3, 2), layers.BatchNormAct2d(8), nn.AdaptiveAvgPool2d(1)
    )
    gm = spre_fx.prepare(randomise(model), "1:4")
    targets = [str(getattr(node.target, "__name__", node.target)) for node in gm.graph.nodes]
    assert targets[1] == "pad_same"
    assert targets[-5:] == ["add", "1.drop", "1.act", "2", "output"]
    assert states(gm) == {State.SPRE: 1}


def same(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    for training in True, False, True:
        assert torch.equal(ours.train(training)(x), theirs.train(training)(x))
    expected, found = theirs.state_dict(), ours.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_trace_counts_batches_as_the_batch_norms_of_timm_do() -> None:
    model = build("tf_mobilenetv3_small_minimal_100")
    modularised = ModulariseCalls()(trace(model)).graph_module
    same(modularised, model, torch.randn(2, 3, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nf_resnet26", "ScaledStdConv2d"),
        pytest.param("resnetv2_50x1_bit", "StdConv2d", marks=pytest.mark.slow),
    ],
)
def test_standardised_weights_are_left_dense_with_the_reason(name: str, kind: str) -> None:
    gm, _ = check(build(name))
    (stem, *others) = spre_fx.sites(gm)
    assert stem.note == (
        f"stem.conv: {kind} is a subclass of nn.Conv2d, whose forward may differ. One that comes "
        "down to a single functional call on its own weight and bias is looked through"
    )
    reasons = {site.reason for site in others}
    assert reasons <= {"subclass with its own forward", "inside a module kept whole", None}


def test_what_timm_says_cannot_be_traced_is_kept_whole() -> None:
    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) if x.sum() > 0 else x

    model = nn.Sequential(Marked(), nn.Conv2d(8, 8, 3))
    with pytest.raises(TraceError):
        trace(model)
    timm.layers._fx.register_notrace_module(Marked)
    try:
        assert kinds(trace(model))[1:-1] == ["Marked", "Conv2d"]
    finally:
        timm.layers._fx._leaf_modules.remove(Marked)
