"""Models that torch.fx can follow in parts only: how they are divided, and what becomes of them."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from models import chain, randomise
from torch import Tensor, nn
from torch.fx import GraphModule

import spre_fx
from spre_fx.audit import audit
from spre_fx.modules import NMLayer
from spre_fx.passes.regions import Region, assemble, divide, find_regions, is_divided


def block(channels: int = 8) -> nn.Sequential:
    """Conv, BN, ReLU."""
    return chain(
        conv=nn.Conv2d(channels, channels, 3, padding=1),
        bn=nn.BatchNorm2d(channels),
        relu=nn.ReLU(),
    )


class Opaque(nn.Module):
    """Control flow on values, around a part that has none, and convs it calls by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.part = block()
        self.items = nn.ModuleList([block(), block()])
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(x)
        for item in self.items:
            x = item(x)
        if x.mean() > 0:
            x = -x
        return self.bn(self.conv(x))


class Inside(nn.Module):
    """An opaque module within a model that can be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = block()
        self.opaque = Opaque()
        self.last = block()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.opaque(self.first(x)))


class TwoUses(nn.Module):
    """One block under two names, in two parts that have graphs of their own."""

    def __init__(self) -> None:
        super().__init__()
        shared = block()
        self.left = chain(own=block(), shared=shared)
        self.right = chain(shared=shared, own=block())

    def forward(self, x: Tensor) -> Tensor:
        return self.right(x) if x.mean() > 0 else self.left(x)


class Tied(nn.Module):
    """Two parts that share a parameter, and one with its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.own = block(), block(), block()
        self.right.conv.weight = self.left.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.right(x) if x.mean() > 0 else self.left(x))


class TakenApart(nn.Module):
    """Uses its modules otherwise than by calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(block(), block())
        self.indexed = nn.Sequential(block(), block())
        self.inner = chain(deep=block(), other=block())
        self.proj = nn.Linear(8, 8)
        self.optional = None
        nn.init.ones_(self.inner.other.bn.weight)  # reads, but not in the forward

    def forward(self, x: Tensor) -> Tensor:
        if self.optional is not None or self.inner is None or x.mean() > 1e9:
            return x
        for stage in self.stages:
            x = stage(x)
        return self.project(self.inner.deep(self.indexed[0](x)))

    def project(self, x: Tensor) -> Tensor:
        assert len(self.stages) == 2
        return torch.einsum("nchw,oc->nohw", x, self.proj.weight)


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(), block()
        self.seen: list[torch.Size] = []
        self.first.register_forward_hook(lambda module, args, y: self.seen.append(y.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class KeptWhole(nn.Module):
    """An attention layer of torch, called from code without a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x if x.mean() > 0 else -x).flatten(2).transpose(1, 2)
        return self.attention(x, x, x, need_weights=False)[0]


MODELS = {
    kind.__name__: kind for kind in (Opaque, Inside, TwoUses, Tied, TakenApart, Hooked, KeptWhole)
}
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
GMP_OPTIONS = {"method": "gmp", "schedule": spre_fx.CubicRamp(0, 4)}
METHODS = {
    "sr-ste": {},
    "every third step": {"schedule": spre_fx.EveryK(3)},
    "asp": {"method": "asp"},
    "lbc": {"method": "lbc", "schedule": spre_fx.CubicRamp(1, 4)},
}


def made(build: Callable[[], nn.Module]) -> nn.Module:
    return randomise(build().double())


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(dict(model.state_dict()))


def names(regions: list[Region]) -> list[str]:
    return [region.names[0] for region in regions]


def train(model: nn.Module, steps: int = 4) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 8, 6, 6, dtype=torch.float64)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (block, [""]),
        (Opaque, ["part", "items.0", "items.1", "conv"]),
        (Inside, ["", "opaque.part", "opaque.items.0", "opaque.items.1", "opaque.conv"]),
        (TwoUses, ["left", "left.shared", "right"]),
        (Tied, ["left", "right", "own"]),
        (
            TakenApart,
            ["stages.0", "stages.1", "indexed.0", "indexed.1", "inner.deep", "inner.other", "proj"],
        ),
        (Hooked, ["", "first"]),
        (KeptWhole, ["conv", "attention"]),
    ],
)
def test_the_largest_parts_are_found(build: Callable[[], nn.Module], expected: list[str]) -> None:
    assert names(divide(build())) == expected


