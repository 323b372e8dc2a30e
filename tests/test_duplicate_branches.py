"""DuplicateBranches: bn(conv(x)) becomes the sum of two branches (Eq. 9), or stays and says why."""

import pytest
import torch
from models import (
    KeywordCall,
    Model,
    OtherUsers,
    Residual,
    TwoHeads,
    assert_same,
    chain,
    conv_bn,
    kinds,
    node_of,
    reasons,
    run,
)
from torch import Tensor, nn
from torch.fx import GraphModule
from torchvision.ops import FrozenBatchNorm2d

from spre_fx import Pattern, records
from spre_fx.modules import SpReConv1d, SpReConv2d, SpReConv3d
from spre_fx.passes import DuplicateBranches, PassResult, Policy, trace

POLICY = Policy(Pattern(1, 4))


def duplicate(model: nn.Module, gamma: float = 1.0) -> PassResult:
    return DuplicateBranches(POLICY, gamma)(trace(model))


def wiring(graph_module: GraphModule) -> list[tuple[str, list[str]]]:
    return [
        (node.name, [value.name for value in node.all_input_nodes])
        for node in graph_module.graph.nodes
    ]


def test_ops_before_and_after() -> None:
    before = trace(conv_bn())
    after = DuplicateBranches(POLICY)(before).graph_module
    assert kinds(before) == ["placeholder", "Conv2d", "BatchNorm2d", "ReLU", "output"]
    assert kinds(after) == [
        *("placeholder", "Conv2d", "BatchNorm2d", "SpReConv2d", "BatchNorm2d", "add"),
        *("ReLU", "output"),
    ]
    assert wiring(after) == [
        ("input_1", []),
        ("conv", ["input_1"]),
        ("bn", ["conv"]),
        ("conv_spre", ["input_1"]),
        ("bn_spre", ["conv_spre"]),
        ("bn_sum", ["bn", "bn_spre"]),
        ("relu", ["bn_sum"]),
        ("output", ["relu"]),
    ]


def test_every_user_of_the_batch_norm_gets_the_sum() -> None:
    class Many(Model):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.bn1(self.conv1(x))
            return y, y + y, self.conv2(y)

    after = duplicate(Many()).graph_module
    users = {user.name for user in node_of(after, "bn1_sum").users}
    assert users == {"add", "conv2", "output"}
    assert list(node_of(after, "bn1").users) == [node_of(after, "bn1_sum")]


def test_the_second_term_is_added_by_value() -> None:
    model = conv_bn().double().eval()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    gm = duplicate(model).graph_module
    main, spre = model.bn(model.conv(x)), gm.bn_spre(gm.conv_spre(x))
    assert torch.equal(gm(x), (main + spre).relu())
    assert spre.abs().max() > 0.1


@pytest.mark.parametrize("build", [KeywordCall, TwoHeads, Residual])
def test_with_gamma_zero_the_network_computes_what_it_did(build: type[Model]) -> None:
    model = build().double()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    result = duplicate(model, gamma=0.0)
    assert result.account.applied[:2] == ("conv1", "conv2")
    ours, theirs = (run(m, x, training=True) for m in (result.graph_module, model))
    assert_same({key: ours[key] for key in theirs}, theirs)


def test_account_and_words() -> None:
    result = duplicate(Residual())
    assert result.account.applied == ("conv1", "conv2")
    skips = {
        "shortcut.conv": "1x1 kernel: shortcut.conv: a 1x1 kernel has one tap, no SpRe branch",
        "fc": "linear: fc: a linear layer has no taps, no SpRe branch",
    }
    assert reasons(result) == skips
    for name, said in skips.items():
        record = records.read(result.graph_module.get_submodule(name))
        assert f"{record['reason']}: {record['note']}" == said


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (conv_bn(groups=8), "depthwise: conv: depthwise, groups=8 equals C_in=8"),
        (
            conv_bn(in_channels=3),
            "fewer input channels than M: conv: C_in/groups=3 is less than M=4",
        ),
        (conv_bn(kernel_size=1), "1x1 kernel: conv: a 1x1 kernel has one tap, no SpRe branch"),
        (
            chain(conv=nn.Conv1d(8, 8, 1), bn=nn.BatchNorm1d(8)),
            "1x1 kernel: conv: a 1x1 kernel has one tap, no SpRe branch",
        ),
        (
            chain(conv=nn.Conv2d(8, 8, 3), relu=nn.ReLU()),
            "no batch norm: conv: feeds ReLU, not a batch norm",
        ),
    ],
)
def test_what_must_be_skipped_keeps_its_graph(model: nn.Module, said: str) -> None:
    before = trace(model)
    result = DuplicateBranches(POLICY)(before)
    assert reasons(result) == {"conv": said}
    assert wiring(result.graph_module) == wiring(before)
    assert list(result.graph_module.state_dict()) == list(before.state_dict())


def test_a_conv_whose_output_has_other_users_is_skipped_and_the_rest_is_not() -> None:
    result = duplicate(OtherUsers())
    assert result.account.applied == ("conv2",)
    assert list(result.account.skipped) == ["conv1"]
    assert "conv1_spre" not in dict(result.graph_module.named_modules())


