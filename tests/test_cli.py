"""The command line: what it prints, where, and the exit codes."""

import json
import runpy
import subprocess
import sys

import pytest
import torch
from test_api import randomise_batch_norms
from torch import nn

import spre_fx
from spre_fx.cli import main

NET = "spre_fx_test_nets:net"
SOURCE = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )

class Untraceable(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "spre_fx_test_nets.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("spre_fx_test_nets", None)
    return tmp_path


def net() -> nn.Module:
    import spre_fx_test_nets

    torch.manual_seed(0)
    return randomise_batch_norms(spre_fx_test_nets.net())


def saved(content: object) -> str:
    torch.save(content, "saved.pt")
    return "saved.pt"


def broken() -> nn.Module:
    deployed = spre_fx.finalize(spre_fx.prepare(net(), "1:8"), "dense")
    deployed.get_submodule("3").weight.data[0, :3, 1, 1] = 1.0
    return deployed


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spre_fx", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_is_quick_because_it_imports_no_torch():
    code = "import sys, spre_fx.cli; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
    run = python("--help")
    assert run.returncode == 0
    assert all(name in run.stdout for name in ("inspect", "cost", "plot", "verify", "demo", "exit"))


def test_a_process_finds_models_of_the_working_directory():
    run = python("inspect", NET, "--pattern", "1:8", "--json")
    assert (run.returncode, run.stderr) == (0, "")
    assert [site["name"] for site in json.loads(run.stdout)["sites"]] == ["0", "3", "7"]


def test_a_program_reports_an_error_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["spre_fx", "cost", "resnet81"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("spre_fx", run_name="__main__")
    printed = capsys.readouterr()
    assert (end.value.code, printed.out) == (2, "")
    (line,) = printed.err.splitlines()
    assert line.startswith("spre_fx: error: 'resnet81' is no torchvision model. Did you mean")


def test_inspect(capsys):
    arguments = ["--pattern", "1:8", "--exclude", "7", "--override", "3=2:4", "--nodes"]
    assert main(["inspect", NET, *arguments]) == 0
    text = capsys.readouterr().out
    assert "excluded by '7'" in text
    assert "16 -> 32" not in text
    assert "inputs before" in text
    assert " 2:4 " in text


def test_cost(capsys):
    assert main(["cost", NET, "--input", "2,16,8,8", "--branch", "none"]) == 0
    assert "0.83x" in capsys.readouterr().out
    assert main(["cost", NET, "--input", "2,16,8,8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sparse"]["parameters"]["test_ratio"] == 0.5


def test_plot_models_beside_each_other(capsys, folder):
    file = saved(spre_fx.prepare(net(), "1:8"))
    models = [f"before={NET}", f"after={file}", "--trust", "-o", "both.png", "--pattern", "1:8"]
    assert main(["plot", *models]) == 0
    assert capsys.readouterr().out == "wrote both.png\n"
    assert (folder / "both.png").stat().st_size > 5_000


@pytest.mark.parametrize("options", [{}, {"method": "asp"}, {"schedule": spre_fx.EveryK(3)}])
def test_verify_a_prepared_model_and_its_state(capsys, options):
    prepared = spre_fx.prepare(net(), "1:8", **options)
    assert main(["verify", saved(prepared), "--trust"]) == 0
    assert "finalize succeeded" in capsys.readouterr().out
    state = {f"module.{name}": value for name, value in prepared.state_dict().items()}
    file = saved({"epoch": 3, "state_dict": state})
    assert main(["verify", file, "--model", NET, "--pattern", "1:8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert [layer["stage"] for layer in found["layers"]] == ["prepared"] * 3 + ["deployed"] * 3


def test_verify_a_deployed_model_and_its_state():
    deployed = spre_fx.finalize(spre_fx.prepare(net(), "1:8"), "dense")
    assert main(["verify", saved(deployed), "--trust"]) == 0
    file = saved(deployed.state_dict())
    assert main(["verify", file, "--model", NET, "--pattern", "1:8"]) == 0
    assert main(["verify", file, "--model", NET, "--pattern", "1:16"]) == 1


def test_verify_fails_with_1(capsys):
    assert main(["verify", saved(broken()), "--trust"]) == 1
    assert "1 of 3 layers break their pattern" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "spre_fx_test_nets:Untraceable"], "found no conv or linear at all"),
        (["inspect", NET, "--exclude", "zzz"], "'zzz' matches no conv or linear"),
        (["inspect", NET, "--method", "magic"], "method='magic'"),
        (["cost", NET], "expected a model that runs on an example input"),
        (["plot", NET, "-o", "picture.foo"], "'foo' is not supported"),
        (["verify", "missing.pt"], "missing.pt: expected a file of torch.save, found none"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_cannot_be_taken_exits_with_2(capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["prune"], ["inspect", NET, "--pattern", "8:4"], ["cost", NET, "--input", "2,x"],
     ["inspect", NET, "--override", "fc"]],
    ids=str,
)  # fmt: skip
def test_options_that_cannot_be_parsed_exit_with_2(arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


def test_a_bug_exits_with_3(capsys, monkeypatch):
    def bug(_):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("spre_fx.commands.inspect", bug)
    assert main(["inspect", NET]) == 3
    assert "ZeroDivisionError: oops" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        main(["inspect", NET, "--debug"])


@pytest.mark.filterwarnings("default")
def test_warnings_are_lines_on_stderr(capsys, folder):
    code = f"import warnings\n{SOURCE}\nwarnings.warn('old')\n"
    (folder / "warns.py").write_text(code)
    assert main(["inspect", "warns:net"]) == 0
    assert capsys.readouterr().err == "note: old\n"
