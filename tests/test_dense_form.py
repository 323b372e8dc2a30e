"""`to_dense`: the ordinary layers, activations and additions that a lowered model stands for."""

import torch
from models import kinds
from test_planned_graph import MODELS, Odd, ResNet, graph_of
from torch import Tensor, nn

from spre_fx import records
from spre_fx.backends import is_lowered
from spre_fx.dense_form import dense_view, replace_everywhere, to_dense
from spre_fx.passes.planned_graph import planned


def test_every_layer_is_ordinary_and_computes_the_same() -> None:
    for build, shape in MODELS.values():
        gm = graph_of(build())
        dense = to_dense(gm)
        assert not any(map(is_lowered, dense.modules()))
        x = torch.randn(shape)
        torch.testing.assert_close(
            dense(x.clone()), gm(x.clone()), rtol=1e-4, atol=1e-4, check_stride=False
        )


def test_a_planned_graph_becomes_an_ordinary_one_and_stays_what_it_is() -> None:
    gm = planned(graph_of(ResNet()))
    before = gm.code
    dense = to_dense(gm)
    assert type(dense).__mro__[1] is torch.fx.GraphModule
    assert type(dense).__name__ == type(gm).__name__
    assert (gm.code, type(gm.a1).__name__) == (before, "PackedConv2d")


def test_what_was_taken_up_has_nodes_of_its_own_again() -> None:
    dense = to_dense(graph_of(ResNet()))
    names = [node.name for node in dense.graph.nodes]
    assert {"a1_relu", "a2_add", "a2_relu"} <= set(names)
    assert kinds(dense).count("add") == 2


def test_records_say_nothing_of_the_choice_and_views_do() -> None:
    gm = graph_of(ResNet())
    record = records.Record(pattern="1:4", backend="cpu", note="fast", dense_ms=2.0, chosen_ms=1.0)
    records.write(gm.a1, record)
    assert records.read(to_dense(gm).a1) == {"pattern": "1:4"}
    assert records.read(dense_view(gm).a1) == record
    assert records.read(gm.a1) == record


def test_a_dense_model_is_its_own_view_and_is_copied() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    assert dense_view(model) is model
    assert to_dense(model) is not model
    assert torch.equal(to_dense(model)[0].weight, model[0].weight)


def test_hooks_go_along() -> None:
    gm = graph_of(ResNet())
    seen: list[str] = []
    gm.fc.register_forward_hook(lambda *_: seen.append("fc"))
    gm.register_forward_hook(lambda *_: seen.append("model"))
    to_dense(gm)(torch.randn(1, 3, 16, 16))
    assert seen == ["fc", "model"]


def test_modules_are_replaced_wherever_they_stand() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Linear(2, 2))
            self.b = self.a[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model, new = Twice(), nn.Identity()
    assert replace_everywhere(model, {model.b: new}) is model
    assert model.a[0] is model.b is new
    assert replace_everywhere(model, {model: new}) is new


def test_a_graph_inside_code_without_one() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = planned(graph_of(Odd()))

    dense = to_dense(Around())
    assert not any(map(is_lowered, dense.modules()))
    assert type(dense.inner).__mro__[1] is torch.fx.GraphModule
