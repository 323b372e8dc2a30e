"""adopt: N:M weights from elsewhere are deployed as finalize deploys its own."""

import copy

import pytest
import torch
from models import AuxiliaryHead, Never, Residual, SharedConv, TiedConvs, assert_same, chain
from torch import nn

import spre_fx
from spre_fx import ModelError, Pattern, State, masks


class Wide(nn.Module):
    """A stem, two N:M sized convs with batch norms, a depthwise one and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain(
            stem=nn.Conv2d(3, 32, 3),
            stem_bn=nn.BatchNorm2d(32),
            conv=nn.Conv2d(32, 48, 3, bias=False),
            conv_bn=nn.BatchNorm2d(48),
            depthwise=nn.Conv2d(48, 48, 3, groups=48),
            one=nn.Conv2d(48, 36, 1),
            one_bn=nn.BatchNorm2d(36),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(36, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def sparsify(model: nn.Module, pattern: str, *names: str) -> nn.Module:
    """What apex's ASP does to a checkpoint: weights times their masks, in place."""
    with torch.no_grad():
        for name in names:
            weight = model.get_submodule(name).weight
            weight *= masks.nm_mask(weight, Pattern.parse(pattern))
    return model


def notes(model: nn.Module) -> dict[str, str]:
    return {site.name: site.note for site in spre_fx.sites(model) if site.pattern is None}


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:8", "1:16", "3:8", "1:32"])
@pytest.mark.parametrize("given", [False, True])
def test_it_gives_what_finalize_gives(pattern, given):
    model = Wide()
    prepared = spre_fx.prepare(model, pattern, method="asp", branch=None)
    finalized = spre_fx.finalize(prepared)
    layers = [site.name for site in spre_fx.sites(finalized) if site.pattern]
    assert layers == ["body.conv", "body.one", "body.fc"]
    before = copy.deepcopy(sparsify(model, pattern, *layers).state_dict())
    adopted = spre_fx.adopt(model, pattern if given else None)
    assert_same(adopted.state_dict(), finalized.state_dict())
    assert_same(model.state_dict(), before)
    assert not adopted.training
    assert [(n.op, str(n.target)) for n in adopted.graph.nodes] == [
        (n.op, str(n.target)) for n in finalized.graph.nodes
    ]
    for ours, theirs in zip(spre_fx.sites(adopted), spre_fx.sites(finalized), strict=True):
        assert (ours.name, ours.state, ours.pattern) == (theirs.name, theirs.state, theirs.pattern)
        assert (ours.backend, ours.density) == (theirs.backend, theirs.density)


def test_each_layer_gets_its_own_pattern_or_a_reason():
    model = sparsify(Wide(), "2:4", "body.conv")
    sparsify(model, "1:16", "body.one")
    adopted = spre_fx.adopt(model)
    found = {site.name: site.pattern for site in spre_fx.sites(adopted)}
    assert found["body.conv"] == "2:4"
    assert found["body.one"] == "1:16"
    assert notes(adopted) == {
        "body.stem": "body.stem: its weight has no zeros",
        "body.depthwise": "body.depthwise: depthwise, groups=48 equals C_in=48",
        "body.fc": "body.fc: its weight has no zeros",
    }
    assert [s.state for s in spre_fx.sites(adopted)].count(State.DEPLOYED) == 2
    dense = copy.deepcopy(model).double().eval()
    x = torch.randn(2, 3, 12, 12).double()
    difference = (spre_fx.adopt(dense)(x) - dense(x)).abs().max() / dense(x).abs().max()
    assert difference < 1e-10


