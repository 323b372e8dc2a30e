"""finalize, adopt and lower with backends: what runs, what is written down, what formats see."""

from pathlib import Path

import pytest
import torch
from models import AuxiliaryHead, randomise
from test_api import small_net
from torch import Tensor, nn

import spre_fx
from spre_fx import engine, lowering, planned
from spre_fx.backends import is_lowered
from spre_fx.packed_layers import PackedConv2d
from spre_fx.passes.planned_graph import PlannedGraphModule

needs_engine = pytest.mark.skipif(engine.load() is None, reason="needs the engine")
X = torch.randn(2, 32, 12, 12, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Two convs with batch norms around a shortcut, wide enough to gain from 1:16."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = nn.Conv2d(64, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


def prepared() -> nn.Module:
    torch.manual_seed(0)
    return randomise(spre_fx.prepare(Block(), "1:16"))


def sparse_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_lowered(module)]


@needs_engine
def test_auto_on_a_cpu_runs_packed_layers_as_a_program() -> None:
    gm = prepared()
    deployed = spre_fx.finalize(gm)
    assert isinstance(deployed, PlannedGraphModule)
    assert sparse_layers(deployed) == ["conv1", "conv2"]
    torch.testing.assert_close(deployed(X), gm.eval()(X).detach(), rtol=1e-4, atol=1e-4)
    assert deployed.plan(X).engine_calls == 1
    assert not any(parameter.requires_grad for parameter in deployed.parameters())


@needs_engine
def test_with_example_inputs_every_layer_is_measured() -> None:
    deployed = spre_fx.finalize(prepared(), example_inputs=X)
    for site in spre_fx.sites(deployed):
        assert site.dense_ms is not None
        assert site.chosen_ms is not None
        assert site.chosen_ms <= site.dense_ms
        assert (site.backend == "cpu") == (site.chosen_ms < site.dense_ms)
        assert "2x32x12x12" in site.note or "2x64x12x12" in site.note


@needs_engine
def test_layers_are_measured_on_the_images_that_run_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planned, "_CACHED", 3 * 4 * (32 + 64) * 12 * 12)  # of three images
    monkeypatch.setattr(lowering, "images_at_a_time", images_of_light_weights)
    x = torch.randn(7, 32, 12, 12)
    deployed = spre_fx.finalize(prepared(), example_inputs=x)
    for site in spre_fx.sites(deployed):
        assert "3x32x12x12" in site.note or "3x64x12x12" in site.note


def images_of_light_weights(batch: int, *, weights: int, activations: int, arena: int) -> int:
    assert weights == 2 * 4 * 2 * 9 * 32 * 64
    return planned.images_at_a_time(batch, weights=0, activations=activations, arena=arena)


@pytest.mark.parametrize(("dtype", "images"), [(torch.float32, 3), (torch.bfloat16, 6)])
def test_more_images_of_a_smaller_type_run_together(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, images: int
) -> None:
    monkeypatch.setattr(planned, "_CACHED", 3 * 4 * (32 + 64) * 12 * 12)
    layer = nn.Conv2d(32, 64, 1).to(dtype)
    calls = lowering.calls_of_layers(layer, torch.randn(7, 32, 12, 12))
    assert lowering.of_images_together(calls) == {
        layer: [lowering.LayerCall((images, 32, 12, 12), (images, 64, 12, 12))]
    }


def test_layers_of_unlike_batches_are_measured_as_they_are_called() -> None:
    calls = lowering.calls_of_layers(
        nn.Sequential(nn.Flatten(0, 1), nn.Linear(8, 4)), torch.ones(5, 3, 8)
    )
    (call,) = next(iter(calls.values()))
    assert call == lowering.LayerCall((15, 8), (15, 4))
    other = lowering.LayerCall((5, 8), (5, 4))
    mixed = {nn.Linear(8, 4): [call, other]}
    assert lowering.of_images_together(mixed) == mixed


