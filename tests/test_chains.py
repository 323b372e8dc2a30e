"""What may stand between a conv and its batch norm, and what may not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Model, Views, kinds, model_of, node_of, prepare, randomise, run
from torch import Tensor, nn

from spre_fx.passes import FoldBranches, Reason, Site, Skip, match_site, trace
from spre_fx.passes.graph_view import GraphView

FLAT = "flat"  # a batch norm over (N, C, L)


class Between(Model):
    """`way` stands between conv1 and a batch norm."""

    way: Callable[[Any, Tensor, Tensor], Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.BatchNorm1d(8)
        self.identity, self.keep, self.drop = nn.Identity(), nn.Dropout2d(0.0), nn.Dropout(0.5)
        self.flatten, self.flatten_all = nn.Flatten(2), nn.Flatten()
        self.spatial = nn.BatchNorm3d(8)
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        return type(self).way(self, x, self.conv1(x))


def between(way: Callable[[Any, Tensor, Tensor], Tensor]) -> Model:
    return type("Between", (Between,), {"way": staticmethod(way)})()


def unpacked(m: Any, x: Tensor, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    return m.flat(y.view(b, c, h * w)).view(b, c, h, w)


WALKED: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "identities": lambda m, x, y: m.bn1(m.keep(m.identity(y))),
    "contiguous": lambda m, x, y: m.bn1(y.contiguous()),
    "flatten": lambda m, x, y: m.flat(y.flatten(2)),
    "flatten function": lambda m, x, y: m.flat(torch.flatten(y, -2, -1)),
    "flatten module": lambda m, x, y: m.flat(m.flatten(y)),
    "unsqueeze": lambda m, x, y: m.spatial(y.unsqueeze(-1)).squeeze(-1),
    "squeeze": lambda m, x, y: m.flat(torch.unsqueeze(y.flatten(2), 3).squeeze(3)),
    "sizes of the conv": unpacked,
    "sizes of its input": lambda m, x, y: m.flat(y.view(x.shape[0], 8, -1)),
    "sizes far before": lambda m, x, y: m.flat(m.conv2(m.bn1(y).relu()).view(x.size(0), 8, -1)),
    "reshape to a list": lambda m, x, y: m.flat(y.reshape([y.size(0), y.size(1), -1])),
    "shape read by others": lambda m, x, y: m.bn1(y) * y.shape[2] + y.dim(),
}


@pytest.mark.parametrize("way", WALKED.values(), ids=WALKED)
def test_a_site_goes_through_what_leaves_channels_alone(
    way: Callable[[Any, Tensor, Tensor], Tensor],
) -> None:
    model = between(way)
    gm = prepare(model, "1:4").double()
    assert kinds(gm).count("SpReConv2d") >= 1
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    for training in True, False:
        run(gm, x, training=training)
    folded = FoldBranches()(gm).graph_module
    assert not {kind for kind in kinds(folded) if "BatchNorm" in kind or "SpRe" in kind}
    ours, theirs = folded.eval()(x), gm.eval()(x)
    assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()


REFUSED: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], str]] = {
    "a dropout": (lambda m, x, y: m.bn1(m.drop(y)), "feeds Dropout, not a batch norm"),
    "an activation": (lambda m, x, y: m.bn1(y.relu()), "feeds relu, not a batch norm"),
    "channels flattened": (
        lambda m, x, y: m.flat(y.flatten(1).view(x.shape[0], 8, -1)),
        "feeds flatten, not a batch norm",
    ),
    "a module that flattens all": (
        lambda m, x, y: m.flatten_all(y),
        "feeds Flatten, not a batch norm",
    ),
    "a transposition": (lambda m, x, y: m.bn1(y.transpose(2, 1)), "feeds transpose, not a batch "),
    "batch and channels joined": (lambda m, x, y: m.flat(y.view(2, 8, -1)), "feeds view, not a ba"),
    "channels split": (
        lambda m, x, y: m.flat(y.view(y.shape[0], 4, -1)),
        "feeds view, not a batch norm",
    ),
    "the size of another axis": (
        lambda m, x, y: m.flat(y.view(y.shape[1], 8, -1)),
        "feeds view, not a batch norm",
    ),
    "the size of something else": (
        lambda m, x, y: m.flat(y.view((x + x.mean(0, True)).shape[0], 8, -1)),
        "feeds view, not a batch norm",
    ),
    "an axis in front": (lambda m, x, y: m.bn1(y.unsqueeze(1)[:, 0]), "feeds unsqueeze, not a ba"),
    "other users on the way": (
        lambda m, x, y: m.flat(z := y.flatten(2)) + z,
        "has an output that 2 nodes use (flat, add)",
    ),
    "a padding": (lambda m, x, y: m.bn1(F.pad(y, (1, 1))), "feeds pad, not a batch norm"),
}


@pytest.mark.parametrize(("way", "said"), REFUSED.values(), ids=REFUSED)
def test_what_may_touch_channels_ends_the_way(
    way: Callable[[Any, Tensor, Tensor], Tensor], said: str
) -> None:
    view = GraphView(trace(between(way)))
    skip = match_site(view, view.candidates["conv1"])
    assert isinstance(skip, Skip)
    assert skip.reason in (Reason.NO_BN, Reason.OTHER_USERS)
    assert skip.detail.startswith(f"conv1: {said}")


def test_the_branch_repeats_the_views_and_not_the_identities() -> None:
    gm = prepare(Views(), "1:4")
    view = GraphView(gm)
    site = match_site(view, view.candidates["conv1"])
    assert isinstance(site, Site)
    assert [node.name for node in site.chain] == ["identity", "drop", "flatten", "unsqueeze"]
    assert site.spre is not None
    made = [site.spre.conv, *(n for n in gm.graph.nodes if n.name in ("flatten_1", "unsqueeze_1"))]
    assert [node.name for node in made] == ["conv1_spre", "flatten_1", "unsqueeze_1"]
    assert made[1].args == (site.spre.conv, 2)


def test_a_branch_that_goes_another_way_is_none() -> None:
    gm = prepare(Views(), "1:4")
    node_of(gm, "flatten_1").args = (node_of(gm, "conv1_spre"), 3)
    view = GraphView(gm)
    site = match_site(view, view.candidates["conv1"])
    assert isinstance(site, Site)
    assert site.spre is None


def test_a_walk_over_the_model_for_a_batch_size_ends_at_what_may_change_it() -> None:
    changes = model_of(
        "Changes", lambda m, x: m.bn2(m.conv2(x + x).contiguous().view(x.shape[0], 8, 6, 6))
    )
    view = GraphView(trace(changes()))
    skip = match_site(view, view.candidates["conv2"])
    assert skip == Skip(Reason.NO_BN, "conv2: feeds view, not a batch norm")
