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

OPTIONS = ["--pattern", "1:4", "--width", "4", "--batch-size", "8", "--epochs", "3"]
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


def without_times(output: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records(output)]


def kill(command: list[str], checkpoint: Path, seconds: float) -> None:
    """Start a run, and kill it and its workers so long after a checkpoint was written."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.01)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("lives", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_ends_as_one_that_was_not(lives, tmp_path, capsys):
    data = write_cifar10(tmp_path / "data")
    common = ["--data", data, *OPTIONS]
    run("cifar10.py", *common, "--output", tmp_path / "whole")

    output = tmp_path / "killed"
    command = [sys.executable, EXAMPLES / "cifar10.py", *common, "--output", output]
    moments = random.Random(0)
    for _ in range(1, lives):
        kill([*map(str, command)], output / "checkpoint.pt", moments.uniform(0, 0.1))
    log = output / "log.jsonl"
    with log.open("a") as file:  # as a life leaves it that dies between log and checkpoint
        file.write(json.dumps({"epoch": 3, "loss": 0.0}) + '\n{"epo')
    capsys.readouterr()
    run("cifar10.py", *common, "--output", output)

    assert f"resumed {output / 'checkpoint.pt'} after epoch" in capsys.readouterr().out
    ours, theirs = (
        torch.load(each / "checkpoint.pt", weights_only=True)
        for each in (output, tmp_path / "whole")
    )
    assert_equal(ours, theirs, "checkpoint")
    assert without_times(output) == without_times(tmp_path / "whole")
    for name in ("deployed.safetensors", "deployed-ema.safetensors"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
