"""The matcher: which convs are sites, and the sentence for each that is none."""

from collections.abc import Callable

import pytest
import torch
from models import (
    Attention,
    AuxiliaryHead,
    CustomForward,
    DeadOutput,
    FunctionalConv,
    KeywordCall,
    Model,
    OtherUsers,
    Residual,
    SharedBatchNorm,
    SharedConv,
    SumIntoBatchNorm,
    TiedBatchNorms,
    TiedConvs,
    Transposed,
    chain,
    conv_bn,
    node_of,
    prepare,
)
from torch import Tensor, nn
from torch.fx import GraphModule
from torchvision.ops import FrozenBatchNorm2d

from spre_fx import Pattern
from spre_fx.passes import DuplicateBranches, Policy, Reason, Site, Skip, match_site, trace
from spre_fx.passes.graph_view import GraphView


def match(graph_module: GraphModule, name: str) -> Site | Skip:
    view = GraphView(graph_module)
    return match_site(view, view.candidates[name])


class Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OutputOfTwo(Model):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv1(x)
        return y, self.bn1(y)


@pytest.mark.parametrize(
    ("build", "name", "reason", "detail"),
    [
        (
            Attention,
            "attention.out_proj",
            Reason.NOT_CALLED,
            "is run by attention, which is kept whole",
        ),
        (Residual, "fc", Reason.LINEAR, "a linear layer has no taps, no SpRe branch"),
        (SharedConv, "conv1", Reason.CALLED_TWICE, "is called 2 times"),
        (
            OtherUsers,
            "conv1",
            Reason.OTHER_USERS,
            "has an output that 2 nodes use (bn1, add)",
        ),
        (
            OutputOfTwo,
            "conv1",
            Reason.OTHER_USERS,
            "has an output that 2 nodes use (bn1, output)",
        ),
        (DeadOutput, "conv1", Reason.OTHER_USERS, "has an output that nothing uses"),
        (SumIntoBatchNorm, "conv1", Reason.NO_BN, "feeds add, not a batch norm"),
        (SumIntoBatchNorm, "conv2", Reason.NO_BN, "feeds add, not a batch norm"),
        (
            lambda: chain(conv=nn.Conv2d(8, 8, 3), act=nn.ReLU()),
            "conv",
            Reason.NO_BN,
            "feeds ReLU, not a batch norm",
        ),
        (
            lambda: chain(conv=nn.Conv2d(8, 8, 3), norm=nn.GroupNorm(2, 8)),
            "conv",
            Reason.NO_BN,
            "feeds GroupNorm, not a batch norm",
        ),
        (
            lambda: chain(conv=nn.Conv2d(8, 8, 3)),
            "conv",
            Reason.NO_BN,
            "feeds the output, not a batch norm",
        ),
        (
            lambda: chain(conv=nn.Conv2d(8, 8, 3), norm=Doubled(8)),
            "conv",
            Reason.BN_UNKNOWN,
            "is followed by norm, a Doubled, which is no known batch norm",
        ),
        (
            SharedBatchNorm,
            "conv2",
            Reason.BN_CALLED_TWICE,
            "is followed by bn1, which is called 2 times",
        ),
        (
            TiedBatchNorms,
            "conv2",
            Reason.SHARED_PARAMETER,
            "is followed by bn2: its weight is shared by bn1, bn2",
        ),
        (
            lambda: chain(conv=nn.Conv2d(8, 8, 3), bn=nn.BatchNorm2d(8, track_running_stats=False)),
            "conv",
            Reason.BN_NO_STATISTICS,
            "is followed by bn, which has no running statistics",
        ),
    ],
)
def test_a_conv_that_is_no_site_is_refused_in_words(
    build: Callable[[], nn.Module], name: str, reason: Reason, detail: str
) -> None:
    assert match(trace(build()), name) == Skip(reason, f"{name}: {detail}")


@pytest.mark.parametrize(
    ("build", "reason"),
    [(Transposed, Reason.TRANSPOSED), (CustomForward, Reason.CUSTOM_FORWARD)],
)
def test_a_conv_that_no_plain_conv_can_stand_for_is_no_site(
    build: Callable[[], nn.Module], reason: Reason
) -> None:
    skip = match(trace(build()), "conv1")
    assert isinstance(skip, Skip)
    assert skip.reason is reason
    assert skip.detail.startswith("conv1: ")


def test_a_conv_that_is_never_called_is_refused_in_words() -> None:
    gm = trace(Model())
    gm.add_module("never", nn.Conv2d(8, 8, 3))
    detail = "never: is never called in the traced forward"
    assert match(gm, "never") == Skip(Reason.NOT_CALLED, detail)


def test_a_functional_conv_is_refused_in_words() -> None:
    view = GraphView(trace(FunctionalConv()))
    (call,) = [candidate for candidate in view.candidates.values() if candidate.module is None]
    detail = f"{call.name}: is a functional call, not a module"
    assert match_site(view, call) == Skip(Reason.FUNCTIONAL, detail)


class BatchNormOfTwoNames(Model):
    """One batch norm module under two names, each called once."""

    def __init__(self) -> None:
        super().__init__()
        self.bn2 = self.bn1


