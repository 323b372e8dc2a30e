"""Trains recipes in processes that are killed, each going on from the last checkpoint.

    python loops_resume.py DIRECTORY SEED RECIPE...

Each life is a fork of this process, which itself never trains. It kills itself with SIGKILL at a
random moment: in the middle of a step, before, while or after a checkpoint is written.
"""

import os
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch._dynamo  # what a first step imports, here once for all forks
from loops import prepared, sgd, train

STEPS = 10
MOMENTS = 4  # of each step at which a life may end


def live(recipe: str, directory: Path, moments: int) -> None:
    """Go on from the last checkpoint, to the end or to death after so many moments."""

    def moment() -> None:
        nonlocal moments
        moments -= 1
        if moments == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    model = prepared(recipe)
    optimizer = sgd(model)
    model.register_forward_hook(lambda *_: moment() if model.training else None)
    checkpoint, draft, first = directory / f"{recipe}.pt", directory / "draft.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for step in range(first, STEPS):
        train(model, optimizer, range(step, step + 1), recipe)
        moment()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state | {"step": step + 1}, draft)
        moment()
        draft.replace(checkpoint)
        moment()


def main(directory: Path, seed: int, recipes: Sequence[str]) -> None:
    torch.set_num_threads(1)
    prepared()
    random_moments = random.Random(seed)
    for recipe in recipes:
        deaths, over = 0, False
        while not over:
            moments = random_moments.randint(MOMENTS, MOMENTS * STEPS // 2)
            pid = os.fork()
            if pid == 0:
                live(recipe, directory, moments)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if status not in (0, -signal.SIGKILL):
                raise SystemExit(f"{recipe}: a life ended with {status}")
            over = status == 0
            deaths += not over
        print(recipe, deaths, sep="\t", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
