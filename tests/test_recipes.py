"""Each recipe of examples/, end to end, on a few images in the format of its data."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cifar10 import ResNet32
from recipes_data import EXAMPLES, write_cifar10, write_imagenet
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import spre_fx
from spre_fx import State

QUICK = ["--workers", "0", "--device", "cpu"]


def run(script: str | Path, *options: str | Path) -> None:
    """Run an example, or another script, as the command line does, but in this process."""
    arguments = [str(EXAMPLES / script), *map(str, options)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        runpy.run_path(arguments[0], run_name="__main__")


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def check_output(output: Path, epochs: int) -> tuple[torch.nn.Module, dict]:
    """What every run leaves behind; returns the deployed model and the metrics."""
    header, *epoch_records, last = records(output)
    assert header["settings"]["epochs"] == epochs
    assert [record["epoch"] for record in epoch_records] == list(range(1, epochs + 1))
    assert all(record["loss"] > 0 and record["lr"] > 0 for record in epoch_records)
    assert torch.load(output / "checkpoint.pt", weights_only=True)["epoch"] == epochs
    results = last["results"]
    trained, deployed = results["trained"], results["trained, deployed"]
    assert trained == pytest.approx(deployed, rel=1e-4)
    assert "N:M" in (output / "sites.txt").read_text()
    assert "N:M" in (output / "diff.txt").read_text()
    assert any((output / "tensorboard").iterdir())
    return spre_fx.load(output / "deployed.safetensors"), results


def metrics(model: torch.nn.Module, data: Dataset) -> dict[str, float]:
    """Counted over all images at once."""
    ((images, labels),) = DataLoader(data, batch_size=len(data))
    with torch.no_grad():
        logits = model.eval()(images)
    hits = logits.argsort(1, descending=True)[:, :5] == labels[:, None]
    return {
        "top1": 100 * float(hits[:, 0].double().mean()),
        "top5": 100 * float(hits.any(1).double().mean()),
        "evaluation loss": float(F.cross_entropy(logits, labels)),
    }


def test_resnet32_on_cifar10_by_two_processes_of_torchrun(tmp_path):
    data, output = write_cifar10(tmp_path / "data", images=5), tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = ["--pattern", "1:4", "--width", "4", "--batch-size", "8", "--epochs", "1"]
    script = [EXAMPLES / "cifar10.py", "--data", data, "--output", output, *options, *QUICK]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", *script, "--ema", "0.5"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    deployed, results = check_output(output, epochs=1)
    assert records(output)[0]["settings"]["world_size"] == 2
    assert done.stdout.count("Results\n=======") == 1
    assert f"top1: trained {results['trained']['top1']:.3f}, trained, deployed" in done.stdout
    patterns = {site.pattern for site in spre_fx.sites(deployed) if site.state is State.DEPLOYED}
    assert patterns == {"1:4"}
    # Five images to evaluate on: three are one rank's, two the other's, and each counts once.
    averaged = spre_fx.load(output / "deployed-ema.safetensors")
    evaluation = ResNet32(root=data).evaluation_data()
    for name, model in {"trained, deployed": deployed, "EMA, deployed": averaged}.items():
        assert results[name] == pytest.approx(metrics(model, evaluation), rel=1e-4)
    assert results["EMA"] == pytest.approx(results["EMA, deployed"], rel=1e-4)
    assert not torch.equal(averaged.conv1.weight, deployed.conv1.weight)


# One is quick; how DeiT is trained is also in test_recipes_deit.py.
MODELS = {
    "resnet18": pytest.param("resnet18", [], {State.NM, State.SPRE}, marks=pytest.mark.slow),
    "resnet50": pytest.param("resnet50", [], {State.NM, State.SPRE}, marks=pytest.mark.slow),
    "mobilenet_v1": pytest.param("mobilenet_v1", ["--depthwise", "flat"], {State.NM, State.SPRE}),
    "mobilenet_v2": pytest.param("mobilenet_v2", [], {State.NM}, marks=pytest.mark.slow),
    "deit_small": pytest.param("deit_small", [], {State.NM}, marks=pytest.mark.slow),
}


@pytest.mark.parametrize(("model", "options", "states"), MODELS.values(), ids=MODELS)
def test_imagenet(model, options, states, tmp_path):
    data, output = write_imagenet(tmp_path / "data"), tmp_path / "run"
    common = ["--model", model, "--image-size", "32", "--batch-size", "8", "--epochs", "1", *QUICK]
    run("imagenet.py", "--data", data, "--output", output, *common, *options)
    check_output(output, epochs=1)
    sites = (output / "sites.txt").read_text()
    found = re.findall(r"^\S+ {2,}(N:M \+ SpRe|N:M|skipped) ", sites, re.MULTILINE)
    assert set(map(State, found)) == states | {State.SKIPPED}