@every_model
def test_dividing_changes_nothing_but_the_form(build: Callable[[], nn.Module]) -> None:
    model = made(build)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    copied = copy.deepcopy(model)
    divided = assemble(copied, divide(copied))
    assert names(find_regions(divided)) == names(divide(copy.deepcopy(model)))
    assert divided.state_dict().keys() == model.state_dict().keys()
    for mode in (True, False):
        assert torch.equal(divided.train(mode)(x), model.train(mode)(x))
    for name, value in model.state_dict().items():
        assert torch.equal(divided.state_dict()[name], value)


@every_model
@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_training_and_finalizing_agree(
    build: Callable[[], nn.Module], options: dict[str, object]
) -> None:
    model = made(build)
    before = state(model)
    prepared = spre_fx.prepare(model, "1:4", **options)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert before.keys() <= prepared.state_dict().keys()
    train(prepared)
    trained = state(prepared)
    deployed = spre_fx.finalize(prepared)
    assert all(torch.equal(trained[name], value) for name, value in prepared.state_dict().items())
    x = torch.randn(3, 8, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(deployed(x), prepared.eval()(x), rtol=1e-10, atol=1e-10)
    assert not any(isinstance(module, NMLayer) for module in deployed.modules())
    assert not any("mask" in name for name in deployed.state_dict())
    assert not deployed._forward_pre_hooks
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for result in model, prepared, deployed:
        assert {*layers} <= {site.name for site in spre_fx.sites(result)}
    assert {row.name for row in spre_fx.diff(prepared, deployed).sites} >= {*layers}


@pytest.mark.parametrize("build", [Opaque, Inside])
def test_a_copy_and_a_pickle_train_on_like_the_model(build: Callable[[], nn.Module]) -> None:
    prepared = spre_fx.prepare(made(build), "1:4", schedule=spre_fx.EveryK(3))
    train(prepared, steps=2)
    for again in copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared)):
        ours = copy.deepcopy(prepared)
        for each in (ours, again):
            torch.manual_seed(1)
            train(each, steps=3)
        assert ours.state_dict().keys() == again.state_dict().keys()
        assert all(torch.equal(ours.state_dict()[n], v) for n, v in again.state_dict().items())
        assert spre_fx.sites(again) == spre_fx.sites(ours)


def test_steps_are_forwards_of_the_whole_model() -> None:
    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.conv = block(), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(int(x.sum() > 0) + 3):
                x = self.conv(self.block(x))
            return x

    prepared = spre_fx.prepare(made(Thrice), "1:4", schedule=spre_fx.Freeze(at=2))
    train(prepared, steps=2)
    frozen = state(prepared)
    assert frozen["mask_schedule.step"] == 2
    assert "mask_schedule.due" not in frozen
    train(prepared, steps=2)
    after = prepared.state_dict()
    assert after["mask_schedule.step"] == 4
    masks = [name for name in after if name.endswith(".mask")]
    assert len(masks) == 3
    assert all(torch.equal(after[name], frozen[name]) for name in masks)
    prepared.eval()(torch.randn(1, 8, 6, 6, dtype=torch.float64))
    assert prepared.state_dict()["mask_schedule.step"] == 4


def test_live_taps_with_a_memory_are_told_of_every_forward() -> None:
    prepared = spre_fx.prepare(made(Opaque), "1:4", criterion="running-mean")
    before = state(prepared)
    train(prepared, steps=3)
    after = prepared.state_dict()
    steps = [name for name in after if name.endswith("live_taps.step")]
    assert steps
    assert all(after[name] == 3 for name in steps)
    memory = [name for name in after if name.endswith("live_taps.memory")]
    assert not any(torch.equal(after[name], before[name]) for name in memory)
    prepared.eval()(torch.randn(1, 8, 6, 6, dtype=torch.float64))
    assert all(prepared.state_dict()[name] == 3 for name in steps)


def sites_of(build: Callable[[], nn.Module]) -> dict[str, spre_fx.SiteInfo]:
    return {site.name: site for site in spre_fx.sites(spre_fx.prepare(build(), "1:4"))}


