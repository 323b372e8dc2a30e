"""benchmarks/accuracy/results.py: rows become runs, and those that cannot are refused."""

import importlib

import pytest

from spre_fx.errors import PatternError


@pytest.fixture(name="results")
def _results(import_benchmarks):
    import_benchmarks("accuracy")
    return importlib.import_module("results")


def row(arm="SR-STE", seed=1, accuracy=0.5, **changes):
    made = {
        "task": "src",
        "pattern": "dense" if arm == "dense" else "1:16",
        "arm": arm,
        "seed": seed,
        "epochs": 12,
        "steps": 3000,
        "split": "test",
        "accuracy": accuracy,
        "seconds": 40.0,
        "versions": {"torch": "9", "cpu": "Z80"},
    }
    return made | changes


def test_accuracies_and_differences_are_in_points(results):
    found = results.Results([row(accuracy=0.25), row("SR-STE + SpRe", accuracy=0.375)])
    at = results.Setting("src", "1:16", "test")
    assert found.accuracy(at, "SR-STE").mean == 25
    assert found.difference(at, "SR-STE + SpRe", "SR-STE").by_seed == {1: 12.5}
    assert found.difference(at, "SR-STE", None).by_seed == {}


def test_only_runs_of_the_setting_count(results):
    others = [
        row(seed=2, task="digits"),
        row(seed=3, pattern="1:8"),
        row(seed=4, split="validation"),
    ]
    found = results.Results([row(), *others])
    assert list(found.of(results.Setting("src", "1:16", "test"), "SR-STE")) == [1]
    assert list(found.of(results.Setting("src", "1:16", "validation"), "SR-STE")) == [4]
    assert found.of(results.Setting("src", "1:16", "test"), "ASP") == {}
    assert len(found.runs) == 4


def test_the_dense_network_stands_beside_every_pattern(results):
    found = results.Results([row("dense"), row(), row(pattern="2:4")])
    for pattern in ("1:16", "2:4"):
        assert list(found.of(results.Setting("src", pattern, "test"), "dense")) == [1]
    assert found.of(results.Setting("src", "2:4", "validation"), "dense") == {}


def test_tasks_patterns_and_seeds_have_an_order_of_their_own(results):
    patterns = ("1:16", "2:4", "1:8", "1:4")
    rows = [row(pattern=pattern, seed=seed) for pattern in patterns for seed in (3, 1, 2)]
    found = results.Results([*rows, row(task="digits"), row("dense")])
    assert found.tasks() == ["digits", "src"]
    settings = found.settings("src", "test")
    assert [at.pattern for at in settings] == ["2:4", "1:4", "1:8", "1:16"]
    assert list(found.of(settings[0], "SR-STE")) == [1, 2, 3]
    assert found.settings("src", "validation") == []


def test_two_rows_of_one_run_are_refused(results):
    rows = [row(seed=7), row(seed=7, accuracy=0.75, epochs=20)]
    with pytest.raises(ValueError, match="expected one run of each seed") as error:
        results.Results(rows)
    message = str(error.value)
    assert "src, 1:16, test, SR-STE, seed 7: accuracy 0.5 and 0.75. Remove the row" in message


@pytest.mark.parametrize("accuracy", [60.7, -0.1, float("nan")])
def test_accuracies_that_are_no_fraction_are_refused(results, accuracy):
    with pytest.raises(ValueError, match="expected an accuracy from 0 to 1, found"):
        results.Results([row(accuracy=accuracy)])


def test_a_row_that_lacks_a_field_is_refused(results):
    made = row()
    del made["seconds"], made["split"]
    with pytest.raises(ValueError, match=r"found no \['split', 'seconds'\]: \{'task': 'src'"):
        results.Results([made])


def test_other_splits_and_patterns_are_refused(results):
    with pytest.raises(ValueError, match=r"expected a split of .*, found 'train'"):
        results.Results([row(split="train")])
    with pytest.raises(PatternError, match="'all' is not an N:M pattern"):
        results.Results([row(pattern="all")])


def test_other_fields_are_not_looked_at(results):
    (run,) = results.Results([row(note="quiet machine")]).runs
    assert not hasattr(run, "note")
