"""benchmarks/accuracy: the task, the arms, one training, and a script that was killed."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import spre_fx

ACCURACY = Path(__file__).parent.parent / "benchmarks" / "accuracy"


@pytest.fixture(autouse=True)
def _path(import_benchmarks):
    import_benchmarks("accuracy")


@pytest.fixture(name="patches")
def _patches():
    return importlib.import_module("patches")


@pytest.fixture(name="trainings")
def _trainings():
    return importlib.import_module("trainings")


@pytest.fixture(name="arms")
def _arms():
    return importlib.import_module("arms")


@pytest.fixture(name="stages")
def _stages():
    return importlib.import_module("stages")


def test_strips_share_no_pixel_and_the_search_never_sees_the_test_strip(patches):
    test, search = patches.TEST, patches.VALIDATION
    for split in (test, search):
        assert split.train[1] < split.judge[0]
    assert search.judge[1] <= test.train[1] < test.judge[0]


def test_patches_are_cut_from_their_photograph_and_strip(patches):
    data = patches.patches(patches.TEST)
    assert data.x_train.shape == (16000, 1, 16, 16)
    assert data.x_judge.shape == (8000, 1, 16, 16)
    assert data.y_judge.bincount().tolist() == [400] * 20
    assert abs(data.x_train.mean()) < 1e-4
    assert abs(data.x_train.std() - 1) < 1e-4
    again = patches.patches.__wrapped__(patches.TEST)
    assert torch.equal(again.x_judge, data.x_judge)
    left = torch.from_numpy(patches.photographs()[1][:, : round(0.7 * 512)])  # the bricks
    windows = left.unfold(0, 16, 1).unfold(1, 16, 1)
    first = data.x_train[800, 0]
    distance = _standardised_distance(windows, first)
    assert distance.min() < 1e-3


def _standardised_distance(windows, patch):
    """Between shapes of grey values, whatever their mean and scale."""
    windows = windows - windows.mean((2, 3), keepdim=True)
    windows = windows / windows.norm(dim=(2, 3), keepdim=True)
    patch = patch - patch.mean()
    return (windows - patch / patch.norm()).abs().amax((2, 3))


def test_every_arm_starts_from_the_same_weights_and_keeps_its_pattern(arms, trainings):
    first = {}
    for name, arm in arms.ARMS.items():
        torch.manual_seed(3)
        model = trainings.resnet()
        prepared = arm.prepare(model, "1:8", 100)
        first[name] = prepared.state_dict()["layer1_0.conv1.weight"]
        assert torch.equal(first[name], first["dense"])
        if arm.method in ("sr-ste", "asp", "lbc"):
            states = {site.name: site.state for site in spre_fx.sites(prepared)}
            sparse = spre_fx.State.NM if arm.branch is None else spre_fx.State.SPRE
            assert states.pop("layer2_0.downsample.0") is spre_fx.State.NM
            assert states.pop("conv1") is states.pop("fc") is spre_fx.State.SKIPPED
            assert set(states.values()) == {sparse}


def test_a_run_is_a_function_of_its_seed_and_is_judged_deployed(trainings, tmp_path):
    recipe = trainings.Recipe(epochs=0.06)
    job = trainings.Job("1:8", "ASP + SpRe", 5, "validation", 0.06)
    outcome = trainings.run(job, recipe, tmp_path)
    assert outcome["accuracy"] > 0.05  # one class of 20, always, would be 5 %
    assert 0 <= outcome["live_taps"] <= 1
    assert len(list(tmp_path.glob("dense-*.pt"))) == 1  # what ASP started from
    again = trainings.run(job, recipe, tmp_path)
    assert again["accuracy"] == outcome["accuracy"]


def test_batches_of_a_longer_run_start_as_those_of_a_shorter_one(trainings):
    short, long = trainings._batches(16000, 300, 7), trainings._batches(16000, 600, 7)
    assert len(short) == 300
    assert all(map(torch.equal, short, long))
    assert torch.cat(short[:250]).sort().values.tolist() == list(range(16000))
    assert not torch.equal(short[0], trainings._batches(16000, 300, 8)[0])


def test_the_learning_rate_warms_up_and_ends_at_nothing(trainings):
    rates = [trainings._warm_cosine(step, 1000) for step in range(1000)]
    assert rates[:250] == [(step + 1) / 250 for step in range(250)]
    assert rates[625] == pytest.approx(0.5)
    assert rates[250:] == sorted(rates[250:], reverse=True)
    assert rates[-1] < 1e-4


def test_accuracy_counts_what_is_right(trainings, patches):
    data = patches.patches(patches.VALIDATION)
    guess = nn.Sequential(nn.Flatten(), nn.Linear(256, 20))
    nn.init.zeros_(guess[1].weight)
    guess[1].bias.data = torch.arange(20.0)
    assert trainings.accuracy(guess, data) == 1 / 20


def test_every_arm_is_compared_and_every_comparison_has_runs(stages, arms):
    recipe = importlib.import_module("trainings").Recipe()
    jobs = {name: stage.jobs(recipe, {}) for name, stage in stages.STAGES.items()}
    for name, compared in (("search", stages.searched()), ("table", stages.comparisons())):
        assert {job.arm for job in jobs[name]} == {c.arm for c in compared}
    assert {job.arm for job in jobs["headline"]} < {job.arm for job in jobs["table"]}
    assert {job.arm for stage in jobs.values() for job in stage} == set(arms.ARMS)
    searched = {(job.seed, job.split) for job in jobs["search"]}
    assert {split for _, split in searched} == {"validation"}
    assert not {seed for seed, _ in searched} & {job.seed for job in jobs["headline"]}


def test_the_remedy_that_was_best_in_the_search_is_confirmed(stages, arms):
    seeds = stages.STAGES["search"].seeds
    rows = [
        {"split": split, "arm": arm.name, "seed": seed, "accuracy": accuracy}
        for place, arm in enumerate(arms.REMEDIES)
        for seed in seeds
        for split, accuracy in (("validation", 0.3 + 0.1 * (place == 2)), ("test", 0.9))
    ]
    confirm = stages.stage("confirm", rows)
    assert [arm for arm, _ in confirm.cells] == [arms.REMEDIES[2]]
    assert confirm.split == "test"
    assert confirm.seeds == stages.STAGES["headline"].seeds
    with pytest.raises(SystemExit, match="expected 4 runs of the search, found 0"):
        stages.stage("confirm", [])


def test_controls_get_the_time_of_the_branch(monkeypatch, tmp_path):
    script = importlib.import_module("run")
    methods = importlib.import_module("arms").METHODS
    times = dict.fromkeys(methods, 10.0) | {f"{m} + SpRe": 16.0 for m in methods}
    file = tmp_path / "step_times.json"
    file.write_text(json.dumps({"milliseconds": dict.fromkeys(("2:4", "1:16"), times)}))
    epochs = script.control_epochs(file, importlib.import_module("trainings").Recipe(epochs=4))
    assert epochs == {(f"{m}, same time", p): 6.4 for m in methods for p in ("2:4", "1:16")}


def start(folder: Path) -> subprocess.Popen:
    options = ["search", "--epochs", "0.012", "--seeds", "1", "--workers", "2"]
    command = [sys.executable, ACCURACY / "run.py", *options, "--folder", folder]
    log = (folder / "log").open("a")
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines(keepends=True) if file.exists() else []


def alive(session: int) -> list[int]:
    """The processes of a session, as /proc lists them."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue  # it ended meanwhile
        if int(owner) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
