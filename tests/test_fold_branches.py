"""FoldBranches: bn(conv) + bn_spre(conv_spre) becomes one N:M conv (Eq. 10), proved or refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    MODELS,
    Hooked,
    Model,
    Residual,
    SharedConv,
    assert_same,
    chain,
    conv_bn,
    kinds,
    node_of,
    prepare,
    randomise,
    reasons,
    run,
)
from torch import Tensor, nn
from torch.fx import GraphModule
from torchvision.ops import FrozenBatchNorm2d

import spre_fx
from spre_fx import (
    ASP,
    SRSTE,
    EveryK,
    EveryStep,
    Freeze,
    InvariantError,
    Pattern,
    SpRe,
    VerificationError,
    masks,
    records,
)
from spre_fx.modules import NMLayer
from spre_fx.passes import FoldBranches, Policy, fold_branches, trace, training_pipeline

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
FOLD = FoldBranches()


@st.composite
def sites(draw: st.DrawFn) -> dict[str, Any]:
    """A conv with or without a batch norm, how it is made sparse, and the size of an input."""
    rank = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * rank))

    kernel, dilation, padding = each(1, 5 if rank < 3 else 3), each(1, 2), each(0, 2)
    groups, m = draw(st.integers(1, 2)), draw(st.sampled_from([2, 3, 4, 8]))
    reach = zip(kernel, dilation, padding, each(1, 4), strict=True)
    return {
        "conv": {
            "in_channels": groups * draw(st.integers(1, 9)),
            "out_channels": groups * draw(st.integers(1, 4)),
            "kernel_size": kernel,
            "stride": each(1, 3),
            "dilation": dilation,
            "padding": padding,
            "groups": groups,
            "bias": draw(st.booleans()),
            "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        },
        "norm": draw(
            st.sampled_from(["affine", "plain", "none", "sync"] + ["frozen"] * (rank == 2))
        ),
        "size": tuple(max(d * (k - 1) + 1, p + 1) + more for k, d, p, more in reach),
        "pattern": Pattern(draw(st.integers(1, m - 1)), m),
        "method": draw(st.sampled_from([SRSTE(), ASP()])),
        "schedule": draw(st.sampled_from([EveryStep(), EveryK(3), Freeze(at=0)])),
        "branch": draw(st.sampled_from([SpRe(), None])),
        "training": draw(st.booleans()),
    }


def prepare_site(site: dict[str, Any]) -> GraphModule:
    rank = len(site["size"])
    conv = CONVS[rank - 1](**site["conv"])
    norm = {
        "affine": NORMS[rank - 1],
        "plain": lambda features: NORMS[rank - 1](features, affine=False),
        "none": lambda features: nn.ReLU(),
        "sync": nn.SyncBatchNorm,
        "frozen": FrozenBatchNorm2d,
    }[site["norm"]](conv.out_channels)
    passes = training_pipeline(
        *(Policy(site["pattern"]), site["method"], site["schedule"]),
        **{"branch": site["branch"], "gamma": site["method"].spre_gamma},
    )
    gm = randomise(passes(trace(chain(conv=conv, norm=norm)))[0])
    nn.init.normal_(gm.conv.weight)  # masks that are kept are no longer those of the weights
    return gm.double().train(site["training"])


def obeys(weight: Tensor, pattern: Pattern) -> bool:
    """By definition: group by group, filter by filter, tap by tap."""
    groups = weight.movedim(1, -1).reshape(-1, weight.shape[1]).split(pattern.m, dim=1)
    return all(int(group.count_nonzero(dim=1).max()) <= pattern.n for group in groups)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def check(site: dict[str, Any]) -> None:
    torch.manual_seed(0)
    gm = prepare_site(site)
    folded = FOLD(gm).graph_module
    x = torch.randn(2, gm.conv.in_channels, *site["size"], dtype=torch.float64)
    assert_close(folded.eval()(x), gm.eval()(x))
    if isinstance(gm.conv, NMLayer):
        assert obeys(folded.conv.weight, site["pattern"])
    left = ["ReLU"] if site["norm"] == "none" else []
    assert kinds(folded)[1:-1] == [CONVS[len(site["size"]) - 1].__name__, *left]


@settings(max_examples=25, derandomize=True)
@given(sites())
def test_the_folded_conv_is_its_branches_and_obeys_the_pattern(site: dict[str, Any]) -> None:
    check(site)


@pytest.mark.slow
@settings(max_examples=2000, derandomize=True)
@given(sites())
def test_the_folded_conv_is_its_branches_for_many_more_sites(site: dict[str, Any]) -> None:
    check(site)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_every_model_computes_the_same_folded_and_not(build: Callable[[], nn.Module]) -> None:
    model = build()
    gm = prepare(model, schedule=EveryK(2)).double()
    x = torch.randn(model.shape, dtype=torch.float64)
    expected, found = (run(each, x, training=False) for each in (gm, FOLD(gm).graph_module))
    for name in (name for name in expected if name.startswith("output")):
        assert_close(found[name], expected[name])


def test_ops_before_and_after() -> None:
    gm = prepare(Residual(), schedule=EveryK(2))
    assert kinds(gm).count("SpReConv2d") == 2
    result = FOLD(gm)
    assert kinds(result.graph_module) == [
        *("placeholder", "Conv2d", "ReLU", "Conv2d", "Conv2d", "add", "ReLU"),
        *("adaptive_avg_pool2d", "flatten", "Linear", "output"),
    ]
    assert result.account.applied == ("conv1", "conv2", "shortcut.conv", "fc")
    assert list(result.graph_module.state_dict()) == [
        f"{layer}.{name}" for layer in result.account.applied for name in ("weight", "bias")
    ]
    assert records.read(result.graph_module.conv1) == {"pattern": "1:4"}


def test_the_merged_kernel_is_that_of_eq_10() -> None:
    gm = prepare(conv_bn()).double()
    conv, bn, spre, bn_spre = gm.conv, gm.bn, gm.conv_spre, gm.bn_spre
    W, P = conv.weight.detach(), Pattern(1, 4)
    B, taps = masks.nm_mask(W, P), masks.live_taps(W, P)
    scale, scale_spre = (n.weight / (n.running_var + n.eps).sqrt() for n in (bn, bn_spre))
    weight = scale.view(-1, 1, 1, 1) * B * W
    weight = weight + scale_spre.view(-1, 1, 1, 1) * B * taps * spre.weight
    bias = bn.bias + scale * (conv.bias - bn.running_mean)
    bias = bias + bn_spre.bias + scale_spre * (spre.bias - bn_spre.running_mean)
    folded = FOLD(gm).graph_module.conv
    assert torch.allclose(folded.weight, weight, rtol=1e-13, atol=1e-15)
    assert torch.allclose(folded.bias, bias, rtol=1e-13, atol=1e-13)


def test_no_live_tap_at_all_leaves_the_constant_of_its_batch_norm() -> None:
    gm = prepare(conv_bn()).double()
    with torch.no_grad():
        strong = torch.arange(8) % 4 == 0
        gm.conv.weight.copy_(torch.where(strong, 5.0, 0.1).view(1, 8, 1, 1).expand(8, 8, 3, 3))
    assert not masks.live_taps(gm.conv.weight.detach(), Pattern(1, 4)).any()
    folded = FOLD(gm).graph_module
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    main = gm.bn(gm.eval().conv(x)[0])
    constant = gm.bn_spre(gm.conv_spre.bias.view(1, -1, 1, 1))
    assert_close(folded.eval()(x), (main + constant).relu())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 3e-3)]
)
def test_shorter_types_stay_and_agree_to_their_precision(
    dtype: torch.dtype, tolerance: float
) -> None:
    gm = prepare(conv_bn()).to(dtype)
    folded = FOLD(gm).graph_module
    assert folded.conv.weight.dtype is folded.conv.bias.dtype is dtype
    x = torch.randn(2, 8, 6, 6).to(dtype)
    expected = gm.double().eval()(x.double())
    assert_close(folded.eval()(x).double(), expected, tolerance)


def test_running_statistics_count_whatever_the_mode() -> None:
    gm = prepare(Model())
    train, evaluation = (FOLD(gm.train(mode)).graph_module for mode in (True, False))
    assert (train.training, evaluation.training) == (True, False)
    assert_same(dict(train.state_dict()), dict(evaluation.state_dict()))


def test_dense_convs_are_folded_and_keep_the_reason_they_are_dense() -> None:
    gm = prepare(chain(conv=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8)))
    result = FOLD(gm)
    assert result.account.applied == ("conv",)
    assert kinds(result.graph_module) == ["placeholder", "Conv2d", "output"]
    assert records.read(result.graph_module.conv) == records.read(gm.conv)
    assert records.read(gm.conv)["reason"] == "fewer input channels than M"


def test_what_is_neither_sparse_nor_a_site_is_skipped_in_words() -> None:
    result = FOLD(trace(SharedConv()))
    assert reasons(result)["conv1"] == "called more than once: conv1: is called 2 times"
    result = FOLD(trace(chain(conv=nn.Conv2d(8, 8, 3), act=nn.ReLU())))
    assert reasons(result) == {"conv": "no batch norm: conv: feeds ReLU, not a batch norm"}


def second_user_of(name: str) -> Callable[[GraphModule], None]:
    def tamper(gm: GraphModule) -> None:
        output = node_of(gm, "output")
        output.args = ((output.args[0], node_of(gm, name)),)

    return tamper


def insert_behind(name: str) -> Callable[[GraphModule], None]:
    def tamper(gm: GraphModule) -> None:
        node = node_of(gm, name)
        with gm.graph.inserting_after(node):
            new = gm.graph.call_function(torch.neg, (node,))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    return tamper


def replace_bn_spre(new: nn.Module) -> Callable[[GraphModule], None]:
    return lambda gm: setattr(gm, "bn_spre", new)


@pytest.mark.parametrize(
    "tamper",
    [
        *(second_user_of(name) for name in ("bn", "bn_spre", "conv_spre", "conv_y")),
        *(second_user_of(name) for name in ("conv_nm_mask", "conv_spre_mask")),
        *(insert_behind(name) for name in ("conv_y", "conv_spre", "bn", "bn_spre")),
        replace_bn_spre(nn.GroupNorm(2, 8)),
        replace_bn_spre(nn.BatchNorm2d(8, track_running_stats=False)),
    ],
)
def test_a_graph_that_is_not_what_prepare_built_is_refused_in_words(
    tamper: Callable[[GraphModule], None],
) -> None:
    gm = prepare(conv_bn())
    tamper(gm)
    gm.recompile()
    gm(torch.randn(2, 8, 6, 6))
    with pytest.raises(InvariantError, match=r"^conv(_spre)?: expected .*, found .*\. [A-Z]"):
        FOLD(gm)


def wrong(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], drop: int = 0) -> Any:
    merge = fold_branches.merge
    return lambda branches: change(*merge(branches[: len(branches) - drop]))


@pytest.mark.parametrize(
    ("merge", "said"),
    [
        (wrong(lambda w, b: (w * (1 + 1e-8), b)), "outputs to agree"),
        (wrong(lambda w, b: (w, b + 1e-8)), "outputs to agree"),
        (wrong(lambda w, b: (w, b), drop=1), "outputs to agree"),
        (wrong(lambda w, b: (w.roll(1, 0), b)), "outputs to agree"),
        (wrong(lambda w, b: (w.transpose(2, 3), b)), "outputs to agree"),
        (wrong(lambda w, b: (w * torch.nan, b)), "outputs to agree"),
        (wrong(lambda w, b: (w + 1e-14, b)), "at most 1 non-zeros in every 4"),
    ],
)
def test_a_wrong_fold_is_refused_and_makes_no_model(
    merge: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm = prepare(conv_bn())
    before = copy.deepcopy(gm)
    monkeypatch.setattr(fold_branches, "merge", merge)
    with pytest.raises(VerificationError, match=rf"^conv: expected .*{said}.*No model was made"):
        FOLD(gm)
    assert gm.code == before.code
    assert_same(dict(gm.state_dict()), dict(before.state_dict()))


def test_hooks_see_what_the_layer_computes_in_training_and_when_deployed() -> None:
    model = Hooked()
    seen: list[Tensor] = []
    model.conv1.register_forward_hook(lambda _, __, y: seen.append(y))
    gm = prepare(model, schedule=EveryK(2)).double()
    assert kinds(gm).count("SpReConv2d") == 0
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    gm.train()(x).sum().backward()
    expected = gm.eval()(x)
    result = FOLD(gm)
    assert result.account.applied == ("conv1", "conv2", "conv3")
    found = result.graph_module.eval()(x)
    assert_close(found, expected)
    assert_close(seen[2], seen[1])
    assert [type(y) for y in seen] == [Tensor] * 3
    assert kinds(result.graph_module).count("BatchNorm2d") == 2


def test_a_parametrised_layer_trains_and_stays_as_it_is() -> None:
    model = MODELS["ParametrisedOtherwise"]()
    gm = prepare(model, schedule=EveryK(2)).double()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    before = gm.conv2.parametrizations.weight.original.detach().clone()
    optimizer = torch.optim.SGD(gm.parameters(), 0.1)
    gm(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(gm.conv2.parametrizations.weight.original, before)
    result = FOLD(gm.eval())
    assert set(reasons(result)) == {"conv2", "conv3"}
    assert_close(result.graph_module(x), gm(x))
    assert torch.equal(result.graph_module.conv2.weight, gm.conv2.weight)
    assert type(result.graph_module.conv3) is type(model.conv3)


def test_weight_norm_by_a_hook_stays_as_it_is_and_trains() -> None:
    model = Model()
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model.conv1)
    gm = spre_fx.prepare(model.double(), "1:4")
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    before = gm.conv1.weight_v.detach().clone()
    optimizer = torch.optim.SGD(gm.parameters(), 0.1)
    gm(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(gm.conv1.weight_v, before)
    (conv1, _) = spre_fx.sites(gm)
    assert conv1.reason == "parametrised weight"
    deployed = spre_fx.finalize(gm)
    assert_close(deployed(x), gm.eval()(x))
    assert {"conv1.weight_g", "conv1.weight_v"} <= deployed.state_dict().keys()