def test_a_given_pattern_says_what_breaks_it():
    adopted = spre_fx.adopt(sparsify(Wide(), "2:4", "body.conv"), "2:4")
    assert notes(adopted) == {
        "body.stem": "body.stem: C_in/groups=3 is less than M=4",
        "body.depthwise": "body.depthwise: depthwise, groups=48 equals C_in=48",
        "body.one": "body.one: a group of 4 holds 4 non-zeros, more than 2:4 allows",
        "body.fc": "body.fc: a group of 4 holds 4 non-zeros, more than 2:4 allows",
    }
    assert spre_fx.sites(adopted)[1].pattern == "2:4"


def test_what_chance_gives_is_no_pattern():
    torch.manual_seed(0)
    model = sparsify(Wide(), "2:4", "body.conv")
    with torch.no_grad():
        model.body.one.weight *= torch.rand_like(model.body.one.weight) < 0.05
        model.body.fc.weight.zero_()
    adopted = spre_fx.adopt(model)
    said = notes(adopted)
    assert said["body.fc"] == "body.fc: its weight is all zeros, which is no pattern"
    assert "of its weights are zero, and " in said["body.one"]
    assert "may be chance (probability " in said["body.one"]
    with torch.no_grad():
        model.body.one.weight.fill_(1.0)[0, 0] = 0
    assert notes(spre_fx.adopt(model))["body.one"] == (
        "body.one: 0.1% of its weights are zero, but in no N:M pattern with M of 2 to 32"
    )


def test_a_tiny_layer_is_believed_where_others_leave_no_doubt():
    model = chain(conv=nn.Conv2d(32, 8, 3), bn=nn.BatchNorm2d(8), tiny=nn.Conv2d(8, 8, 1))
    sparsify(model, "2:4", "tiny")
    with pytest.raises(ModelError, match=r"tiny: 50\.0% of its weights are zero, and 2:4 may be"):
        spre_fx.adopt(model)
    adopted = spre_fx.adopt(sparsify(model, "2:4", "conv"))
    assert [site.pattern for site in spre_fx.sites(adopted)] == ["2:4", "2:4"]


@pytest.mark.parametrize("kind", [SharedConv, Never, AuxiliaryHead, Residual])
def test_models_with_one_thing_to_get_right(kind):
    model = sparsify(kind().double(), "1:4", "conv1").eval()
    adopted = spre_fx.adopt(model)
    x = torch.randn(2, 8, 6, 6).double()
    assert torch.allclose(adopted(x), model(x), rtol=1e-10, atol=1e-10)
    assert {site.name for site in spre_fx.sites(adopted) if site.pattern} == {"conv1"}


def test_what_cannot_be_adopted():
    with pytest.raises(
        ModelError, match=r"nothing to adopt: expected layers whose weights are N:M"
    ):
        spre_fx.adopt(Residual())
    with pytest.raises(
        ModelError, match=r"weights are 1:4 already, found none\. conv1: a group of 4"
    ):
        spre_fx.adopt(Residual(), "1:4")
    with pytest.raises(ModelError, match=r"conv1: its weight is shared by conv1, conv2"):
        spre_fx.adopt(sparsify(TiedConvs(), "1:4", "conv1"))
    with pytest.raises(ModelError, match=r"No conv or linear at all\. For dense weights: prepare"):
        spre_fx.adopt(nn.ReLU())
    with pytest.raises(
        ModelError, match=r"found one that `prepare` has prepared\. finalize deploys"
    ):
        spre_fx.adopt(spre_fx.prepare(Residual(), "1:4"))
    with pytest.raises(spre_fx.PatternError, match="is not an N:M pattern"):
        spre_fx.adopt(Residual(), "4:2")


def test_what_is_adopted_can_be_saved(tmp_path):
    adopted = spre_fx.adopt(sparsify(Wide(), "2:4", "body.conv", "body.one", "body.fc"))
    spre_fx.save(adopted, tmp_path / "model")
    again = spre_fx.lower(spre_fx.load(tmp_path / "model"))  # what is saved is the dense form
    assert spre_fx.sites(again) == spre_fx.sites(adopted)
    assert_same(again.state_dict(), adopted.state_dict())
