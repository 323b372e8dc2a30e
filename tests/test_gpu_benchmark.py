"""benchmarks/gpu: its rules, parts and report, as far as they run without a GPU."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from two_four_on_cpu import OnCPU

from spre_fx import choice, cuda_timing, lowering
from spre_fx.choice import Choice

FOLDER = Path(__file__).parent.parent / "benchmarks" / "gpu"
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(name="part")
def _part(import_benchmarks):
    import_benchmarks("gpu")
    return importlib.import_module


def test_from_a_bare_checkout_without_a_device_it_ends_with_a_sentence(tmp_path):
    for name in ("passes", "benchmarks"):
        (tmp_path / name).symlink_to(FOLDER.parents[1] / name)
    (tmp_path / "spre_fx").mkdir()
    for path in (FOLDER.parents[1] / "spre_fx").iterdir():
        if path.name != "passes":
            (tmp_path / "spre_fx" / path.name).symlink_to(path)
    code = f"""
import runpy, sys
sys.path[:] = [p for p in sys.path if p]
sys.path.insert(0, {str(tmp_path / "benchmarks" / "gpu")!r})
script = runpy.run_path({str(tmp_path / "benchmarks" / "gpu" / "run.py")!r})
use = script["use_this_checkout"]
use.__globals__["ROOT"] = __import__("pathlib").Path({str(tmp_path)!r})
use()
import spre_fx, spre_fx.passes
print(spre_fx.__file__, spre_fx.passes.__file__, flush=True)
sys.argv = ["run.py", "--out", {str(tmp_path / "table")!r}]
sys.exit(script["main"]())
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert ended.stdout.split() == [
        str(tmp_path / "spre_fx" / "__init__.py"),
        str(tmp_path / "passes" / "__init__.py"),
    ]
    assert ended.returncode == 2
    assert "needs a CUDA device, and torch" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.glob("table*"))


def test_parts_share_the_time_and_a_failing_one_stops_no_other(part, monkeypatch):
    run = part("run")
    deadlines, notes = {}, []

    def fail(deadline):
        raise ValueError("no such thing")

    def ends(name):
        return lambda deadline: deadlines.setdefault(name, deadline)

    started = time.monotonic()
    run.run_parts(
        {"correctness": fail, "layers": ends("layers"), "models": ends("models")},
        notes.append,
        100,
    )
    assert notes == ["correctness stopped: ValueError: no such thing"]
    left = run.SHARES["layers"] + run.SHARES["models"]
    assert deadlines["layers"] - started == pytest.approx(100 * run.SHARES["layers"] / left, abs=2)
    assert deadlines["models"] - started == pytest.approx(100, abs=2)
    assert sum(run.SHARES.values()) == pytest.approx(1)


def test_what_takes_too_long_is_stopped_at_the_nearer_of_two_limits(part):
    time_limit = part("limits").time_limit
    started = time.monotonic()
    with time_limit(0.4), pytest.raises(TimeoutError), time_limit(0.1):
        time.sleep(2)
    with pytest.raises(TimeoutError), time_limit(0.2), time_limit(5):
        time.sleep(2)
    with time_limit(0.2), time_limit(0.1):
        pass
    assert time.monotonic() - started < 1.5
    time.sleep(0.3)  # nothing is left of the first one


def test_a_report_has_all_rows_and_notes(part, tmp_path, capsys):
    report = part("report").Report(environment={"GPU": "none"})
    report.add("Times", {"layer": "a", "ms": 1.23456})
    report.add("Times", {"layer": "b", "other": None, "ms": "2"})
    report.note("something failed")
    report.write(tmp_path / "new" / "table")
    assert json.loads((tmp_path / "new" / "table.json").read_text()) == {
        "environment": {"GPU": "none"},
        "tables": {
            "Times": [
                {"layer": "a", "ms": 1.23456},
                {"layer": "b", "other": None, "ms": "2"},
            ]
        },
        "notes": ["something failed"],
    }
    text = (tmp_path / "new" / "table.md").read_text()
    assert "| layer | ms | other |\n| --- | --- | --- |\n| a | 1.23 |  |\n| b | 2 |  |" in text
    assert "- something failed" in text
    assert "ms=1.23" in capsys.readouterr().out


def test_the_layers_are_those_of_resnet50(part):
    sites = part("layer_times").sites()
    assert sum(sites.values()) == 53  # 53 convs but for the stem, and the head
    assert len(sites) == 23
    for site, count in sites.items():
        x = torch.empty(site.shape(2), device="meta")
        assert site.layer().to("meta")(x).shape[:2] == (2, site.outputs)
        assert count > 0
    names = {str(site) for site in sites}
    assert {"512->512 3x3 on 7x7", "256->128 1x1 on 56x56", "512->512 3x3/2 on 14x14"} <= names


@pytest.fixture(name="few_cases")
def _few_cases(part, monkeypatch):
    correctness = part("correctness")
    monkeypatch.setattr(correctness, "PATTERNS", ("2:4",))
    monkeypatch.setattr(correctness, "LINEARS", correctness.LINEARS[:1])
    monkeypatch.setattr(correctness, "CONVS", correctness.CONVS[2:3])
    return correctness