def test_a_layer_the_policy_excludes_gets_no_branch() -> None:
    policy = Policy(Pattern(1, 4), exclude=("conv1",), overrides={"conv2": None})
    result = DuplicateBranches(policy)(trace(Model()))
    assert reasons(result) == {
        "conv1": "excluded: conv1: excluded by 'conv1'",
        "conv2": "excluded: conv2: left dense by the override 'conv2'",
    }


def test_a_second_run_adds_no_second_branch() -> None:
    once = duplicate(Residual())
    twice = DuplicateBranches(POLICY)(once.graph_module)
    assert twice.account.applied == ()
    assert reasons(twice)["conv1"] == "already done: conv1: has a SpRe branch, conv1_spre"
    assert wiring(twice.graph_module) == wiring(once.graph_module)


@pytest.mark.parametrize(
    ("conv", "bn", "spre"),
    [
        (nn.Conv1d(8, 12, 3, stride=2, bias=False), nn.BatchNorm1d(12), SpReConv1d),
        (nn.Conv2d(8, 12, (1, 5), padding="same"), nn.BatchNorm2d(12, eps=0.1), SpReConv2d),
        (nn.Conv2d(8, 12, 3, groups=2, dilation=2), nn.BatchNorm2d(12, momentum=0.3), SpReConv2d),
        (nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), nn.SyncBatchNorm(12), SpReConv2d),
        (nn.Conv3d(8, 12, (1, 3, 3)), nn.BatchNorm3d(12, affine=False), SpReConv3d),
    ],
)
def test_the_branch_is_configured_as_the_main_one(
    conv: nn.Module, bn: nn.Module, spre: type[nn.Module]
) -> None:
    model = chain(conv=conv, bn=bn).double()
    gm = duplicate(model).graph_module
    assert type(gm.conv_spre) is spre
    assert type(gm.bn_spre) is type(bn)
    assert gm.conv_spre.extra_repr() == conv.extra_repr()
    assert gm.bn_spre.extra_repr() == bn.extra_repr()
    assert {p.dtype for p in gm.parameters()} == {torch.float64}


def test_branches_start_fresh_each_with_its_own_numbers() -> None:
    torch.manual_seed(1)
    gm = duplicate(Model()).graph_module
    assert not torch.equal(gm.conv1_spre.weight, gm.conv2_spre.weight)
    assert not torch.equal(gm.conv1_spre.weight, gm.conv1.weight)
    assert gm.conv1_spre.weight.std() > 0.05
    for bn in gm.bn1_spre, gm.bn2_spre:
        assert torch.equal(bn.weight, torch.ones(8))
        assert torch.equal(bn.bias, torch.zeros(8))
        assert torch.equal(bn.running_mean, torch.zeros(8))
        assert torch.equal(bn.running_var, torch.ones(8))


@pytest.mark.parametrize("gamma", [0.0, 0.25])
def test_gamma_sets_the_weight_of_the_branch_and_of_nothing_else(gamma: float) -> None:
    model = Model()
    gm = duplicate(model, gamma).graph_module
    assert torch.equal(gm.bn1_spre.weight, torch.full((8,), gamma))
    assert torch.equal(gm.bn1.weight, model.bn1.weight)


def test_a_frozen_batch_norm_gets_a_trainable_one_beside_it() -> None:
    model = chain(conv=nn.Conv2d(8, 8, 3), bn=FrozenBatchNorm2d(8, eps=0.01))
    for training in True, False:
        gm = duplicate(model.train(training)).graph_module
        assert type(gm.bn) is FrozenBatchNorm2d
        assert type(gm.bn_spre) is nn.BatchNorm2d
        assert (gm.bn_spre.num_features, gm.bn_spre.eps) == (8, 0.01)
        assert all(parameter.requires_grad for parameter in gm.bn_spre.parameters())
        assert gm.bn_spre.training is training


def test_modes_and_frozen_weights_carry_over_to_the_branch() -> None:
    model = Model()
    model.bn1.eval()
    model.conv2.weight.requires_grad_(False)
    gm = duplicate(model).graph_module
    assert (gm.bn1_spre.training, gm.bn2_spre.training) == (False, True)
    assert not gm.conv2_spre.weight.requires_grad
    assert gm.conv1_spre.weight.requires_grad


def test_a_name_that_is_taken_gets_a_number() -> None:
    model = conv_bn()
    model.conv_spre = nn.Identity()
    gm = duplicate(model).graph_module
    assert type(gm.conv_spre) is nn.Identity
    assert type(gm.conv_spre2) is SpReConv2d
    gm(torch.randn(2, 8, 6, 6))


def test_names_of_the_dense_model_stay() -> None:
    model = Residual()
    state = duplicate(model).graph_module.state_dict()
    assert_same({name: state[name] for name in model.state_dict()}, dict(model.state_dict()))
    extra = {name.split(".")[0] for name in state.keys() - model.state_dict().keys()}
    assert extra == {"conv1_spre", "bn1_spre", "conv2_spre", "bn2_spre"}
