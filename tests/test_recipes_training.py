"""The loop that all recipes share: methods, precisions, checkpoints, and what it refuses."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipes_data import write_batch, write_cifar10
from test_recipes import records
from tiny_recipe import Tiny
from torch import Tensor, nn

import spre_fx
from recipes import checkpoints, options, training
from recipes.cifar10_data import EVALUATION, TRAINING
from recipes.errors import RecipeError
from recipes.options import Options
from recipes.recipe import Batch
from recipes.schedules import warmup_cosine, warmup_steps


@pytest.fixture(name="data", scope="module")
def _data(tmp_path_factory) -> Path:
    return write_cifar10(tmp_path_factory.mktemp("data"), images=8)


def parsed(recipe: Tiny, output: Path, *words: str) -> Options:
    common = ["--batch-size", "8", "--epochs", "2", "--workers", "0", "--device", "cpu"]
    common += ["--pattern", "1:4", "--data", str(recipe.root), "--output", str(output)]
    return Options.of(options.parser("").parse_args([*common, *words]), recipe)


def run(data: Path, output: Path, *words: str, kind: type[Tiny] = Tiny) -> dict[str, Any]:
    recipe = kind(root=data)
    return training.run(recipe, parsed(recipe, output, *words))


def refusal(data: Path, output: Path, *words: str, kind: type[Tiny] = Tiny) -> str:
    with pytest.raises(RecipeError) as error:
        run(data, output, *words, kind=kind)
    return str(error.value)


def kept(output: Path) -> dict[str, Any]:
    return torch.load(output / "checkpoint.pt", weights_only=True)


def test_it_learns(tmp_path):
    """Images of ten colours, one a class."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 256, (10, 3, 1))
    for name in (*TRAINING, *EVALUATION):
        labels = generator.permutation(np.arange(30) % 10)
        noise = generator.normal(0, 20, (30, 3, 1024))
        images = (colours[labels] + noise).clip(0, 255).astype(np.uint8).reshape(30, 3072)
        write_batch(folder / name, images, labels.tolist())
    results = run(tmp_path, tmp_path / "run", "--epochs", "6", "--lr", "0.1", "--ema", "0.8")
    assert all(metrics["top1"] > 50 for metrics in results.values()), results
    assert records(tmp_path / "run")[-2]["loss"] < records(tmp_path / "run")[1]["loss"] / 1.3


@pytest.mark.parametrize("method", ["sr-ste", "lbc", "gmp", "rigl", "granet"])
def test_methods_from_scratch(method, data, tmp_path):
    results = run(data, tmp_path, "--method", method)
    assert results["trained"] == pytest.approx(results["trained, deployed"], rel=1e-4)
    deployed = spre_fx.load(tmp_path / "deployed.safetensors")
    weights = [deployed.get_parameter(name) for name in ("3.weight", "8.weight")]
    density = sum(w.count_nonzero() for w in weights) / sum(w.numel() for w in weights)
    assert density == pytest.approx(1 / 4, abs=0.01)  # unstructured ones: of both layers together


def test_asp_from_dense_weights(data, tmp_path):
    dense = run(data, tmp_path / "dense", "--method", "dense")
    assert set(dense) == {"trained"}
    assert not (tmp_path / "dense" / "sites.txt").exists()
    pretrained = tmp_path / "dense" / "checkpoint.pt"
    run(data, tmp_path / "asp", "--method", "asp", "--pretrained", str(pretrained), "--lr", "1e-9")
    weights, asp = kept(tmp_path / "dense")["model"], kept(tmp_path / "asp")["model"]
    torch.testing.assert_close(asp["3.weight"], weights["3.weight"], rtol=0, atol=1e-6)
    expected = spre_fx.masks.nm_mask(weights["3.weight"], spre_fx.Pattern(1, 4))
    (mask,) = [value for name, value in asp.items() if name.startswith("3.nm_mask")]
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(amp, data, tmp_path):
    """With float16, SR-STE would warn if it had not been told of the scaler."""
    run(data, tmp_path, "--amp", amp)
    assert ("scale" in kept(tmp_path)["scaler"]) == (amp == "fp16")
    run(data, tmp_path / "whole")
    assert records(tmp_path)[1]["loss"] == pytest.approx(
        records(tmp_path / "whole")[1]["loss"], rel=0.02
    )


@pytest.mark.slow
def test_compiled(data, tmp_path):
    run(data, tmp_path / "compiled", "--compile")
    run(data, tmp_path / "eager")
    ours, theirs = (kept(tmp_path / name)["model"] for name in ("compiled", "eager"))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("branch", ["none", "same", "inverse"])
def test_branches(branch, data, tmp_path):
    run(data, tmp_path, "--branch", branch, "--epochs", "1")
    states = [line for line in (tmp_path / "sites.txt").read_text().splitlines() if "N:M" in line]
    assert any("SpRe" in line for line in states) == (branch != "none")


