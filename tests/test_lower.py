"""Lower: every folded N:M layer goes to the backend, which takes it or refuses it in words."""

from dataclasses import dataclass, field

import pytest
import torch
from models import Residual, SharedConv, assert_same, chain, kinds, prepare, reasons, run
from torch import Tensor, nn
from torch.fx import GraphModule

from spre_fx import Pattern, records
from spre_fx.backends import DenseBackend, Lowered
from spre_fx.passes import FoldBranches, Lower, trace


class Doubling(nn.Module):
    """What the toy backend makes of a layer: one that is easily told apart."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


@dataclass(frozen=True)
class Toy:
    """Takes 3x3 convs and refuses the rest."""

    name: str = "toy"
    asked: list[tuple[nn.Module, Pattern]] = field(default_factory=list)

    def lower(self, layer: nn.Module, pattern: Pattern) -> Lowered | str:
        self.asked.append((layer, pattern))
        kernel = tuple(layer.weight.shape[2:])
        if kernel != (3, 3):
            return f"kernel {kernel} is not (3, 3)"
        return Lowered(Doubling(layer), "twice as much")


def fold(model: nn.Module) -> GraphModule:
    return FoldBranches()(prepare(model)).graph_module


def test_the_dense_backend_keeps_every_layer_and_writes_it_down() -> None:
    folded = fold(Residual())
    result = Lower(DenseBackend())(folded)
    assert result.account.applied == ("conv1", "conv2", "shortcut.conv", "fc")
    assert result.account.skipped == {}
    assert kinds(result.graph_module) == kinds(folded)
    assert records.read(result.graph_module.get_submodule("shortcut.conv")) == {
        "pattern": "1:4",
        "backend": "dense",
        "note": "runs as an ordinary dense layer",
    }
    x = torch.randn(2, 8, 6, 6)
    assert_same(run(result.graph_module, x, training=False), run(folded, x, training=False))


def test_a_backend_is_asked_once_a_layer_with_its_pattern() -> None:
    backend = Toy()
    gm = fold(chain(a=nn.Conv2d(8, 8, 3), b=nn.Conv2d(8, 8, 1), c=nn.Conv2d(8, 8, 3)))
    result = Lower(backend)(gm)
    assert [pattern for _, pattern in backend.asked] == [Pattern(1, 4)] * 3
    assert [type(layer) for layer, _ in backend.asked] == [nn.Conv2d] * 3
    assert backend.asked[0][0] is result.graph_module.a.layer


def test_what_a_backend_refuses_stays_and_says_why() -> None:
    folded = fold(Residual())
    result = Lower(Toy())(folded)
    assert result.account.applied == ("conv1", "conv2")
    assert reasons(result) == {
        "shortcut.conv": "refused by the backend: shortcut.conv: kernel (1, 1) is not (3, 3)",
        "fc": "refused by the backend: fc: kernel () is not (3, 3)",
    }
    assert type(result.graph_module.conv1) is Doubling
    assert type(result.graph_module.fc) is nn.Linear
    assert kinds(result.graph_module) == [
        "Doubling" if kind == "Conv2d" and index < 4 else kind
        for index, kind in enumerate(kinds(folded))
    ]


def test_a_flat_pattern_is_never_lowered_and_says_why() -> None:
    conv = nn.Conv2d(8, 8, 3, groups=8)
    records.write(conv, records.Record(pattern="1:4 flat"))
    backend = Toy()
    result = Lower(backend)(trace(chain(conv=conv)))
    why = "groups of 1:4 flat straddle filters, which no sparse op can take"
    assert reasons(result) == {"conv": f"refused by the backend: conv: {why}"}
    assert backend.asked == []
    record = {"pattern": "1:4 flat", "note": f"not lowered: {why}"}
    assert records.read(result.graph_module.conv) == record


def test_what_a_backend_makes_is_what_runs() -> None:
    folded = fold(chain(conv=nn.Conv2d(8, 8, 3), act=nn.ReLU()))
    x = torch.randn(2, 8, 6, 6)
    lowered = Lower(Toy())(folded).graph_module
    assert torch.equal(lowered(x), 2 * folded(x))
    assert records.read(lowered.conv) == {
        "pattern": "1:4",
        "backend": "toy",
        "note": "twice as much",
    }


def test_both_calls_of_a_shared_conv_are_lowered() -> None:
    gm = Lower(Toy())(fold(SharedConv())).graph_module
    assert kinds(gm).count("Doubling") == 2
    assert "Conv2d" not in kinds(gm)


@pytest.mark.parametrize("backend", [DenseBackend(), Toy()])
def test_layers_without_a_pattern_are_never_lowered(backend: DenseBackend | Toy) -> None:
    result = Lower(backend)(trace(Residual()))
    assert result.account.applied == ()
    assert set(reasons(result).values()) == {
        f"not sparse: {name}: carries no N:M pattern"
        for name in ("conv1", "conv2", "shortcut.conv", "fc")
    }


def test_a_functional_call_carries_no_pattern() -> None:
    class Functional(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return nn.functional.conv2d(x, w)

    assert reasons(Lower(Toy())(trace(Functional()))) == {
        "conv2d": "not sparse: conv2d: carries no N:M pattern"
    }


def test_a_second_run_lowers_nothing() -> None:
    once = Lower(DenseBackend())(fold(Residual())).graph_module
    backend = Toy()
    twice = Lower(backend)(once)
    assert twice.account.applied == ()
    assert reasons(twice)["conv1"] == "already done: conv1: is lowered to dense"
    assert backend.asked == []
    assert kinds(twice.graph_module) == kinds(once)
