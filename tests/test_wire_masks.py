"""WireMasks: B, the live taps and B^S as values of the graph, equal to what the paper defines."""

import operator

import pytest
import torch
import torch.nn.functional as F
from models import (
    KeywordCall,
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
from torch.fx import GraphModule, Interpreter, Node

from spre_fx import (
    ASP,
    SRSTE,
    EveryK,
    EveryStep,
    Freeze,
    InvariantError,
    MaskMethod,
    Pattern,
    Schedule,
    masks,
    records,
)
from spre_fx.modules import NMConv2d, NMLinear
from spre_fx.passes import DuplicateBranches, Policy, WireMasks, trace

P = Pattern(1, 4)
POLICY = Policy(P)
WIRE = WireMasks(POLICY, SRSTE(), EveryStep())
SCHEDULES = [EveryStep(), EveryK(2), Freeze(at=0), Freeze(at=3, before=EveryK(2))]


class Recorder(Interpreter):
    """Runs a graph and keeps the value of every node."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)

    def values(self, x: Tensor) -> dict[str, object]:
        self.run(x)
        return {node.name: value for node, value in self.env.items()}


def inputs(node: Node) -> list[object]:
    return [value.name if isinstance(value, Node) else value for value in node.args]


def test_ops_before_and_after_with_a_branch() -> None:
    duplicated = DuplicateBranches(POLICY)(trace(conv_bn())).graph_module
    gm = WIRE(duplicated).graph_module
    assert kinds(duplicated)[1:] == [
        *("Conv2d", "BatchNorm2d", "SpReConv2d", "BatchNorm2d", "add", "ReLU", "output"),
    ]
    assert [(kind, node.name) for kind, node in zip(kinds(gm), gm.graph.nodes, strict=True)] == [
        ("placeholder", "input_1"),
        ("NMConv2d", "conv"),
        ("getitem", "conv_y"),
        ("getitem", "conv_nm_mask"),
        ("getitem", "conv_live_taps"),
        ("spre_mask", "conv_spre_mask"),
        ("BatchNorm2d", "bn"),
        ("SpReConv2d", "conv_spre"),
        ("BatchNorm2d", "bn_spre"),
        ("add", "bn_sum"),
        ("ReLU", "relu"),
        ("output", "output"),
    ]
    assert inputs(node_of(gm, "conv_spre_mask")) == ["conv_nm_mask", "conv_live_taps"]
    assert inputs(node_of(gm, "bn")) == ["conv_y"]
    assert inputs(node_of(gm, "conv_spre")) == ["input_1", "conv_spre_mask"]
    assert node_of(gm, "conv_y").target is operator.getitem
    assert node_of(gm, "conv_spre_mask").target is masks.spre_mask


def test_ops_before_and_after_without_a_branch() -> None:
    model = chain(conv=nn.Conv2d(8, 8, 1), flat=nn.Flatten(), fc=nn.Linear(288, 3))
    before = trace(model)
    gm = WIRE(before).graph_module
    assert kinds(before) == ["placeholder", "Conv2d", "Flatten", "Linear", "output"]
    assert kinds(gm) == ["placeholder", "NMConv2d", "Flatten", "NMLinear", "output"]
    assert inputs(node_of(gm, "fc")) == ["flat"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pattern", ["1:4", "2:4", "3:5"])
def test_mask_values_are_those_of_the_paper(pattern: str, schedule: Schedule) -> None:
    gm = prepare(conv_bn(), pattern, schedule=schedule).double()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    conv, bn, spre, bn_spre = (
        gm.get_submodule(name) for name in ("conv", "bn", "conv_spre", "bn_spre")
    )
    B = masks.nm_mask(conv.weight.detach(), Pattern.parse(pattern))
    taps = masks.live_taps(conv.weight.detach(), Pattern.parse(pattern))
    assert 0 < taps.sum() < taps.numel()
    for training in True, False:
        values = Recorder(gm.train(training)).values(x)
        assert torch.equal(values["conv_nm_mask"], B)
        assert torch.equal(values["conv_live_taps"], taps)
        assert torch.equal(values["conv_spre_mask"], B * taps)
        main = F.conv2d(x, B * conv.weight, conv.bias)
        branch = F.conv2d(x, B * taps * spre.weight, spre.bias)
        assert torch.allclose(values["conv_y"], main, rtol=1e-13)
        assert torch.allclose(values["conv_spre"], branch, rtol=1e-13)
    total = bn(main) + bn_spre(branch)
    assert torch.allclose(values["bn_sum"], total, rtol=1e-13, atol=1e-13)


def test_a_layer_without_a_branch_multiplies_with_its_mask() -> None:
    gm = prepare(chain(conv=nn.Conv2d(8, 6, 1), pool=nn.AdaptiveAvgPool2d(1)), "2:4")
    x, conv = torch.randn(2, 8, 6, 6), gm.get_submodule("conv")
    B = masks.nm_mask(conv.weight.detach(), Pattern(2, 4))
    assert B.sum() == 6 * 4
    y = Recorder(gm).values(x)["conv"]
    assert torch.allclose(y, F.conv2d(x, B * conv.weight, conv.bias), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedule_is_one_node_whose_value_goes_to_every_layer(schedule: Schedule) -> None:
    gm = prepare(Residual(), schedule=schedule)
    layers = [node_of(gm, name) for name in ("conv1", "conv2", "shortcut_conv", "fc")]
    if not schedule.counts_steps:
        assert "MaskSchedule" not in kinds(gm)
        assert [len(layer.args) for layer in layers] == [1, 1, 1, 1]
        return
    assert kinds(gm)[:2] == ["placeholder", "MaskSchedule"]
    assert kinds(gm).count("MaskSchedule") == 1
    update = node_of(gm, "mask_schedule")
    assert set(update.users) == set(layers)
    assert all(layer.args[1] is update for layer in layers)
    assert gm.mask_schedule.schedule == schedule


def test_masks_follow_the_schedule_and_rest_in_evaluation() -> None:
    gm = prepare(conv_bn(), schedule=EveryK(2))
    x, weight = torch.randn(2, 8, 6, 6), gm.conv.weight
    first = masks.nm_mask(weight.detach(), P)
    assert torch.equal(gm.conv.nm_mask.mask, first)

    def step(mode: bool) -> Tensor:
        torch.nn.init.normal_(weight)
        return Recorder(gm.train(mode)).values(x)["conv_nm_mask"]

    assert torch.equal(step(mode=False), first)
    zeroth = step(mode=True)
    assert torch.equal(zeroth, masks.nm_mask(weight.detach(), P))
    assert torch.equal(step(mode=True), zeroth)
    assert not torch.equal(step(mode=True), zeroth)
    assert gm.mask_schedule.step == 3


def test_a_schedule_that_keeps_masks_starts_with_those_of_the_weights() -> None:
    model = conv_bn()
    gm = prepare(model, method=ASP(), schedule=Freeze(at=0))
    state = gm.state_dict()
    assert torch.equal(state["conv.nm_mask.mask"], masks.nm_mask(model.conv.weight.detach(), P))
    assert torch.equal(state["conv.live_taps.mask"], masks.live_taps(model.conv.weight, P))
    assert not [name for name in prepare(conv_bn()).state_dict() if "mask" in name]


@pytest.mark.parametrize("schedule", [EveryStep(), EveryK(2)])
def test_a_conv_called_by_keyword_runs(schedule: Schedule) -> None:
    gm = prepare(KeywordCall(), schedule=schedule)
    for name in "conv1", "conv2":
        assert len(gm.get_submodule(f"{name}_spre").weight) == 8
        assert not node_of(gm, name).kwargs
    for training in True, False:
        assert run(gm, torch.randn(2, 8, 6, 6), training=training)["output 0"].isfinite().all()


@pytest.mark.parametrize("schedule", [EveryStep(), EveryK(2)])
def test_a_conv_called_twice_is_masked_at_both_calls(schedule: Schedule) -> None:
    gm = prepare(SharedConv(), schedule=schedule)
    assert kinds(gm).count("NMConv2d") == 2
    assert not [kind for kind in kinds(gm) if "SpRe" in kind or kind == "getitem"]
    x = torch.randn(2, 8, 6, 6)
    values = Recorder(gm).values(x)
    weight = masks.nm_mask(gm.conv1.weight.detach(), P) * gm.conv1.weight
    for call, value in ("conv1", x), ("conv1_1", values["bn1"]):
        assert torch.allclose(values[call], F.conv2d(value, weight, padding=1), atol=1e-5)


def test_account_and_records() -> None:
    model = randomise(chain(stem=nn.Conv2d(3, 8, 3), conv=nn.Conv2d(8, 8, 3), fc=nn.Linear(4, 8)))
    result = WireMasks(Policy(P, exclude=("fc",)), SRSTE(), EveryStep())(trace(model))
    assert result.account.applied == ("conv",)
    assert reasons(result) == {
        "stem": "fewer input channels than M: stem: C_in/groups=3 is less than M=4",
        "fc": "excluded: fc: excluded by 'fc'",
    }
    assert records.read(result.graph_module.stem) == {
        "reason": "fewer input channels than M",
        "note": "stem: C_in/groups=3 is less than M=4",
    }
    assert type(result.graph_module.conv) is NMConv2d


@pytest.mark.parametrize("method", [SRSTE(decay=0.1), ASP()])
def test_layers_become_what_the_policy_and_method_say(method: MaskMethod) -> None:
    policy = Policy(P, overrides={"fc": Pattern(2, 4)})
    model = Residual()
    gm = WireMasks(policy, method, EveryStep())(trace(model)).graph_module
    assert type(gm.fc) is NMLinear
    assert (gm.fc.pattern, gm.conv1.pattern) == (Pattern(2, 4), P)
    assert gm.conv1.method == method
    assert_same(dict(gm.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("training", [True, False])
def test_what_the_pass_adds_is_in_the_mode_of_the_graph(training: bool) -> None:
    gm = prepare(Residual().train(training), schedule=EveryK(2))
    assert {module.training for module in gm.modules()} == {training}
    gm(torch.randn(2, 8, 6, 6))
    assert gm.mask_schedule.step == training


def test_nothing_to_mask_adds_no_schedule() -> None:
    model = chain(conv=nn.Conv2d(3, 8, 3))
    result = WireMasks(POLICY, SRSTE(), EveryK(2))(trace(model))
    assert result.account.applied == ()
    assert kinds(result.graph_module) == ["placeholder", "Conv2d", "output"]


def test_a_second_run_masks_nothing_again() -> None:
    gm = prepare(Residual(), schedule=EveryK(2))
    again = WireMasks(POLICY, ASP(), EveryK(3))(gm)
    assert again.account.applied == ()
    assert reasons(again)["conv1"] == "already done: conv1: already carries 1:4"
    assert kinds(again.graph_module) == kinds(gm)
    assert again.graph_module.conv1.method == SRSTE()


def test_a_branch_whose_layer_the_policy_leaves_dense_is_refused_in_words() -> None:
    duplicated = DuplicateBranches(POLICY)(trace(Model())).graph_module
    narrower = WireMasks(Policy(P, exclude=("conv2",)), SRSTE(), EveryStep())
    with pytest.raises(InvariantError) as error:
        narrower(duplicated)
    assert str(error.value).startswith(
        "conv2: expected its SpRe branch conv2_spre to take the input and a mask, found ("
    )
    assert str(error.value).endswith(
        "Run WireMasks with a policy that includes every layer DuplicateBranches gave a branch."
    )
