"""FuseEpilogues: additions and activations after lowered layers, and when they must stay."""

from collections.abc import Callable

import pytest
import torch
import torchvision
from models import kinds, model_of, reasons
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from spre_fx.dense_form import to_dense
from spre_fx.packed_layers import PackedConv2d, PackedLinear
from spre_fx.passes import FuseEpilogues, PassResult, SpecialiseToEval, trace
from spre_fx.passes.edit import replace_module

X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


def packed(forward: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> GraphModule:
    """The graph of a forward over packed conv1, conv2 (8 -> 8, 3x3) and other modules."""
    model = model_of("Packed", forward)()
    del model.bn1, model.bn2
    for name, layer in layers.items():
        model.add_module(name, layer)
    graph_module = SpecialiseToEval()(trace(model.eval())).graph_module
    for name, module in list(graph_module.named_modules()):
        if type(module) is nn.Conv2d:
            replace_module(graph_module, name, PackedConv2d.from_dense(module))
        if type(module) is nn.Linear:
            replace_module(graph_module, name, PackedLinear.from_dense(module))
    return graph_module


def inner(gm: GraphModule) -> list[str]:
    """What each node does, between the placeholder and the output."""
    return kinds(gm)[1:-1]


@torch.no_grad()
def fused(gm: GraphModule) -> PassResult:
    """Fuse, and check what comes out against the graph before and the dense form after."""
    expected = gm(X.clone())
    result = FuseEpilogues()(gm)
    dense = to_dense(result.graph_module)
    for same in (result.graph_module, dense):
        torch.testing.assert_close(same(X.clone()), expected)
    assert not any(isinstance(m, PackedConv2d | PackedLinear) for m in dense.modules())
    return result


ACTIVATIONS = {
    "module": (lambda m, x: m.act(m.conv1(x)), nn.ReLU(), "relu"),
    "in place": (lambda m, x: m.act(m.conv1(x)), nn.ReLU(inplace=True), "relu"),
    "relu6": (lambda m, x: m.act(m.conv1(x)), nn.ReLU6(), "relu6"),
    "silu": (lambda m, x: m.act(m.conv1(x)), nn.SiLU(inplace=True), "silu"),
    "hardswish": (lambda m, x: m.act(m.conv1(x)), nn.Hardswish(), "hardswish"),
    "hardtanh": (lambda m, x: m.act(m.conv1(x)), nn.Hardtanh(0, 6), "relu6"),
    "F.relu": (lambda m, x: F.relu(m.conv1(x)), None, "relu"),
    "F.relu in place": (lambda m, x: F.relu(m.conv1(x), inplace=True), None, "relu"),
    "F.relu_": (lambda m, x: F.relu_(m.conv1(x)), None, "relu"),
    "torch.relu": (lambda m, x: torch.relu(m.conv1(x)), None, "relu"),
    "method": (lambda m, x: m.conv1(x).relu_(), None, "relu"),
    "F.relu6": (lambda m, x: F.relu6(m.conv1(x)), None, "relu6"),
    "F.silu": (lambda m, x: F.silu(m.conv1(x)), None, "silu"),
    "F.hardswish": (lambda m, x: F.hardswish(m.conv1(x)), None, "hardswish"),
    "F.hardtanh": (lambda m, x: F.hardtanh(m.conv1(x), 0.0, 6.0), None, "relu6"),
}


@pytest.mark.parametrize(("forward", "act", "name"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_an_activation_becomes_an_attribute(
    forward: Callable[[nn.Module, Tensor], Tensor], act: nn.Module | None, name: str
) -> None:
    result = fused(packed(forward, **({} if act is None else {"act": act})))
    assert result.account.applied == ("conv1",)
    assert result.graph_module.conv1.activation == name
    assert inner(result.graph_module) == ["PackedConv2d"]


OTHERS = {
    "hardtanh": nn.Hardtanh(-1, 1),
    "gelu": nn.GELU(),
    "subclass": type("Twice", (nn.ReLU,), {"forward": lambda self, x: 2 * x})(),
}


@pytest.mark.parametrize("act", OTHERS.values(), ids=OTHERS)
def test_other_activations_stay(act: nn.Module) -> None:
    result = fused(packed(lambda m, x: m.act(m.conv1(x)), act=act))
    assert reasons(result)["conv1"].startswith("nothing follows that it could take up: conv1: ")


ADDS = {
    "+": lambda m, x: m.conv1(x) + x,
    "either side": lambda m, x: x + m.conv1(x),
    "torch.add": lambda m, x: torch.add(m.conv1(x), x),
    "add_": lambda m, x: m.conv1(x).add_(x),
    "add": lambda m, x: x.add(m.conv1(x)),
}


@pytest.mark.parametrize("forward", ADDS.values(), ids=ADDS)
def test_an_addition_becomes_an_argument(forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    gm = fused(packed(lambda m, x: forward(m, x).relu())).graph_module
    assert inner(gm) == ["PackedConv2d"]
    (call,) = (node for node in gm.graph.nodes if node.op == "call_module")
    assert [argument.name for argument in call.args] == ["x", "x"]
    assert gm.conv1.activation == "relu"


def test_of_two_layers_that_are_added_the_later_takes_up_the_earlier() -> None:
    gm = fused(packed(lambda m, x: (m.conv1(x) + m.conv2(x)).relu())).graph_module
    first, second = (node for node in gm.graph.nodes if node.op == "call_module")
    assert second.args[1] is first
    assert (gm.conv1.activation, gm.conv2.activation) == (None, "relu")


def test_an_addition_after_an_activation_stays() -> None:
    gm = fused(packed(lambda m, x: m.conv1(x).relu() + x)).graph_module
    assert gm.conv1.activation == "relu"
    assert inner(gm) == ["PackedConv2d", "add"]


def test_a_linear_layer_takes_up_what_follows() -> None:
    forward = lambda m, x: (m.fc(x.mean((2, 3))) + x[:, :, 0, 0]).relu()  # noqa: E731
    result = FuseEpilogues()(packed(forward, fc=nn.Linear(8, 8)))
    assert "fc" in reasons(result)  # the indexing comes after it
    forward = lambda m, x: F.silu(x[:, :, 0, 0] + m.fc(x.mean((2, 3))))  # noqa: E731
    gm = fused(packed(forward, fc=nn.Linear(8, 8))).graph_module
    assert gm.fc.activation == "silu"
    assert inner(gm) == ["getitem", "mean", "PackedLinear"]


STAYS = {
    "two readers": (
        lambda m, x: (y := m.conv1(x)).relu() + y,
        "output has other users: conv1: relu, add take its output",
    ),
    "itself": (lambda m, x: (y := m.conv1(x)) + y, "nothing follows"),
    "a number": (lambda m, x: m.conv1(x) + 1, "nothing follows"),
    "scaled": (lambda m, x: torch.add(m.conv1(x), x, alpha=2), "nothing follows"),
    "called twice": (lambda m, x: m.conv1(m.conv1(x)).relu(), "called more than once"),
    "changed in between": (
        lambda m, x: (z := x * 1, y := m.conv1(x), w := z.relu_(), y + z + w)[3],
        "nothing follows",
    ),
    "added to the input": (lambda m, x: x.add_(m.conv1(x)), "nothing follows"),
    "read after being added to": (
        lambda m, x: (z := x + 1, w := z.add_(m.conv1(x)), z * w)[2],
        "nothing follows",
    ),
}


@pytest.mark.parametrize(("forward", "why"), STAYS.values(), ids=STAYS)
def test_what_must_stay(forward: Callable[[nn.Module, Tensor], Tensor], why: str) -> None:
    gm = packed(forward)
    result = fused(gm)
    assert why in reasons(result)["conv1"]
    assert len(result.graph_module.graph.nodes) == len(gm.graph.nodes)


def test_a_residual_that_is_broadcast_is_added_all_the_same() -> None:
    gm = fused(packed(lambda m, x: m.conv1(x) + x.mean((2, 3), keepdim=True))).graph_module
    assert inner(gm) == ["PackedConv2d", "mean", "add"]
    gm = fused(packed(lambda m, x: x + m.conv1(x.mean((2, 3), keepdim=True)))).graph_module
    assert inner(gm) == ["mean", "PackedConv2d"]


def test_hooks_keep_what_they_see() -> None:
    gm = packed(lambda m, x: m.conv1(x).relu())
    gm.conv1.register_forward_hook(lambda *_: None)
    assert reasons(FuseEpilogues().run_in_place(gm)) == {
        "conv1": "has hooks: conv1: its hooks expect its own output"
    }


def test_dropout_and_identities_go_first() -> None:
    layers = {"drop": nn.Dropout(), "same": nn.Identity()}
    depth = torchvision.ops.StochasticDepth(0.5, "row")

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.depth(m.conv1(x)) + x
        return F.dropout(m.same(m.drop(y)).relu(), training=False)

    gm = fused(packed(forward, depth=depth, **layers)).graph_module
    assert inner(gm) == ["PackedConv2d"]
    assert gm.conv1.activation == "relu"


def test_a_dense_graph_stays_as_it_is() -> None:
    gm = trace(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Dropout(), nn.ReLU()).eval())
    result = FuseEpilogues()(gm)
    assert reasons(result) == {"0": "runs dense: 0: runs dense"}
    assert result.graph_module.code == gm.code