class Branching(nn.Sequential):
    """No graph: what it does depends on what it sees."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


@dataclass(frozen=True, kw_only=True)
class Detector(Tiny):
    """Named losses, and a model that only parts of are graphs."""

    def model(self) -> nn.Module:
        return Branching(super().model())

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        loss = super().loss(model, batch)
        return {"half": loss / 2, "other half": loss / 2}


def test_named_losses_are_added_and_divided_models_are_pickled(data, tmp_path, capsys):
    results = run(data, tmp_path / "divided", kind=Detector)
    run(data, tmp_path / "graph")
    assert records(tmp_path / "divided")[1]["loss"] > 0
    assert results["trained"] == pytest.approx(results["trained, deployed"], rel=1e-4)
    path = tmp_path / "divided" / "deployed.pt"
    assert (
        f"{path} is a pickled module, not a file of spre_fx.save: expected"
        in capsys.readouterr().out
    )
    deployed = torch.load(path, weights_only=False)
    assert deployed(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_the_learning_rate_follows_the_batch_size(data, tmp_path):
    recipe = Tiny(root=data)
    assert parsed(recipe, tmp_path, "--batch-size", "64").lr == pytest.approx(0.1 / 4)
    assert parsed(recipe, tmp_path, "--batch-size", "64", "--lr", "0.3").lr == 0.3
    run(data, tmp_path)
    first, second = (record["lr"] for record in records(tmp_path)[1:3])
    steps = 2 * 5  # of 40 images in batches of 8; the last step of each epoch is recorded
    peak = 0.1 * 8 / 256
    assert first == pytest.approx(peak * warmup_cosine(4, 0, steps))
    assert second == pytest.approx(peak * warmup_cosine(9, 0, steps))


def test_schedules():
    factors = [warmup_cosine(step, warmup=4, steps=12, floor=0.1) for step in range(13)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[8] == pytest.approx(0.55)  # half way
    assert factors[12] == pytest.approx(0.1)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    factors = [warmup_steps(step, warmup=2, milestones=[4, 6], start=0.5) for step in range(8)]
    assert factors == pytest.approx([0.75, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_another_run_is_not_resumed(data, tmp_path):
    run(data, tmp_path)
    checkpoint = tmp_path / "checkpoint.pt"
    assert refusal(data, tmp_path) == (
        f"--output {tmp_path}: expected a folder without a run, found {checkpoint}. Add --resume "
        "to go on with it, or choose another folder."
    )
    found = refusal(
        data, tmp_path, "--resume", "--pattern", "2:4", "--ema", "0.9", "--workers", "1"
    )
    assert found == (
        f"--resume: expected the options of the run in {checkpoint}, found others:\n"
        "  ema: None in the checkpoint, 0.9 now\n"
        "  pattern: '1:4' in the checkpoint, '2:4' now\n"
        "Repeat those options, or choose another --output."
    )
    before = checkpoint.read_bytes()
    run(data, tmp_path, "--resume")  # all epochs are behind: finalize and evaluate again
    assert checkpoint.read_bytes() == before


def test_files_that_are_no_checkpoints(data, tmp_path):
    found = refusal(data, tmp_path, "--pretrained", str(tmp_path / "none.pt"))
    assert found == f"{tmp_path / 'none.pt'}: expected a checkpoint, found no such file."
    (tmp_path / "text.pt").write_text("weights")
    found = refusal(data, tmp_path, "--pretrained", str(tmp_path / "text.pt"))
    assert found.startswith(
        f"{tmp_path / 'text.pt'}: expected a file of torch.save, found another."
    )
    torch.save({"state_dict": {"module.0.weight": torch.zeros(1)}}, tmp_path / "other.pt")
    found = refusal(data, tmp_path, "--pretrained", str(tmp_path / "other.pt"))
    assert found.startswith(f"--pretrained {tmp_path / 'other.pt'}: expected the weights of this")
    assert 'Missing key(s) in state_dict: "0.weight"' not in found  # `module.` was taken off
    assert "size mismatch for 0.weight" in found
    torch.save([1], tmp_path / "checkpoint.pt")
    found = refusal(data, tmp_path, "--resume")
    assert found == f"{tmp_path / 'checkpoint.pt'}: expected a dict, found a list."
    torch.save({"epoch": 1}, tmp_path / "checkpoint.pt")
    found = refusal(data, tmp_path, "--resume")
    assert "expected a checkpoint of this script, found other content" in found


def test_a_checkpoint_is_replaced_whole(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoints.save(path, {"epoch": 1})
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        checkpoints.save(path, {"epoch": lambda: 2})
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_loss_that_is_not_finite(data, tmp_path):
    found = refusal(data, tmp_path, "--lr", "1e30")
    assert found.startswith("the loss is ")
    assert "of epoch 1: expected a finite one" in found
    assert not (tmp_path / "checkpoint.pt").exists()


REFUSED: dict[str, tuple[Iterable[str], str]] = {
    "asp": (["--method", "asp"], "--method asp: expected --pretrained PATH"),
    "ema": (["--ema", "1"], "--ema 1.0: expected a decay between 0 and 1, such as 0.9999."),
    "epochs": (["--epochs", "0"], "--epochs 0: expected at least 1."),
    "workers": (["--workers", "-1"], "--workers -1: expected at least 0."),
    "batch": (["--batch-size", "41"], "--batch-size 41: expected at most the 40 training samples"),
    "device": (["--device", "mps"], "--device mps: expected cpu or cuda."),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_options_that_make_no_sense(words, message, data, tmp_path):
    assert refusal(data, tmp_path / "run", *words).startswith(message)
    assert not (tmp_path / "run").exists()


def test_a_wrong_command_line_is_one_message(data, tmp_path, capsys):
    words = ["--data", str(data), "--output", str(tmp_path), "--pattern", "9:4"]
    found = options.parser("").parse_args([*words, "--device", "cpu", "--workers", "0"])
    with pytest.raises(SystemExit) as end:
        training.main(Tiny(root=data), found)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
