"""The demo: the command and the example run it, with results and pictures."""

import json
import runpy
import sys
from pathlib import Path

import torch

import spre_fx
from spre_fx import demo
from spre_fx.cli import main

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits.py"


def test_the_command_for_machines(tmp_path, capsys):
    arguments = ["--epochs", "1", "--pattern", "2:4", "--output", str(tmp_path), "--json"]
    assert main(["demo", *arguments]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["accuracy"]["prepared"] == results["accuracy"]["deployed"] > 0.3
    assert results["difference"] < 1e-3
    assert all(Path(picture).stat().st_size > 10_000 for picture in results["pictures"])


def test_the_example(tmp_path, capsys, monkeypatch):
    arguments = ["--epochs", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    text = capsys.readouterr().out
    for heading in ("What prepare(1:8) did", "to the deployed graph", "training graph costs"):
        assert heading in text
    assert "test accuracy (%)" in text


def test_the_network_is_prepared_but_for_the_stem():
    prepared = spre_fx.prepare(demo.resnet((8, 16)), "1:8")
    assert [s.name for s in spre_fx.sites(prepared) if s.pattern is None] == ["conv1"]
    assert prepared(torch.empty(2, 1, 8, 8)).shape == (2, 10)