@pytest.fixture(name="options")
def _options(part, monkeypatch):
    """Of a run on the CPU, as if it were a GPU: times are made up, and nothing is compiled."""
    monkeypatch.setenv("SPRE_FX_CACHE", "off")  # as the part on models sets it
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(cuda_timing, "as_graph", lambda run: run)
    monkeypatch.setattr(cuda_timing, "compiled", lambda layer, x: lambda: layer(x))

    def rounds(runs):
        for run in runs:
            run()
        return [[1.0 + index] * 3 for index in range(len(runs))]

    monkeypatch.setattr(cuda_timing, "rounds", rounds)
    arguments = ["--device", "cpu", "--out", "x", "--batches", "1", "--dtypes", "float16"]
    return part("run").parse(arguments)


def test_layers_that_are_right_are_found_right(part, few_cases, options):
    report = part("report").Report()
    few_cases.run(report, options, time.monotonic() + 60)
    rows = report.tables[few_cases.TABLE]
    assert {(row["library"], row["type"]) for row in rows} == {
        (library, dtype)
        for library in ("cusparselt", "cutlass")
        for dtype in ("float16", "bfloat16")
    }
    assert all(row["cases"] == 6 and row["wrong"] == 0 for row in rows)
    assert all(0 < row["worst"] <= few_cases.ALLOWED for row in rows)


def test_layers_that_are_wrong_are_found_wrong(part, few_cases, options, monkeypatch):
    right = few_cases.ways

    def wrong(layer, library):
        found = right(layer, library)
        found[0].module.values[0, 0] += 1
        return found

    monkeypatch.setattr(few_cases, "ways", wrong)
    report = part("report").Report()
    few_cases.run(report, options, time.monotonic() + 60)
    assert all(row["wrong"] == row["cases"] for row in report.tables[few_cases.TABLE])


def test_cases_without_time_are_noted(part, few_cases, options):
    report = part("report").Report()
    few_cases.run(report, options, time.monotonic() - 1)
    assert report.notes == ["correctness: not all cases, out of time"]
    assert not report.tables


def test_layers_are_timed_by_every_way(part, options, monkeypatch):
    layer_times = part("layer_times")
    few = {layer_times.Site(64, 32, 3, 1, 8): 2, layer_times.Site(64, 10, 1, 1, 1): 1}
    monkeypatch.setattr(layer_times, "sites", lambda: few)
    report = part("report").Report()
    layer_times.run(report, options, time.monotonic() + 60)
    conv, linear = report.tables[layer_times.TABLE]
    assert list(conv) == [
        *("type", "batch", "layer", "times", "eager"),
        *("cusparselt", "cusparselt, GEMM alone", "cutlass", "cutlass, GEMM alone", "compiled"),
        *("dense over sparse", "note"),
    ]
    assert conv["dense over sparse"] == 1 / 2
    assert not any("alone" in column for column in linear)
    assert report.notes == []
    layer_times.run(report, options, time.monotonic() - 1)
    assert report.notes == ["layers: 0 of 2 rows, out of time"]


def test_models_are_timed_next_to_each_other(part, options, monkeypatch):
    model_times = part("model_times")
    net = nn.Sequential(nn.Conv2d(3, 32, 7, 32), nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32))
    monkeypatch.setattr(model_times, "resnet50", lambda: net)
    monkeypatch.setattr(lowering, "choose_backend", lambda *_, **__: OnCPU())
    monkeypatch.setattr(choice.Timings, "choose", lambda _, layer, ways, __: Choice(ways[0]))
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(model_times.tensorrt_engine, "why_not", lambda: "TensorRT: not there")
    report = part("report").Report()
    model_times.run(report, options, time.monotonic() + 60)
    assert report.notes == ["TensorRT: not there"]
    (ledger,), (row,) = report.tables[model_times.LEDGER], report.tables[model_times.TABLE]
    assert ledger["cusparselt"] == 1
    assert ledger["dense"] == 1
    assert 0 < ledger["spre_fx error"] < 0.01
    assert list(row) == [
        *("model", "eager", "eager, graph", "spre_fx", "spre_fx, graph"),
        *("compiled", "spre_fx compiled", "best other over best spre_fx"),
    ]
    assert row["best other over best spre_fx"] == 1 / 3


def test_a_row_compares_the_best_of_both_sides(part):
    setting = part("model_times").Setting(
        torch.empty(32, 3, 4, 4, dtype=torch.float16), nn.Identity(), nn.Identity()
    )
    setting.times = {"eager": [4.0, 4.0, 4.0], "spre_fx": [3.0, 2.0, 1.0], "compiled": [3.0] * 3}
    assert setting.row() == {
        "model": "float16, batch 32",
        "eager": "4 (4 to 4)",
        "spre_fx": "2 (1 to 3)",
        "compiled": "3 (3 to 3)",
        "best other over best spre_fx": 1.5,
    }


def test_an_attempt_that_fails_or_comes_too_late_is_noted(part):
    attempt, report = part("model_times").attempt, part("report").Report()

    def fail():
        raise RuntimeError("out of\nmemory")

    attempt(report, "a", fail, time.monotonic() + 10)
    attempt(report, "b", fail, time.monotonic())
    attempt(report, "c", lambda: time.sleep(3), time.monotonic() + 1.1)
    assert report.notes[:2] == ["a: RuntimeError: out of memory", "b: out of time"]
    assert report.notes[2].startswith("c: TimeoutError")
