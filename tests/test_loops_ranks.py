"""Two processes that train together; what each check does is in loops_ranks.py."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from loops_ranks import SLOW, checks

SCRIPT = Path(__file__).parent / "loops_ranks.py"


def run(directory: Path, *wanted: str) -> list[Mapping[str, str]]:
    """Run the checks on two ranks, and return what became of them on each."""
    command = [sys.executable, "-W", "error::UserWarning", str(SCRIPT)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(directory), *wanted],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=500)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[Mapping[str, str]]:
    """Of the quick checks, from one pair of processes."""
    return run(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", [name for name in checks(0) if name not in SLOW])
def test_two_processes(check, results):
    assert [result[check] for result in results] == ["", ""]


@pytest.mark.slow
def test_two_processes_and_all_checks(tmp_path):
    everything = dict.fromkeys(checks(0), "")
    assert run(tmp_path, "all") == [everything, everything]