def test_a_batch_norm_under_two_names_is_called_twice() -> None:
    skip = match(trace(BatchNormOfTwoNames()), "conv1")
    assert isinstance(skip, Skip)
    assert skip.reason is Reason.BN_CALLED_TWICE


@pytest.mark.parametrize(
    ("conv", "bn"),
    [
        *((nn.Conv2d(8, 8, kernel, padding=2), nn.BatchNorm2d(8)) for kernel in (1, 2, 3, 5)),
        *((nn.Conv2d(8, 8, kernel), nn.BatchNorm2d(8)) for kernel in ((1, 6), (5, 1), (2, 3))),
        *((nn.Conv2d(8, 16, 3, groups=groups), nn.BatchNorm2d(16)) for groups in (2, 4, 8)),
        (nn.Conv2d(8, 8, 3, stride=2, dilation=2, padding_mode="circular"), nn.BatchNorm2d(8)),
        (nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False)),
        (nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, momentum=None)),
        (nn.Conv2d(8, 8, 3), FrozenBatchNorm2d(8)),
        (nn.Conv2d(8, 8, 3), nn.SyncBatchNorm(8)),
        (nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8)),
        (nn.Conv1d(8, 8, 3), nn.SyncBatchNorm(8)),
        (nn.Conv3d(8, 8, (1, 3, 3)), nn.BatchNorm3d(8)),
    ],
)
def test_a_conv_and_its_batch_norm_are_a_site(conv: nn.Module, bn: nn.Module) -> None:
    site = match(trace(chain(conv=conv, bn=bn)), "conv")
    assert isinstance(site, Site)
    assert (site.name, site.conv.name, site.bn.name, site.spre) == ("conv", "conv", "bn", None)


@pytest.mark.parametrize(
    ("build", "name", "bn"),
    [
        (Model, "conv2", "bn2"),
        (Residual, "shortcut.conv", "shortcut_bn"),
        (KeywordCall, "conv1", "bn1"),
        (TiedConvs, "conv1", "bn1"),  # sharing a weight is the policy's business
        (CustomForward, "conv2", "bn2"),
        (AuxiliaryHead, "aux.conv", "aux_bn"),
    ],
)
def test_sites_are_found_wherever_they_are(
    build: Callable[[], nn.Module], name: str, bn: str
) -> None:
    site = match(trace(build()), name)
    assert isinstance(site, Site)
    assert (site.conv.target, site.bn.name) == (name, bn)


def parts(site: Site | Skip) -> list[str]:
    assert isinstance(site, Site)
    assert site.spre is not None
    return [node.name for node in (site.conv, site.bn, site.spre.conv, site.spre.bn, site.spre.add)]


def test_the_branch_is_found_before_and_after_the_masks_are_wired() -> None:
    names = ["conv2", "bn2", "conv2_spre", "bn2_spre", "bn2_sum"]
    duplicated = DuplicateBranches(Policy(Pattern(1, 4)))(trace(Residual())).graph_module
    assert parts(match(duplicated, "conv2")) == names
    assert parts(match(prepare(Residual()), "conv2")) == names


def test_the_branch_is_found_where_its_sum_was_turned_round() -> None:
    gm = prepare(conv_bn())
    add = node_of(gm, "bn_sum")
    add.args = add.args[::-1]
    assert parts(match(gm, "conv")) == ["conv", "bn", "conv_spre", "bn_spre", "bn_sum"]


def sum_of_something_else(gm: GraphModule) -> None:
    node_of(gm, "bn_sum").target = torch.sub


def branch_with_another_input(gm: GraphModule) -> None:
    spre = node_of(gm, "conv_spre")
    x = spre.all_input_nodes[0]
    with gm.graph.inserting_after(x):
        spre.args = (gm.graph.call_function(torch.neg, (x,)), spre.args[1])


def branch_scaled(gm: GraphModule) -> None:
    bn_spre, add = node_of(gm, "bn_spre"), node_of(gm, "bn_sum")
    with gm.graph.inserting_before(add):
        scaled = gm.graph.call_function(torch.mul, (bn_spre, 2))
    add.args = (add.args[0], scaled)


def branch_without_batch_norm(gm: GraphModule) -> None:
    gm.bn_spre = nn.ReLU()


def with_a_second_user(name: str) -> Callable[[GraphModule], None]:
    def tamper(gm: GraphModule) -> None:
        output = node_of(gm, "output")
        output.args = ((*output.args, node_of(gm, name)),)

    return tamper


@pytest.mark.parametrize(
    "tamper",
    [
        *map(with_a_second_user, ("bn", "bn_spre", "conv_spre")),
        sum_of_something_else,
        branch_with_another_input,
        branch_scaled,
        branch_without_batch_norm,
    ],
)
def test_what_is_not_eq_9_is_no_branch(tamper: Callable[[GraphModule], None]) -> None:
    gm = prepare(conv_bn())
    tamper(gm)
    site = match(gm, "conv")
    assert isinstance(site, Site)
    assert site.spre is None
