"""benchmarks/torchvision_sweep.py: its rows, its resuming, and the table that is committed."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torchvision
from torchvision.models import list_models

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPT = BENCHMARKS / "torchvision_sweep.py"
TABLE = BENCHMARKS / "torchvision.md"


@pytest.fixture(name="script")
def _script(import_benchmarks):
    import_benchmarks("")
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(name="sweep")
def _sweep(monkeypatch, capsys, import_benchmarks):
    """Runs the script as the command line does, in this process, and returns what it prints."""
    import_benchmarks("")

    def sweep(rows: Path, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--rows", str(rows), *options])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    return sweep


def test_it_runs_what_has_no_row_and_tables_all(tmp_path, script, sweep):
    rows = tmp_path / "rows.jsonl"
    finished = {"model": "alexnet", "family": "classification", "torch": "1", "torchvision": "2"}
    finished |= {"difference": 0.5, "dtype": "float64", "seconds": 7}
    quantised = script["run_one"]("quantized_mobilenet_v2")
    text = f'{json.dumps(finished)}\n{json.dumps(quantised)}\n{{"model": "squeezenet1_1", "cut'
    rows.write_text(text)
    models = ("--models", "alexnet", "squeezenet1_1", "quantized_mobilenet_v2")
    assert "3 models, 1 unexplained ['alexnet']" in sweep(rows, *models)
    found = script["read_rows"](rows)
    assert found["alexnet"] == finished
    small = found["squeezenet1_1"]
    assert small["difference"] <= 1e-10
    assert (small["layers"], small["plain"], small["spre"]) == (26, 25, 0)
    assert small["skipped"] == {"fewer input channels than M": 1}
    assert quantised["refused"].startswith("ModelError: features.1.skip_add: expected floating-")
    table = rows.with_suffix(".md").read_text()
    assert "1 of 3 went through, 1 are quantised and refused,\n1 failed." in table
    assert f"torchvision {torchvision.__version__}" in table


def test_a_model_that_takes_too_long_is_a_row(script):
    row = script["run_apart"]("squeezenet1_1", 0.1)
    assert row["error"] == "stopped after 0 s"
    assert "stopped after 0 s |" in script["table"]([row])
    assert script["failed"](["alexnet", "squeezenet1_1"], {"squeezenet1_1": row}) == [row["model"]]


@pytest.mark.parametrize(
    ("row", "explained"),
    [
        ({"family": "video", "dtype": "float64", "difference": 1e-11}, True),
        ({"family": "video", "dtype": "float64", "difference": 1e-9}, False),
        ({"family": "video", "dtype": "float64", "difference": float("nan")}, False),
        ({"family": "video", "dtype": "float32", "difference": 1e-6}, True),
        ({"family": "video", "refused": "TraceError: why"}, False),
        ({"family": "quantised", "refused": "ModelError: why"}, True),
        ({"family": "quantised", "error": "MemoryError"}, False),
    ],
)
def test_what_counts_as_explained(script, row, explained):
    assert script["is_explained"](row) is explained


def test_the_committed_table_has_every_model():
    text = TABLE.read_text()
    versions = re.search(r"torchvision (\S+)\. Written", text)
    assert versions is not None, "expected one version of torchvision"
    named = set(re.findall(r"^\| (\w+) ", text, re.MULTILINE)) - {"model"}
    assert len(named) > 100
    if versions[1].partition("+")[0] == torchvision.__version__.partition("+")[0]:
        assert named == set(list_models())


@pytest.mark.slow
def test_no_row_is_unexplained(tmp_path, script, sweep):
    rows = tmp_path / "rows.jsonl"
    sweep(rows)
    found = script["read_rows"](rows)
    assert set(found) == set(list_models())
    assert [row for row in found.values() if not script["is_explained"](row)] == []
