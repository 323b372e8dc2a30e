"""The policy: the user's wishes, what a layer can carry, and the sentence for what stays dense."""

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models import (
    Attention,
    CustomForward,
    FunctionalConv,
    Model,
    Parametrised,
    SharedConv,
    TiedConvs,
    Transposed,
    chain,
    conv_bn,
    prepare,
)
from torch import Tensor, nn
from torch.fx import symbolic_trace

import spre_fx
from spre_fx import OptionError, Pattern, records
from spre_fx.modules import NMLayer
from spre_fx.passes import Policy, Reason, Skip, trace
from spre_fx.passes.graph_view import GraphView

P = Pattern(1, 4)
LESS = "is less than M=4"


def decide(policy: Policy, model: nn.Module) -> dict[str, Pattern | Skip]:
    view = GraphView(model if isinstance(model, torch.fx.GraphModule) else trace(model))
    return {name: policy.pattern_for(view, each) for name, each in view.candidates.items()}


class Nested(nn.Module):
    """block1.0.conv, block1.1.conv, block10.conv and head."""

    def __init__(self) -> None:
        super().__init__()
        self.block1 = nn.Sequential(conv_bn(), conv_bn())
        self.block10 = conv_bn()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block10(self.block1(x)).mean((2, 3)))


NESTED = ("block1.0.conv", "block1.1.conv", "block10.conv", "head")


class PlainConv(nn.modules.conv._ConvNd):
    """A conv that is no nn.Conv2d, though it has a kernel of its kind."""

    def __init__(self) -> None:
        pair = (1, 1)
        super().__init__(8, 8, pair, pair, (0, 0), pair, False, (0, 0), 1, True, "zeros")

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


@pytest.mark.parametrize(
    ("build", "name", "reason", "detail"),
    [
        (
            Attention,
            "attention.out_proj",
            Reason.OPAQUE,
            "is run by attention (MultiheadAttention), which is kept whole",
        ),
        (
            Transposed,
            "conv1",
            Reason.TRANSPOSED,
            "ConvTranspose2d sums over output channels, not in groups of inputs",
        ),
        (
            Parametrised,
            "conv1",
            Reason.PARAMETRISED,
            "its weight is computed from other parameters (weight norm or another parametrisation)",
        ),
        (
            CustomForward,
            "conv1",
            Reason.CUSTOM_FORWARD,
            "Standardised is a subclass of nn.Conv2d, whose forward may differ",
        ),
        (TiedConvs, "conv2", Reason.SHARED_PARAMETER, "its weight is shared by conv1, conv2"),
        (lambda: conv_bn(groups=8), "conv", Reason.DEPTHWISE, "depthwise, groups=8 equals C_in=8"),
        (
            lambda: conv_bn(groups=8, out_channels=16),
            "conv",
            Reason.DEPTHWISE,
            "depthwise, groups=8 equals C_in=8",
        ),
        *(
            (
                partial(conv_bn, in_channels=n),
                "conv",
                Reason.FEW_CHANNELS,
                f"C_in/groups={n} {LESS}",
            )
            for n in (1, 3)
        ),
        (lambda: conv_bn(groups=4), "conv", Reason.FEW_CHANNELS, f"C_in/groups=2 {LESS}"),
        (lambda: chain(fc=nn.Linear(3, 8)), "fc", Reason.FEW_CHANNELS, f"C_in/groups=3 {LESS}"),
        (lambda: prepare(conv_bn(), "2:4"), "conv", Reason.ALREADY_DONE, "already carries 2:4"),
    ],
)
def test_a_layer_that_cannot_carry_a_pattern_stays_dense_and_says_why(
    build: Callable[[], nn.Module], name: str, reason: Reason, detail: str
) -> None:
    assert decide(Policy(P), build())[name] == Skip(reason, f"{name}: {detail}")


DEPTHWISE = {
    "single": nn.Conv2d(8, 8, 3, groups=8),
    "twice": nn.Conv2d(8, 16, 3, groups=8),
    "rows": nn.Conv2d(16, 16, (1, 3), groups=16),
    "grouped": nn.Conv2d(16, 16, 3, groups=4),
    "few": nn.Conv2d(16, 16, 3, groups=8),
    "dense": nn.Conv2d(16, 16, 3),
}


def test_flat_is_for_depthwise_convs_alone() -> None:
    policy = Policy(P, overrides={"rows": Pattern(2, 4)}, depthwise="flat")
    assert decide(policy, chain(**DEPTHWISE)) == {
        "single": Pattern(1, 4, flat=True),
        "twice": Pattern(1, 4, flat=True),
        "rows": Pattern(2, 4, flat=True),
        "grouped": P,
        "few": Skip(Reason.FEW_CHANNELS, f"few: C_in/groups=2 {LESS}"),
        "dense": P,
    }


