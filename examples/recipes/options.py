"""The command line that all recipes share."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from recipes.errors import RecipeError
from recipes.recipe import Recipe

METHODS = ("dense", "sr-ste", "asp", "lbc", "gmp", "rigl", "granet")
BRANCHES = ("auto", "spre", "same", "inverse", "none")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run was asked for; numbers that were left out are the recipe's.

    Attributes:
        pattern: N:M.
        method: One of `METHODS`.
        branch: One of `BRANCHES`.
        depthwise: "flat" to sparsify depthwise convs as Tables 4 and 5 do.
        exclude: Layers that stay dense.
        pretrained: Dense weights to start from.
        epochs: Of the training.
        batch_size: Images per step, of all ranks together.
        lr: Peak learning rate at that batch size.
        weight_decay: Of the optimizer.
        amp: Autocast type, or "off".
        ema: Decay of the moving average of the weights, or None.
        seed: Of weights, order and augmentation.
        compile: Whether training runs compiled.
        workers: Processes that load data, for each rank.
        device: As torch names it.
        eval_every: Epochs from one evaluation to the next.
        output: Folder of all that a run leaves behind.
        resume: Whether to go on from the checkpoint in `output`.
    """

    pattern: str
    method: str
    branch: Literal["auto", "spre", "same", "inverse", "none"]
    depthwise: Literal["flat"] | None
    exclude: tuple[str, ...]
    pretrained: Path | None
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    amp: Literal["off", "bf16", "fp16"]
    ema: float | None
    seed: int
    compile: bool
    workers: int
    device: str | None
    eval_every: int
    output: Path
    resume: bool

    @staticmethod
    def of(found: argparse.Namespace, recipe: Recipe) -> Options:
        """The options on a command line, completed by a recipe.

        Raises:
            RecipeError: If they contradict each other.
        """
        values: dict[str, Any] = {
            field.name: getattr(found, field.name) for field in fields(Options)
        }
        for name in ("epochs", "batch_size", "weight_decay"):
            if values[name] is None:
                values[name] = getattr(recipe, name)
        if values["lr"] is None:  # linear scaling, Goyal et al., 1706.02677
            values["lr"] = recipe.lr * values["batch_size"] / recipe.batch_size
        values["exclude"] = recipe.exclude if found.exclude is None else tuple(found.exclude)
        options = Options(**values)
        options.check()
        return options

    @property
    def checkpoint(self) -> Path:
        """Where the run is kept."""
        return self.output / "checkpoint.pt"

    def check(self) -> None:
        """Refuse what makes no sense together."""
        if self.method == "asp" and self.pretrained is None:
            raise RecipeError(
                "--method asp: expected --pretrained PATH, the dense weights it fine-tunes, found "
                "none. --method dense trains them: its checkpoint.pt can be given."
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise RecipeError(
                f"--ema {self.ema}: expected a decay between 0 and 1, such as 0.9999."
            )
        for name, least in (("epochs", 1), ("batch_size", 1), ("eval_every", 1), ("workers", 0)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise RecipeError(f"--{option} {getattr(self, name)}: expected at least {least}.")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every recipe; a script adds its own."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="the data, as described above")
    add("--output", type=Path, required=True, metavar="DIR", help="checkpoint, logs, model file")
    add("--resume", action="store_true", help="go on from the checkpoint in --output, if any")
    add("--pattern", default="2:4", metavar="N:M", help="default: %(default)s")
    add("--method", choices=METHODS, default="sr-ste", help="default: %(default)s")
    add("--branch", choices=BRANCHES, default="auto", help="auto: SpRe for N:M methods")
    add("--depthwise", choices=("flat",), help="sparsify depthwise convs as Tables 4 and 5 do")
    add("--exclude", nargs="*", metavar="NAME", help="layers that stay dense: names or globs")
    add("--pretrained", type=Path, metavar="PATH", help="dense weights to start from")
    add("--epochs", type=int)
    add("--batch-size", type=int, help="of all ranks together")
    add("--lr", type=float, help="peak; default: the recipe's, in proportion to the batch size")
    add("--weight-decay", type=float)
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="default: %(default)s")
    add("--ema", type=float, metavar="DECAY", help="average the weights as well, such as 0.9999")
    add("--compile", action="store_true", help="train through torch.compile")
    add("--seed", type=int, default=0)
    workers = min(8, os.cpu_count() or 1)
    add("--workers", type=int, default=workers, help="processes that load data, for each rank")
    add("--device", help="cpu or cuda; default: a GPU if there is one")
    add("--eval-every", type=int, default=1, metavar="EPOCHS", help="default: %(default)s")
    return made
