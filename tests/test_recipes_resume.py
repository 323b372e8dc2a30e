"""A recipe that is killed and resumed ends as one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_data import EXAMPLES, write_cifar10
from test_recipes import records, run
from torch import Tensor

TINY = Path(__file__).parent / "tiny_recipe.py"
RESNET32 = EXAMPLES / "cifar10.py"

OPTIONS = ["--pattern", "1:4", "--batch-size", "8"]
OPTIONS += ["--ema", "0.9", "--workers", "1", "--device", "cpu", "--resume"]


def assert_equal(found: Any, expected: Any, where: str) -> None:
    """The same structure with the same tensors, bit for bit."""
    assert type(found) is type(expected), where
    if isinstance(found, Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(found, dict):
        assert found.keys() == expected.keys(), where
        for key in found:
            assert_equal(found[key], expected[key], f"{where}/{key}")
    elif isinstance(found, list):
        assert len(found) == len(expected), where
        for number, pair in enumerate(zip(found, expected, strict=True)):
            assert_equal(*pair, f"{where}/{number}")
    else:
        assert found == expected, where


def assert_same_end(output: Path, expected: Path) -> None:
    """Weights, optimizer, averages, log and deployed models."""
    ours, theirs = (
        torch.load(each / "checkpoint.pt", weights_only=True) for each in (output, expected)
    )
    assert_equal(ours, theirs, "checkpoint")
    assert without_times(output) == without_times(expected)
    for name in ("deployed.safetensors", "deployed-ema.safetensors"):
        assert (output / name).read_bytes() == (expected / name).read_bytes()


def without_times(output: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records(output)]


def start(command: list[str | Path]) -> subprocess.Popen[str]:
    path = [str(EXAMPLES), *sys.path]
    return subprocess.Popen(
        [*map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )


def wait_for_change(checkpoint: Path, process: subprocess.Popen[str]) -> None:
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
    while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("script", "lives"),
    [([TINY], 2), pytest.param([RESNET32, "--width", "4"], 4, marks=pytest.mark.slow)],
    ids=["tiny", "resnet32"],
)
def test_a_run_that_was_killed_ends_as_one_that_was_not(script, lives, tmp_path, capsys):
    data, epochs = write_cifar10(tmp_path / "data"), 8
    command = [*script, "--data", data, *OPTIONS, "--epochs", str(epochs)]
    run(*command, "--output", tmp_path / "whole")

    output = tmp_path / "killed"
    moments = random.Random(0)
    for _ in range(1, lives):
        with start([sys.executable, *command, "--output", output]) as process:
            wait_for_change(output / "checkpoint.pt", process)
            time.sleep(moments.uniform(0, 0.1))
            os.killpg(process.pid, signal.SIGKILL)  # its workers as well
        assert process.returncode == -signal.SIGKILL
    with (output / "log.jsonl").open("a") as file:
        # As a life leaves it that dies between log and checkpoint, and while it writes.
        file.write(json.dumps({"epoch": epochs, "loss": 0.0}) + '\n{"epo')
    capsys.readouterr()
    run(*command, "--output", output)
    assert f"resumed {output / 'checkpoint.pt'} after epoch" in capsys.readouterr().out
    assert_same_end(output, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sr-ste", "asp", "lbc"])
def test_two_ranks_of_which_one_was_killed(method, tmp_path):
    data = write_cifar10(tmp_path / "data")
    dense = ["--method", "dense", "--epochs", "1"]
    options = ["--data", data, *OPTIONS, "--width", "4"]
    run(RESNET32, *options, "--output", tmp_path / "dense", *dense)
    common = [RESNET32, *options, "--method", method]
    common += ["--pretrained", tmp_path / "dense" / "checkpoint.pt", "--epochs", "3"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2"]
    output = tmp_path / "killed"
    with start([*torchrun, *common, "--output", output]) as process:
        wait_for_change(output / "checkpoint.pt", process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        printed, _ = process.communicate()
    assert process.returncode == 1, printed
    for each in (output, tmp_path / "whole"):
        with start([*torchrun, *common, "--output", each]) as process:
            printed, _ = process.communicate()
        assert process.returncode == 0, printed
    assert_same_end(output, tmp_path / "whole")