def test_the_user_can_still_leave_a_depthwise_conv_dense() -> None:
    policy = Policy(P, exclude=("single",), overrides={"twice": None}, depthwise="flat")
    found = decide(policy, chain(**DEPTHWISE))
    assert found["single"] == Skip(Reason.EXCLUDED, "single: excluded by 'single'")
    assert found["twice"].reason is Reason.EXCLUDED


def test_a_depthwise_conv_of_fewer_weights_than_m_stays_dense_and_says_why() -> None:
    policy = Policy(Pattern(1, 32), depthwise="flat")
    found = decide(policy, chain(conv=nn.Conv2d(3, 3, 3, groups=3)))
    detail = "conv: its 27 weights are fewer than M=32"
    assert found == {"conv": Skip(Reason.FEW_CHANNELS, detail)}


def test_an_unknown_choice_for_depthwise_convs_is_refused() -> None:
    with pytest.raises(OptionError, match="depthwise='dense': expected None or 'flat'"):
        Policy(P, depthwise="dense")


@pytest.mark.parametrize("where", ["pattern", "overrides"])
def test_a_flat_pattern_for_all_layers_is_refused(where: str) -> None:
    flat = Pattern(1, 4, flat=True)
    with pytest.raises(OptionError) as refusal:
        Policy(flat) if where == "pattern" else Policy(P, overrides={"conv": flat})
    assert str(refusal.value) == (
        "pattern='1:4 flat': expected 'N:M', found a flat pattern, which is for depthwise convs "
        "alone: '1:4' and depthwise='flat'."
    )


def test_a_layer_that_is_never_called_stays_dense_and_says_why() -> None:
    gm = trace(Model())
    gm.add_module("never", nn.Linear(8, 8))
    detail = "never: is never called in the traced forward"
    assert decide(Policy(P), gm)["never"] == Skip(Reason.NOT_CALLED, detail)


def test_a_conv_of_no_known_base_stays_dense_and_says_why() -> None:
    skip = decide(Policy(P), chain(conv=PlainConv()))["conv"]
    assert isinstance(skip, Skip)
    assert skip.reason is Reason.CUSTOM_FORWARD
    assert skip.detail.startswith("conv: PlainConv ")


@pytest.mark.parametrize("function", [F.conv2d, F.linear, F.conv_transpose1d])
def test_a_functional_call_stays_dense_and_says_why(function: Callable[..., Tensor]) -> None:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return function(x, w)

    name = function.__name__
    detail = f"{name} is called as a function, its weight belongs to no conv or linear module"
    assert decide(Policy(P), symbolic_trace(forward)) == {
        name: Skip(Reason.FUNCTIONAL, f"{name}: {detail}")
    }


@pytest.mark.parametrize(
    "layer",
    [
        *(nn.Conv2d(channels, 8, 3) for channels in (4, 5, 6, 7, 9)),  # partial groups too
        *(nn.Conv2d(8, 8, kernel) for kernel in (1, 2, (1, 7), 5)),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv1d(8, 8, 3),
        nn.Conv3d(8, 8, 2),
        nn.Linear(9, 2),
    ],
)
def test_a_layer_with_a_group_to_fill_carries_the_pattern(layer: nn.Module) -> None:
    assert decide(Policy(P), chain(layer=layer)) == {"layer": P}


def test_a_conv_called_twice_carries_the_pattern() -> None:
    assert decide(Policy(P), SharedConv())["conv1"] == P


def test_one_group_more_or_less_is_decided_by_m() -> None:
    model = chain(conv=nn.Conv2d(8, 8, 3))
    assert decide(Policy(Pattern(1, 8)), model) == {"conv": Pattern(1, 8)}
    assert decide(Policy(Pattern(1, 9)), model) == {
        "conv": Skip(Reason.FEW_CHANNELS, "conv: C_in/groups=8 is less than M=9")
    }


