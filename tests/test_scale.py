"""benchmarks/scale.py: what it measures, and that time grows with the number of sites alone."""

import runpy
from pathlib import Path

import pytest

import spre_fx

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "scale.py"


@pytest.fixture(name="script")
def _script():
    return runpy.run_path(str(SCRIPT))


def test_a_generated_network_has_as_many_branched_sites_as_asked_for(script):
    prepared = spre_fx.prepare(script["network"](6), "1:4")
    assert [site.state for site in spre_fx.sites(prepared)] == [spre_fx.State.SPRE] * 6
    seconds = script["stages"](6)
    assert list(seconds) == ["trace", "prepare", "match", "sites", "finalize", "diff"]
    assert all(value > 0 for value in seconds.values())


@pytest.mark.slow
def test_time_per_site_is_flat(script):
    stages = script["stages"]
    stages(100)
    fastest = {
        count: {what: min(run[what] for run in runs) / count for what in runs[0]}
        for count, runs in ((n, [stages(n) for _ in range(3)]) for n in (200, 2000))
    }
    for what, seconds in fastest[2000].items():
        assert seconds < 1.5 * fastest[200][what], what
