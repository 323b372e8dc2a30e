"""Lower: every folded N:M layer is run the fastest way, or stays dense and says why."""

import time
from collections.abc import Sequence
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
    """Has one way to run 3x3 convs and refuses the rest."""

    name: str = "toy"
    machine: str = "toy machine"
    asked: list[tuple[nn.Module, Pattern]] = field(default_factory=list)
    ruled: list[tuple[int, ...] | None] = field(default_factory=list)

    def candidates(self, layer: nn.Module, pattern: Pattern) -> list[Lowered] | str:
        self.asked.append((layer, pattern))
        kernel = tuple(layer.weight.shape[2:])
        if kernel != (3, 3):
            return f"kernel {kernel} is not (3, 3)"
        return [Lowered(Doubling(layer), "toy", "twice as much")]

    def rule(
        self,
        layer: nn.Module,
        pattern: Pattern,
        candidates: Sequence[Lowered],
        input_shape: tuple[int, ...] | None,
    ) -> Lowered:
        self.ruled.append(input_shape)
        return candidates[0]


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
    assert records.read(result.graph_module.fc) == {
        "pattern": "1:4",
        "backend": "dense",
        "note": "not lowered: kernel () is not (3, 3)",
    }
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


def test_a_layer_whose_weight_the_graph_reads_is_never_lowered() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.to(self.conv.weight.dtype))

    traced = trace(Reads())
    records.write(traced.conv, records.Record(pattern="1:4"))
    result = Lower(Toy())(traced)
    why = "refused by the backend: conv: its parameters are also read by conv_weight"
    assert reasons(result) == {"conv": why}
    assert type(result.graph_module.conv) is nn.Conv2d


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


class Waiting(nn.Module):
    """Does nothing, for so many milliseconds."""

    def __init__(self, milliseconds: float) -> None:
        super().__init__()
        self.milliseconds = milliseconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.milliseconds / 1000)
        return x


@dataclass(frozen=True)
class Timed(Toy):
    """Has ways to run a layer that take so many milliseconds."""

    waits: tuple[float, ...] = ()

    def candidates(self, layer: nn.Module, pattern: Pattern) -> list[Lowered]:
        return [Lowered(Waiting(w), f"{w} ms", f"waits {w} ms") for w in self.waits]


def deployed_conv(layer: nn.Module) -> GraphModule:
    graph_module = trace(chain(conv=layer))
    records.write(graph_module.conv, records.Record(pattern="1:4"))
    return graph_module


def test_with_shapes_the_fastest_way_is_measured_and_written_down() -> None:
    gm = deployed_conv(nn.Conv2d(64, 64, 3))
    backend = Timed(waits=(9.0, 0.01))
    lowered = Lower(backend, {gm.conv: [(4, 64, 32, 32)]}).run_in_place(gm).graph_module
    assert lowered.conv.milliseconds == 0.01
    record = records.read(lowered.conv)
    assert record["backend"] == "0.01 ms"
    assert 0.01 <= record["chosen_ms"] < record["dense_ms"]
    ratio = f"{record['dense_ms'] / record['chosen_ms']:.2f}"
    assert record["note"] == f"waits 0.01 ms: {ratio} times as fast as dense, on 4x64x32x32"
    assert backend.ruled == []


def test_no_layer_is_slower_than_dense() -> None:
    gm = deployed_conv(conv := nn.Conv2d(8, 8, 3))
    lowered = Lower(Timed(waits=(3.0,)), {gm.conv: [(2, 8, 6, 6)]}).run_in_place(gm).graph_module
    assert type(lowered.conv) is nn.Conv2d
    assert torch.equal(lowered.conv.weight, conv.weight)
    record = records.read(lowered.conv)
    assert record["backend"] == "dense"
    assert record["chosen_ms"] == record["dense_ms"] < 3
    assert record["note"].startswith("dense: 3.0 ms takes ")


def test_the_rule_decides_on_a_layer_that_no_input_reached() -> None:
    gm = deployed_conv(nn.Conv2d(8, 8, 3))
    backend = Toy()
    assert (
        type(Lower(backend, {nn.Conv2d(1, 1, 1): [(1, 1, 1, 1)]})(gm).graph_module.conv) is Doubling
    )
    assert backend.ruled == [None]


def test_hooks_of_a_layer_run_for_what_it_is_lowered_to() -> None:
    gm = deployed_conv(nn.Conv2d(8, 8, 3))
    seen = []
    gm.conv.register_forward_hook(lambda *_: seen.append(1))
    lowered = Lower(Toy()).run_in_place(gm).graph_module
    lowered(torch.randn(1, 8, 6, 6))
    assert type(lowered.conv) is Doubling
    assert seen  # once for the conv inside, too
