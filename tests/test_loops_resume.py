"""Killed at random and resumed, a training ends with the very weights of one that was not."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from loops import RECIPES, prepared, sgd, train
from loops_resume import STEPS
from models import assert_same

HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=[0, pytest.param(1, marks=pytest.mark.slow)])
def resumed(request, tmp_path_factory) -> tuple[Path, Mapping[str, int]]:
    """Where the last checkpoints are, and how often each recipe was killed."""
    directory = tmp_path_factory.mktemp("resumed")
    script = [sys.executable, str(HERE / "loops_resume.py"), str(directory), str(request.param)]
    run = subprocess.run(script, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = [line.split("\t") for line in run.stdout.splitlines()]
    return directory, {recipe: int(deaths) for recipe, deaths in lines}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_training_ends_as_one_that_was_not(recipe, resumed):
    directory, deaths = resumed
    model = prepared(recipe)
    optimizer = sgd(model)
    train(model, optimizer, range(STEPS), recipe)
    found = torch.load(directory / f"{recipe}.pt", weights_only=True)
    assert deaths[recipe] >= 1
    assert found["step"] == STEPS
    assert_same(found["model"], model.state_dict())
    for number, state in optimizer.state_dict()["state"].items():
        assert torch.equal(
            found["optimizer"]["state"][number]["momentum_buffer"], state["momentum_buffer"]
        )


def test_the_masks_of_all_recipes_but_asp_changed_on_the_way():
    unchanged = []
    for recipe in RECIPES:
        model = prepared(recipe)
        before = {n: b.clone() for n, b in model.named_buffers() if b.dtype == torch.bool}
        weights = model.get_submodule("3").masked_weight()[1].bool()
        train(model, sgd(model), range(STEPS), recipe)
        after = dict(model.named_buffers())
        kept = all(torch.equal(before[name], after[name]) for name in before)
        if kept and torch.equal(weights, model.get_submodule("3").masked_weight()[1].bool()):
            unchanged.append(recipe)
    assert unchanged == ["asp"]
