import copy
import pickle
import random
import re

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

import spre_fx
from spre_fx import ChannelPermutation, InvariantError, masks
from spre_fx.passes import PermuteChannels, Policy, Reason, trace
from spre_fx.passes.channel_rules import follow_channels
from spre_fx.passes.graph_view import GraphView
from spre_fx.patterns import Pattern

PATTERN = Pattern(2, 4)
QUICK = ChannelPermutation(sweeps=8, progress=False)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers()]:
            if isinstance(module, nn.Conv2d | nn.Linear) and name == "weight":
                continue
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model.double().eval()


def permute(model: nn.Module, pattern: Pattern = PATTERN, search: ChannelPermutation = QUICK):
    return PermuteChannels(Policy(pattern), search)(trace(model))


def shuffle_all(model: nn.Module) -> tuple[nn.Module, int]:
    """The traced model with every movable set of channels in a random order."""
    graph_module = trace(model)
    flow = follow_channels(GraphView(graph_module))
    sets = flow.movable()
    for atoms in sets:
        order = random.Random(0).sample(atoms, len(atoms))
        flow.reorder(dict(zip(atoms, order, strict=True)))
    return graph_module, len(sets)


@torch.no_grad()
def assert_same_function(model: nn.Module, other: nn.Module, x: torch.Tensor) -> None:
    expected, found = model(x), other(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * expected.abs().max())


def kept(model: nn.Module, account, pattern: Pattern = PATTERN) -> float:
    dense = (Reason.TRANSPOSED, Reason.DEPTHWISE, Reason.FEW_CHANNELS)
    names = [name for name, skip in account.skipped.items() if skip.reason not in dense]
    weights = [model.get_submodule(n).weight.detach() for n in (*account.applied, *names)]
    return sum(float((w * masks.nm_mask(w, pattern)).abs().sum()) for w in weights)


