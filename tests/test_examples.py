"""Every script in examples/ runs as a newcomer runs it, and shows what it says it shows."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def check_digits(printed: str, output: Path) -> None:
    headings = re.findall(r"^(.+)\n=+$", printed, flags=re.MULTILINE)
    assert headings == [
        "What prepare(1:8) did",
        "From the dense model to the training graph",
        "From the training graph to the deployed graph",
        "What the training graph costs",
        "Results",
    ]
    assert re.search(r"^layer2\.conv1 +N:M \+ SpRe +1:8 +32x16x3x3 +0\.125 +\d/9$", printed, re.M)
    assert re.search(r"^conv1 +skipped +16x1x3x3 .*C_in/groups=1 is less than M=8$", printed, re.M)
    result = r"^{} +([\d.]+) +([\d,]+) +([\d,]+)$"
    rows = {
        name: re.search(result.format(name), printed, re.M).groups()
        for name in ("dense", "prepared", "deployed")
    }
    assert rows["prepared"][0] == rows["deployed"][0]
    assert float(rows["dense"][0]) > 80
    assert float(rows["deployed"][0]) > 30  # one epoch; ten classes
    parameters = {name: int(row[1].replace(",", "")) for name, row in rows.items()}
    assert parameters["deployed"] < parameters["dense"] < parameters["prepared"]
    nonzeros = {name: int(row[2].replace(",", "")) for name, row in rows.items()}
    sparse = nonzeros["dense"] - 16 * 9  # all but the dense stem
    assert nonzeros["deployed"] <= 16 * 9 + sparse / 8
    (difference,) = re.findall(r"prepared to deployed: (\S+)$", printed, flags=re.MULTILINE)
    assert float(difference) < 1e-4
    assert "test accuracy (%)" in printed
    picture = output / "spatial_sparsity.png"
    assert f"picture: {picture}\n" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


# Options that keep a script short, and what its output must hold.
CHECKS: dict[str, tuple[list[str], Callable[[str, Path], None]]] = {
    "digits.py": (["--epochs", "1"], check_digits),
}


RECIPES = {"cifar10.py", "imagenet.py", "coco.py"}  # run by tests/test_recipes*.py


def test_no_example_is_forgotten():
    assert {*CHECKS} | RECIPES == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_the_example_runs(name, tmp_path):
    options, check = CHECKS[name]
    command = [sys.executable, EXAMPLES / name, *options, "--output", tmp_path / "out"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr
    assert "epoch" in run.stderr  # the progress bars
    check(run.stdout, tmp_path / "out")