def test_a_killed_benchmark_goes_on_where_it_stopped_and_leaves_no_worker(tmp_path):
    methods = importlib.import_module("arms").METHODS
    times = {name: 1.0 for m in methods for name in (m, f"{m} + SpRe")}
    (tmp_path / "step_times.json").write_text(json.dumps({"milliseconds": {"1:16": times}}))
    file = tmp_path / "results.jsonl"
    first = start(tmp_path)
    while not lines(file):
        assert first.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    end = time.monotonic() + 60
    while alive(first.pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(first.pid)
    kept = [line for line in lines(file) if line.endswith("\n")]
    file.write_text("".join(kept) + kept[0][: len(kept[0]) // 2])  # cut short in the middle
    second = start(tmp_path)
    assert second.wait(timeout=500) == 0, (tmp_path / "log").read_text()
    stage = importlib.import_module("stages").STAGES["search"]
    rows = [json.loads(line) for line in lines(file)]
    assert lines(file)[: len(kept)] == kept
    assert sorted(row["arm"] for row in rows) == sorted(arm.name for arm, _ in stage.cells)
    assert {row["steps"] for row in rows} == {3}


def test_the_tables_are_of_the_results_that_are_kept(tmp_path):
    script = importlib.import_module("run")
    document = tmp_path / "accuracy.md"
    script.report(ACCURACY / "results.jsonl", document)
    kept = ACCURACY.parent / "accuracy.md"
    assert document.read_text(encoding="utf-8") == kept.read_text(encoding="utf-8")
    assert document.with_suffix(".png").stat().st_size > 10_000
