"""The demo as the command runs it; tests/test_examples.py runs the example."""

import json
from pathlib import Path

import torch

import spre_fx
from spre_fx import demo
from spre_fx.cli import main


def test_the_command_for_machines(tmp_path, capsys):
    arguments = ["--epochs", "1", "--pattern", "2:4", "--output", str(tmp_path), "--json"]
    assert main(["demo", *arguments]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["accuracy"]["prepared"] == results["accuracy"]["deployed"] > 0.3
    assert results["difference"] < 1e-3
    assert all(Path(picture).stat().st_size > 10_000 for picture in results["pictures"])


def test_the_network_is_prepared_but_for_the_stem():
    prepared = spre_fx.prepare(demo.resnet((8, 16)), "1:8")
    assert [s.name for s in spre_fx.sites(prepared) if s.pattern is None] == ["conv1"]
    assert prepared(torch.empty(2, 1, 8, 8)).shape == (2, 10)