class Inception(nn.Module):
    """Branches of different widths, joined, added to, gated and cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.left = nn.Conv2d(16, 8, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.right = nn.Conv2d(16, 24, 3, padding=1)
        self.act = nn.PReLU(32)
        self.gate1 = nn.Linear(32, 16)
        self.gate2 = nn.Linear(16, 32)
        self.up = nn.Conv2d(16, 32, 1)
        self.norm = nn.GroupNorm(4, 32)
        self.narrow = nn.Conv2d(16, 16, 3)
        self.scale = nn.Parameter(torch.rand(16, 1, 1))
        self.fc1 = nn.Linear(16 * 9, 32)
        self.fc2 = nn.Linear(32, 16)
        self.fc3 = nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.act(torch.cat([self.bn(self.left(x)), self.right(x)], 1))
        b, c, _, _ = y.size()
        gate = F.adaptive_avg_pool2d(y, 1).view(b, c)
        gate = torch.sigmoid(self.gate2(F.relu(self.gate1(gate)))).view(b, c, 1, 1)
        y = self.norm(y * gate + self.up(x))
        first, second = y.chunk(2, dim=1)
        y = F.max_pool2d(self.narrow(first) * self.scale + second[:, :, 1:-1, 1:-1] * 0.0, 2)
        return self.fc3(self.fc2(self.fc1(y.flatten(1)).relu()).relu())


def residual(*blocks: nn.Module) -> nn.Module:
    width = 16
    shortcut = nn.Sequential(nn.Conv2d(width, 32, 1, 2), nn.BatchNorm2d(32))
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        *blocks,
        BasicBlock(width, 32, 2, shortcut),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 8),
    )


def small_nets() -> dict[str, tuple[nn.Module, int]]:
    return {
        "inception": (Inception(), 10),
        "residual": (residual(BasicBlock(16, 16), BasicBlock(16, 16)), 16),
        "grouped": (residual(Bottleneck(16, 4, groups=2, base_width=128)), 16),
        "mobile": (torchvision.models.MobileNetV2(8, 0.1), 32),
        "dense": (torchvision.models.DenseNet(8, (2, 3), 16, num_classes=8), 32),
        "multiplied": (
            nn.Sequential(
                nn.Conv2d(3, 16, 1),
                nn.Conv2d(16, 32, 3, groups=16),
                nn.ReLU(),
                nn.ConvTranspose2d(32, 16, 2),
                nn.Conv2d(16, 8, 1),
            ),
            8,
        ),
    }


@pytest.mark.parametrize("name", small_nets())
def test_the_function_and_every_name_stay_and_more_is_kept(name):
    torch.manual_seed(0)
    model, size = small_nets()[name]
    model = randomised(model)
    before = copy.deepcopy(model.state_dict())
    result = permute(model)
    assert result.account.applied
    assert_same_function(model, result.graph_module, torch.randn(2, 3, size, size).double())
    after = result.graph_module.state_dict()
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), "the input was touched"
        assert torch.equal(after[key].flatten().sort().values, value.flatten().sort().values)
    assert kept(result.graph_module, result.account) > kept(model, result.account)


@pytest.mark.parametrize(
    ("name", "size", "least"),
    [
        ("resnet18", 64, 10),
        ("mobilenet_v2", 64, 20),
        pytest.param("densenet121", 64, 100, marks=pytest.mark.slow),
        ("vgg16_bn", 32, 10),
        ("googlenet", 64, 40),
        pytest.param("resnext50_32x4d", 64, 500, marks=pytest.mark.slow),  # a thousand sets
        ("mobilenet_v3_small", 64, 20),
        ("shufflenet_v2_x0_5", 64, 10),
    ],
)
def test_any_order_the_graph_allows_keeps_the_function(name, size, least):
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, num_classes=8, **options)
    if name == "vgg16_bn":  # its own classifier is a gigabyte
        model.avgpool = nn.AdaptiveAvgPool2d(2)
        model.classifier = nn.Sequential(nn.Linear(2048, 32), nn.ReLU(), nn.Linear(32, 8))
    model = randomised(model)
    shuffled, sets = shuffle_all(model)
    assert sets >= least
    assert not all(
        torch.equal(a, b) for a, b in zip(model.parameters(), shuffled.parameters(), strict=False)
    )
    assert_same_function(model, shuffled, torch.randn(1, 3, size, size).double())


class RandomNet(nn.Module):
    """A random graph of layers; `plan` says what each step does to which earlier values."""

    def __init__(self, plan: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.plan, self.layers, widths = plan, nn.ModuleList(), [3]
        for kind, first, second in plan:
            width, other = widths[first % len(widths)], widths[second % len(widths)]
            layer, made = self._layer(kind, width, other, (4, 6, 8)[second % 3])
            self.layers.append(layer)
            widths.append(made)
        self.head1, self.head2 = nn.Linear(widths[-1] * 16, 8), nn.Linear(8, 3)

    @staticmethod
    def _layer(kind: str, width: int, other: int, made: int) -> tuple[nn.Module, int]:  # noqa: PLR0911
        if kind == "conv":
            return nn.Conv2d(width, made, 3, padding=1), made
        if kind == "grouped" and width % 2 == 0:
            return nn.Conv2d(width, made, 1, groups=2), made
        if kind == "depthwise" and width < 17:
            return nn.Conv2d(width, 2 * width, 3, padding=1, groups=width), 2 * width
        if kind == "bn":
            return nn.BatchNorm2d(width), width
        if kind == "add" and width == other:
            return nn.Identity(), width
        if kind == "cat" and width + other < 33:
            return nn.Identity(), width + other
        if kind == "half" and width % 2 == 0:
            return nn.Identity(), width // 2
        return nn.ReLU(), width

    def forward(self, x):
        values, widths = [x], [3]
        for (kind, first, second), layer in zip(self.plan, self.layers, strict=True):
            a, b = first % len(values), second % len(values)
            made, width = layer(values[a]), widths[a]
            if isinstance(layer, nn.Conv2d):
                width = layer.out_channels
            elif kind == "add" and widths[a] == widths[b]:
                made = values[a] + values[b]
            elif kind == "cat" and widths[a] + widths[b] < 33:
                made, width = torch.cat([values[a], values[b]], dim=1), widths[a] + widths[b]
            elif kind == "half" and width % 2 == 0:
                made, width = values[a].chunk(2, 1)[second % 2], width // 2
            values.append(made)
            widths.append(width)
        return self.head2(self.head1(values[-1].flatten(1)))


KINDS = ["conv", "conv", "grouped", "depthwise", "bn", "add", "cat", "half", "relu"]


@settings(max_examples=20)
@given(
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.integers(0, 11), st.integers(0, 11)),
        min_size=2,
        max_size=8,
    )
)
def test_any_order_keeps_the_function_of_random_nets(plan):
    torch.manual_seed(0)
    model = randomised(RandomNet(plan))
    x = torch.randn(2, 3, 4, 4).double()
    assert_same_function(model, shuffle_all(model)[0], x)
    before = trace(model)
    result = permute(model, Pattern(1, 2))
    assert_same_function(model, result.graph_module, x)
    pattern = Pattern(1, 2)
    assert kept(result.graph_module, result.account, pattern) >= kept(
        before, result.account, pattern
    ) * (1 - 1e-12)


def test_training_computes_the_same_too():
    model = randomised(small_nets()["residual"][0]).train()
    permuted = permute(model).graph_module
    x = torch.randn(4, 3, 32, 32).double()
    torch.testing.assert_close(permuted(x), model(x), rtol=1e-9, atol=1e-9)


def test_a_layer_called_twice_and_parameter_less_norms_follow():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
            self.bn, self.c = nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.bn(self.b(self.a(x)))
            return self.c(self.bn(self.b(x)))

    model = randomised(Twice())
    result = permute(model)
    assert set(result.account.applied) == {"b", "c"}
    assert_same_function(model, result.graph_module, torch.randn(2, 4, 5, 5).double())


class Refusing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 3, padding=1)

    def between(self, x):
        return x

    def forward(self, x):
        return self.third(self.between(self.second(self.first(x))))


class Mixing(Refusing):
    def between(self, x):
        return F.local_response_norm(x, 3)


class Shuffling(Refusing):
    def between(self, x):
        return F.channel_shuffle(x, 2)


class Shared(Refusing):
    def __init__(self) -> None:
        super().__init__()
        self.second.weight = self.first.weight


class Normed(Refusing):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.utils.parametrizations.weight_norm(self.second)


class Own(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight.flip(1), self.bias)


class Subclassed(Refusing):
    def __init__(self) -> None:
        super().__init__()
        self.second = Own(8, 8, 1)


class Returning(Refusing):
    def forward(self, x):
        y = self.second(self.first(x))
        return y, self.third(y)


class Indexing(Refusing):
    def between(self, x):
        return x[:, [1, 0, 2, 3, 4, 5, 6, 7]]


class Meeting(Refusing):
    def forward(self, x):
        return self.third(x * self.second(self.first(x)))


class Flattening(Refusing):
    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(8 * 16, 8)

    def between(self, x):
        return x.view(x.size(0), -1)


class Grouping(Refusing):
    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Conv2d(8, 8, 1, groups=2)


@pytest.mark.parametrize(
    ("kind", "reason", "sentence"),
    [
        (Mixing, Reason.CHANNELS_MIXED, "its input channels meet .*which may mix channels"),
        (Shuffling, Reason.CHANNELS_MIXED, r"meet \w+ \(call_function\), which may mix channels"),
        (Indexing, Reason.CHANNELS_MIXED, r"meet getitem \(call_function\), which may mix"),
        (Returning, Reason.MODEL_OUTPUT, "its input channels are part of the model's output"),
        (Meeting, Reason.MODEL_INPUT, "its input channels are those of the model's input"),
        (Subclassed, Reason.CUSTOM_FORWARD, "meet second, a Own with a forward of its own"),
        (Normed, Reason.PARAMETRISED, "meet second, whose weight is computed"),
        (Shared, Reason.SHARED_PARAMETER, "meet second, whose weight is shared by first, second"),
        (Flattening, Reason.SPANS_FEATURES, "each channel spans 16 of its features"),
        (Grouping, Reason.ONE_GROUP, "no two channels of different groups of M=4 may change"),
    ],
)
def test_the_reason_where_the_graph_forbids_it(kind, reason, sentence):
    model = randomised(kind())
    result = permute(model)
    skip = result.account.skipped["third"]
    assert skip.reason is reason
    assert skip.detail.startswith("third: ")
    assert re.search(sentence, skip.detail), skip.detail
    assert result.account.skipped["first"].reason in (Reason.MODEL_INPUT, Reason.SHARED_PARAMETER)
    x = torch.randn(2, 8, 4, 4).double()
    with torch.no_grad():
        torch.testing.assert_close(result.graph_module(x), model(x), rtol=1e-10, atol=1e-12)


def test_a_module_kept_whole_is_named():
    class Whole(nn.Module):
        def forward(self, x):
            return x.flip(1)

    model = nn.Sequential(nn.Conv2d(8, 8, 1), Whole(), nn.Conv2d(8, 8, 1))
    result = PermuteChannels(Policy(PATTERN), QUICK)(trace(model, leaves=["1"]))
    assert result.account.skipped["2"].reason is Reason.OPAQUE
    assert result.account.skipped["2"].detail == (
        "2: its input channels meet 1 (Whole), which is kept whole"
    )


def plain() -> nn.Module:
    torch.manual_seed(3)
    return randomised(
        nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 4),
        )
    )


def test_a_second_run_applies_nothing_and_changes_nothing():
    once = permute(plain())
    twice = PermuteChannels(Policy(PATTERN), ChannelPermutation(seed=5))(once.graph_module)
    assert once.account.applied == ("3", "6")
    assert twice.account.applied == ()
    assert twice.account.skipped["3"] == spre_fx.passes.Skip(
        Reason.ALREADY_DONE, "3: its input channels were put in order before, for 2:4"
    )
    states = once.graph_module.state_dict(), twice.graph_module.state_dict()
    assert all(map(torch.equal, *(state.values() for state in states)))


def test_the_seed_decides_and_the_result_can_be_copied_and_pickled():
    first, again = (permute(plain()).graph_module for _ in range(2))
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    for copied in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert all(map(torch.equal, first.parameters(), copied.parameters()))
        first.graph.lint()
        note = spre_fx.sites(copied)[1].note
        assert re.fullmatch(r"2:4 keeps 0\.\d+ -> 0\.\d+ of the magnitude: permuted", note)


def test_dense_layers_follow_but_are_no_reason_to_permute():
    model = plain()
    policy = Policy(PATTERN, exclude=("3", "6"))
    result = PermuteChannels(policy, QUICK)(trace(model))
    assert result.account.applied == ()
    assert all(map(torch.equal, model.parameters(), result.graph_module.parameters()))


def test_runs_before_the_masks():
    prepared = spre_fx.prepare(plain(), "2:4", method="asp")
    with pytest.raises(InvariantError, match=r"3: expected a dense graph, found a NMConv2d"):
        PermuteChannels(Policy(PATTERN), QUICK)(prepared)


def test_prepare_takes_the_masks_of_the_permuted_weights():
    model, x = plain(), torch.randn(2, 3, 9, 9).double()
    static = spre_fx.prepare(model, "2:4", method="asp")
    permuted = spre_fx.prepare(model, "2:4", method=spre_fx.ASP(permute=QUICK))
    assert static.state_dict().keys() == permuted.state_dict().keys()
    sums = [
        sum(float(gm.get_submodule(n).masked_weight()[0].detach().abs().sum()) for n in ("3", "6"))
        for gm in (static, permuted)
    ]
    assert sums[1] > sums[0]
    before, after = (spre_fx.sites(gm)[1] for gm in (static, permuted))
    assert "keeps" not in before.note
    assert re.search(r"; 2:4 keeps 0\.\d+ -> 0\.\d+ of the magnitude: permuted$", after.note)
    assert "permuted" in str(spre_fx.diff(model, permuted))
    deployed = spre_fx.finalize(permuted)
    with torch.no_grad():
        torch.testing.assert_close(deployed(x), permuted.eval()(x), rtol=1e-10, atol=1e-12)


def test_a_time_limit_is_shared_out():
    search = ChannelPermutation(sweeps=10**6, seconds=1.0)
    result = permute(plain(), search=search)
    assert result.account.applied


def test_flat_depthwise_convs_follow_the_order_others_choose():
    model = randomised(
        nn.Sequential(
            nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, groups=16, padding=1), nn.Conv2d(16, 8, 1)
        )
    )
    policy = Policy(PATTERN, depthwise="flat")
    result = PermuteChannels(policy, QUICK)(trace(model))
    assert result.account.applied == ("2",)
    sentence = "1: depthwise, its channels follow the order that other layers choose"
    assert str(result.account.skipped["1"]) == f"depthwise: {sentence}"
    assert_same_function(model, result.graph_module, torch.randn(2, 8, 5, 5).double())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121"])
def test_whole_models_of_torchvision(name):
    model = randomised(torchvision.models.get_model(name, num_classes=8))
    result = permute(model, search=ChannelPermutation(sweeps=2))
    assert_same_function(model, result.graph_module, torch.randn(1, 3, 64, 64).double())
    assert kept(result.graph_module, result.account) > kept(model, result.account)