def test_a_layer_called_from_outside_says_by_whom_and_why() -> None:
    sites = sites_of(Inside)
    assert sites["opaque.part.conv"].state is spre_fx.State.SPRE
    assert sites["opaque.items.1.conv"].state is spre_fx.State.SPRE
    assert sites["last.conv"].state is spre_fx.State.SPRE
    site = sites["opaque.conv"]
    assert site.state is spre_fx.State.NM
    assert site.note.startswith(
        "opaque.conv: is called by opaque (Opaque), which torch.fx cannot follow: "
    )
    assert "test_regions.py" in site.note
    assert "`if x.mean() > 0:`" in site.note


def test_the_model_itself_is_named_where_it_is_the_caller() -> None:
    assert sites_of(Opaque)["conv"].note.startswith("conv: is called by the model (Opaque), which")


def test_a_weight_that_other_code_reads_stays_dense() -> None:
    site = sites_of(TakenApart)["proj"]
    assert (site.state, site.reason) == (spre_fx.State.SKIPPED, "parameter shared")
    assert site.note == (
        "proj: its weight is read by the model (TakenApart), which torch.fx cannot follow"
    )


def test_tied_parts_stay_dense() -> None:
    sites = sites_of(Tied)
    for name in ("left.conv", "right.conv"):
        assert sites[name].note == (f"{name}: its weight is shared by left.conv, right.conv")
    assert sites["own.conv"].state is spre_fx.State.SPRE


def test_a_module_kept_whole_is_listed_wherever_it_is_called() -> None:
    site = sites_of(KeptWhole)["attention.out_proj"]
    assert site.reason == "inside a module kept whole"
    assert "is run by attention (MultiheadAttention), which is kept whole" in site.note


def test_hooks_run_in_the_prepared_and_in_the_deployed_model() -> None:
    model = made(Hooked)
    prepared = spre_fx.prepare(model, "1:4")
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    for each in (prepared, copy.deepcopy(prepared).train(), spre_fx.finalize(prepared)):
        model.seen.clear()
        each(x)
        hooked = each is not prepared and isinstance(each, GraphModule) and each.training
        assert len(model.seen) == 1 or hooked  # torch drops hooks when a GraphModule is copied


def test_every_layer_of_the_detectors_of_the_paper_is_accounted_for() -> None:
    build = torchvision.models.detection.maskrcnn_resnet50_fpn
    model = build(weights=None, weights_backbone=None, num_classes=3)
    prepared = spre_fx.prepare(model, "2:4")
    assert type(prepared) is type(model)
    states = {site.name: site.state for site in spre_fx.sites(prepared)}
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert {*layers} <= states.keys()
    assert states["backbone.body.layer1.0.conv2"] is spre_fx.State.SPRE
    assert states["roi_heads.mask_predictor.conv5_mask"] is spre_fx.State.SKIPPED  # transposed
    assert sum(state is spre_fx.State.SPRE for state in states.values()) == 16
    spre = prepared.get_submodule("backbone.body.layer1.0.bn2_spre")
    assert isinstance(spre, nn.BatchNorm2d)
    assert isinstance(prepared.backbone, GraphModule)


def test_a_prepared_backbone_is_finalized_where_it_stands() -> None:
    class Detector(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x))

    detector = Detector(spre_fx.prepare(made(block), "1:4")).double()
    train(detector)
    deployed = spre_fx.finalize(detector)
    assert type(deployed) is Detector
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(deployed(x), detector.eval()(x), rtol=1e-10, atol=1e-10)
    states = {site.name: site.state for site in spre_fx.sites(deployed)}
    assert states == {"backbone.conv": spre_fx.State.DEPLOYED, "head": spre_fx.State.DENSE}


def test_an_unstructured_method_needs_one_graph() -> None:
    model = Opaque()
    with pytest.raises(spre_fx.ModelError) as error:
        spre_fx.prepare(model, "1:4", **GMP_OPTIONS)
    assert str(error.value) == (
        "method=GMP: expected a model that torch.fx can follow whole, since such a method looks at "
        "all its layers at once, found Opaque, which it can follow in parts only. Choose an N:M "
        "method."
    )


