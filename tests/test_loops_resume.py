"""Killed at random and resumed, a training ends with the very weights of one that was not."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from loops import FEW, RECIPES, prepared, sgd, train
from loops_resume import STEPS
from models import assert_same

HERE = Path(__file__).parent


def resume(directory: Path, seed: int, recipes: Iterable[str]) -> dict[str, int]:
    """Leave the last checkpoints in `directory`; how often each recipe was killed."""
    script = [sys.executable, str(HERE / "loops_resume.py"), str(directory), str(seed), *recipes]
    run = subprocess.run(script, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = [line.split("\t") for line in run.stdout.splitlines()]
    return {recipe: int(deaths) for recipe, deaths in lines}


def check(recipe: str, directory: Path) -> None:
    """The checkpoint is that of a training which nothing interrupted."""
    model = prepared(recipe)
    optimizer = sgd(model)
    train(model, optimizer, range(STEPS), recipe)
    found = torch.load(directory / f"{recipe}.pt", weights_only=True)
    assert found["step"] == STEPS
    assert_same(found["model"], model.state_dict())
    for number, state in optimizer.state_dict()["state"].items():
        assert torch.equal(
            found["optimizer"]["state"][number]["momentum_buffer"], state["momentum_buffer"]
        )


@pytest.mark.parametrize(
    ("seed", "recipes"),
    [(0, FEW), *(pytest.param(seed, RECIPES, marks=pytest.mark.slow) for seed in (0, 1))],
    ids=["few", "all", "all, other moments"],
)
def test_a_killed_training_ends_as_one_that_was_not(seed, recipes, tmp_path):
    deaths = resume(tmp_path, seed, recipes)
    assert deaths.keys() == set(recipes)
    for recipe in recipes:
        assert deaths[recipe] >= 1, recipe
        check(recipe, tmp_path)


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
