"""benchmarks/table9.py: Table 9 of the paper next to ours."""

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "table9.py"


@pytest.mark.slow
def test_one_figure_of_sr_ste_and_none_at_test_differs(capsys):
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    plain = [line.split() for line in lines if line.startswith("SR-STE")]
    assert [row[1] for row in plain if any("*" in cell for cell in row)] == ["1:4"]
    branched = [line.split() for line in lines if line.startswith("w. SpRe")]
    assert not any("*" in row[-5] + row[-1] for row in branched)  # FLOPs and parameters at test
    assert len(plain) == len(branched) == 4