@needs_engine
def test_tables_and_files_see_the_dense_form(tmp_path: Path) -> None:
    gm = prepared()
    dense, deployed = spre_fx.finalize(gm, "dense"), spre_fx.finalize(gm, "cpu")
    one, other = ({site.name: site for site in spre_fx.sites(m)} for m in (dense, deployed))
    for name in ("conv1", "conv2"):
        assert (one[name].backend, other[name].backend) == ("dense", "cpu")
        for fact in ("state", "structure", "pattern", "nonzeros", "parameters", "density"):
            assert getattr(one[name], fact) == getattr(other[name], fact)
    assert "cpu" in str(spre_fx.diff(gm, deployed))
    assert spre_fx.cost(deployed, X).model == spre_fx.cost(dense, X).model
    spre_fx.save(deployed, tmp_path / "model.safetensors")
    loaded = spre_fx.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded.conv1.weight, dense.conv1.weight)
    torch.testing.assert_close(loaded(X).detach(), deployed(X), rtol=1e-4, atol=1e-4)
    again = spre_fx.lower(loaded)
    assert sparse_layers(again) == ["conv1", "conv2"]
    assert torch.equal(again(X), deployed(X))


@needs_engine
def test_lower_leaves_its_input_alone_and_can_be_undone() -> None:
    deployed = spre_fx.finalize(prepared())
    expected = deployed(X)
    dense = spre_fx.lower(deployed, "dense")
    assert sparse_layers(dense) == []
    assert sparse_layers(deployed) == ["conv1", "conv2"]
    torch.testing.assert_close(dense(X), expected, rtol=1e-4, atol=1e-4)
    assert {site.backend for site in spre_fx.sites(dense)} == {"dense"}
    assert type(spre_fx.to_dense(deployed).conv1) is nn.Conv2d


@needs_engine
def test_views_of_what_is_channels_last_now_go_on_working() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.fc = Block(), nn.Linear(32 * 12 * 12, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.block(x).view(x.size(0), -1))

    gm = randomise(spre_fx.prepare(Head(), "1:16"))
    deployed = spre_fx.finalize(gm)
    assert "block.conv1" in sparse_layers(deployed)
    torch.testing.assert_close(deployed(X), gm.eval()(X).detach(), rtol=1e-3, atol=1e-3)


@needs_engine
def test_parts_of_a_model_without_a_graph_are_lowered_too() -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.last = Block(), nn.Conv2d(32, 32, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.block(x)
            return self.last(y) if float(y.detach().sum()) > 0 else y

    gm = randomise(spre_fx.prepare(Chooses(), "1:16"))
    deployed = spre_fx.finalize(gm, example_inputs=X)
    assert isinstance(deployed.block, PlannedGraphModule) or not sparse_layers(deployed.block)
    torch.testing.assert_close(deployed(X), gm.eval()(X).detach(), rtol=1e-4, atol=1e-4)
    assert {site.name for site in spre_fx.sites(deployed) if site.dense_ms is not None} == {
        *("block.conv1", "block.conv2", "last"),
    }


def test_a_deployed_model_takes_a_type() -> None:
    gm = prepared()
    deployed = spre_fx.finalize(gm, example_inputs=X, dtype=torch.bfloat16)
    y = deployed(X.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), gm.eval()(X).detach(), rtol=0.1, atol=0.1)


def test_without_an_engine_cpu_warns_and_auto_runs_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering.engine, "load", lambda: None)
    monkeypatch.setattr(lowering.engine, "why_not", lambda: "there is none.")
    with pytest.warns(UserWarning, match="backend='cpu': there is none") as caught:
        deployed = spre_fx.finalize(prepared(), "cpu")
    assert caught[0].filename == __file__
    note = "runs as an ordinary dense layer: there is none."
    for each in (deployed, spre_fx.finalize(prepared())):
        assert sparse_layers(each) == []
        assert {site.note.partition("; ")[0] for site in spre_fx.sites(each)} == {note}


def test_example_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(spre_fx.ModelError, match=r"example_inputs: expected .* RuntimeError"):
        spre_fx.finalize(prepared(), example_inputs=torch.ones(1, 3, 4, 4))


def test_a_backend_of_another_device_is_refused() -> None:
    with pytest.raises(spre_fx.OptionError, match="backend='cuda': expected a model on that"):
        spre_fx.finalize(prepared(), "cuda")


@pytest.mark.parametrize("model", [small_net(), AuxiliaryHead(), prepared()])
def test_what_is_not_deployed_is_not_lowered(model: nn.Module) -> None:
    with pytest.raises(spre_fx.ModelError, match="expected a deployed model, found a"):
        spre_fx.lower(model)


@needs_engine
def test_adopted_models_are_lowered() -> None:
    dense = spre_fx.to_dense(spre_fx.finalize(prepared(), "dense"))
    adopted = spre_fx.adopt(Adopted(dense), "1:16")
    assert isinstance(adopted.get_submodule("model.conv1"), PackedConv2d)


class Adopted(nn.Module):
    """A plain module around another."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)