def test_exclusions_and_overrides_reach_into_parts() -> None:
    overrides = {"opaque.items.*": "2:4"}
    prepared = spre_fx.prepare(Inside(), "1:4", exclude="opaque.part", overrides=overrides)
    patterns = {site.name: site.pattern for site in spre_fx.sites(prepared)}
    assert patterns == {
        "first.conv": "1:4",
        "opaque.part.conv": None,
        "opaque.items.0.conv": "2:4",
        "opaque.items.1.conv": "2:4",
        "opaque.conv": "1:4",
        "last.conv": "1:4",
    }
    with pytest.raises(spre_fx.OptionError, match=r"'opaque\.nothing' matches no conv or linear"):
        spre_fx.prepare(Inside(), "1:4", exclude="opaque.nothing")


def test_cost_counts_layers_that_run_outside_of_graphs() -> None:
    x = torch.randn(1, 8, 6, 6)
    for model in Inside(), spre_fx.prepare(Inside(), "1:4"):
        counted = {site.name: site for site in spre_fx.cost(model, x).sites}
        assert counted["opaque.conv"].flops.dense_test == 2 * 36 * 8 * 8 * 9
        assert counted["opaque.conv"].flops.dense_test == counted["last.conv"].flops.dense_test
        assert [site.calls for site in counted.values()] == [1] * 6


def test_whether_a_model_is_divided() -> None:
    assert not is_divided(Inside())
    assert is_divided(spre_fx.prepare(Inside(), "1:4"))
    assert is_divided(spre_fx.finalize(spre_fx.prepare(Opaque(), "1:4")))


def test_hooks_that_came_in_training_do_not_keep_a_site_from_being_folded() -> None:
    prepared = spre_fx.prepare(made(block), "1:4")
    seen = []
    prepared.conv.register_forward_hook(lambda module, args, output: seen.append(output))
    prepared.bn.register_forward_hook(lambda module, args, output: seen.append(output))
    train(prepared, steps=1)
    assert len(seen) == 2
    deployed = spre_fx.finalize(prepared)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(deployed(x), prepared.eval()(x), rtol=1e-10, atol=1e-10)


def test_graph_modules_and_containers_inside_a_model_are_followed() -> None:
    class Containers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.traced = torch.fx.symbolic_trace(block())
            self.items = nn.ModuleList([block(), block()])
            self.named = nn.ModuleDict({"one": block(), "two": nn.Sequential(block())})

        def forward(self, x: Tensor) -> Tensor:
            x = self.traced(x)
            for item in self.items:
                x = item(x)
            return self.named["two"](self.named["one"](x))

    model = made(Containers)
    prepared = spre_fx.prepare(model, "1:4")
    assert isinstance(prepared, GraphModule)
    states = {site.name: site.state for site in spre_fx.sites(prepared)}
    layers = ("traced", "items.0", "items.1", "named.one", "named.two.0")
    assert states == {f"{name}.conv": spre_fx.State.SPRE for name in layers}
    train(prepared)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    deployed = spre_fx.finalize(prepared)
    torch.testing.assert_close(deployed(x), prepared.eval()(x), rtol=1e-10, atol=1e-10)


def test_taps_by_gradient_pictures_and_audits_take_divided_models(tmp_path: Path) -> None:
    prepared = spre_fx.prepare(made(Inside), "1:4", criterion="taylor")
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    assert spre_fx.update_taps(prepared, lambda: prepared(x).square().mean())
    taps = [m for n, m in prepared.state_dict().items() if n.endswith("live_taps.taken")]
    assert len(taps) == 5
    assert all(taps)
    spre_fx.plot_spatial_sparsity(prepared, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    tracker = spre_fx.MaskDynamics(prepared)
    tracker.record(0)
    assert {row.site for row in tracker.rows} >= {"opaque.part.conv", "opaque.conv"}
    found = audit(prepared)
    assert found.ok
    assert len(found.layers) == 12


@pytest.mark.parametrize("options", [{}, {"schedule": spre_fx.EveryK(2)}, GMP_OPTIONS])
def test_a_model_without_layers_has_nothing_to_sparsify(options: dict[str, object]) -> None:
    with pytest.raises(spre_fx.ModelError, match="found no conv or linear at all"):
        spre_fx.prepare(nn.Sequential(nn.ReLU()), "1:4", **options)