@pytest.mark.parametrize(
    ("rule", "dense"),
    [
        ("head", NESTED[3:]),
        ("block1.0.conv", NESTED[:1]),
        ("block1", NESTED[:2]),
        ("block1.1", NESTED[1:2]),
        ("block1.*", NESTED[:2]),
        ("block*", NESTED[:3]),
        ("*.conv", NESTED[:3]),
        ("*.[!0].conv", NESTED[1:2]),
        ("block1?", NESTED[2:3]),
        ("*", NESTED),
        (nn.Linear, NESTED[3:]),
        (nn.Conv2d, NESTED[:3]),
    ],
)
def test_exclude_takes_names_globs_types_and_the_modules_around_a_layer(
    rule: str | type[nn.Module], dense: tuple[str, ...]
) -> None:
    said = rule if isinstance(rule, str) else rule.__name__
    policy = Policy(P, exclude=(rule,))
    assert decide(policy, Nested()) == {
        name: Skip(Reason.EXCLUDED, f"{name}: excluded by {said!r}") if name in dense else P
        for name in NESTED
    }
    policy.check(GraphView(trace(Nested())))


def test_exclude_takes_the_type_of_a_module_around_a_layer() -> None:
    gm = spre_fx.prepare(chain(stem=conv_bn(), block=Model()), "1:4", exclude=Model)
    assert isinstance(gm.get_submodule("stem.conv"), NMLayer)
    for name in "block.conv1", "block.conv2":
        record = records.read(gm.get_submodule(name))
        assert record["reason"] == "excluded"
        assert record["note"].startswith(f"{name}: excluded by ")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"head": Pattern(2, 4)}, "1:4 1:4 1:4 2:4"),
        ({"block1": Pattern(1, 2)}, "1:2 1:2 1:4 1:4"),
        ({"*": Pattern(1, 2), "block1.0": Pattern(2, 4)}, "2:4 1:2 1:2 1:2"),
        ({"block1.0": Pattern(2, 4), "*": Pattern(1, 2)}, "1:2 1:2 1:2 1:2"),
        ({"*": None, "head": P}, "dense dense dense 1:4"),
        ({"block1": P, "block1.1.conv": None}, "1:4 dense 1:4 1:4"),
    ],
)
def test_the_last_override_that_matches_wins(
    overrides: Mapping[str, Pattern | None], expected: str
) -> None:
    decisions = decide(Policy(P, overrides=overrides), Nested()).values()
    assert " ".join("dense" if isinstance(d, Skip) else str(d) for d in decisions) == expected


def test_an_override_of_none_says_which_rule_it_was() -> None:
    policy = Policy(P, overrides={"h*": P, "head": None})
    assert decide(policy, Nested())["head"] == Skip(
        Reason.EXCLUDED, "head: left dense by the override 'head'"
    )


def test_exclude_beats_overrides_and_names_its_first_rule() -> None:
    policy = Policy(P, exclude=("hea*", "head"), overrides={"head": Pattern(2, 4)})
    assert decide(policy, Nested())["head"] == Skip(Reason.EXCLUDED, "head: excluded by 'hea*'")


def test_an_override_decides_how_many_channels_are_few() -> None:
    model = conv_bn(in_channels=3)
    assert decide(Policy(P, overrides={"conv": Pattern(1, 2)}), model) == {"conv": Pattern(1, 2)}


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Policy(P, exclude=("heads",)), "exclude: 'heads'"),
        (Policy(P, exclude=("head", "Head")), "exclude: 'Head'"),
        (Policy(P, exclude=("conv",)), "exclude: 'conv'"),
        (Policy(P, exclude=(nn.Conv3d,)), "exclude: 'Conv3d'"),
        (Policy(P, exclude=("block1.0.bn",)), "exclude: 'block1.0.bn'"),
        (Policy(P, overrides={"block2": None}), "overrides: 'block2'"),
        (Policy(P, overrides={"": P}), "overrides: ''"),
    ],
)
def test_a_rule_that_matches_nothing_is_an_error_that_lists_layers(
    policy: Policy, said: str
) -> None:
    with pytest.raises(OptionError) as error:
        policy.check(GraphView(trace(Nested())))
    assert str(error.value) == (
        f"{said} matches no conv or linear. Expected the name of a layer or of a module that holds "
        "some, a glob such as 'layer1.*', or a module type. The layers are: "
        f"{', '.join(NESTED)}."
    )


def test_the_error_lists_five_layers_at_most() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    with pytest.raises(OptionError, match=r"The layers are: 0, 1, 2, 3, 4, \.\.\.\.$"):
        Policy(P, exclude=("fc",)).check(GraphView(trace(model)))


def test_a_rule_may_speak_of_functional_calls_and_of_layers_that_stay_dense() -> None:
    for model, rule in (FunctionalConv(), "conv2"), (conv_bn(groups=8), "conv"):
        Policy(P, exclude=(rule,), overrides={rule: None}).check(GraphView(trace(model)))
