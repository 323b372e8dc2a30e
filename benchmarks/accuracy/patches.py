"""The task "src": which of 20 photographs was this 16x16 grey patch cut from?

The photographs ship inside scikit-image and scikit-learn. Each is cut into vertical strips: patches
to train on come from the left of every photograph, those to judge by from a strip further right
that shares no pixel with it. Unlike scikit-learn's digits the task leaves room above what a sparse
network reaches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from skimage import data
from skimage.color import rgb2gray
from skimage.util import img_as_float32
from sklearn.datasets import load_sample_images
from torch import Tensor

SIDE = 16
PER_CLASS = {"train": 800, "judge": 400}
FROM_SKIMAGE = (
    *("astronaut", "brick", "camera", "cell", "chelsea", "clock", "coffee", "coins", "grass"),
    *("gravel", "hubble_deep_field", "immunohistochemistry", "moon", "page", "retina", "rocket"),
    "text",
)


@dataclass(frozen=True)
class Split:
    """Where patches come from, as fractions of the width of every photograph.

    Attributes:
        name: What rows of results call it.
        train: From where to where patches to train on lie.
        judge: The same of patches to judge by.
    """

    name: str
    train: tuple[float, float]
    judge: tuple[float, float]


TEST = Split("test", (0.0, 0.70), (0.75, 1.0))
VALIDATION = Split("validation", (0.0, 0.55), (0.57, 0.70))  # all within what TEST trains on
SPLITS = {split.name: split for split in (TEST, VALIDATION)}


@dataclass(frozen=True)
class Patches:
    """Standardised patches `(count, 1, 16, 16)` and the photograph of each, `(count,)`."""

    x_train: Tensor
    y_train: Tensor
    x_judge: Tensor
    y_judge: Tensor


@lru_cache(maxsize=2)
def patches(split: Split) -> Patches:
    """The patches of a split: always the same ones, whatever the seed of a run."""
    random = np.random.default_rng(0)
    parts = {
        "train": _cut(split.train, PER_CLASS["train"], random),
        "judge": _cut(split.judge, PER_CLASS["judge"], random),
    }
    mean, std = parts["train"][0].mean(), parts["train"][0].std()
    (x_train, y_train), (x_judge, y_judge) = parts.values()
    return Patches((x_train - mean) / std, y_train, (x_judge - mean) / std, y_judge)


def _cut(
    strip: tuple[float, float], count: int, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """`count` patches at random places within a strip of each photograph, and their labels."""
    found = []
    for photograph in photographs():
        height, width = photograph.shape
        left, right = (round(side * width) for side in strip)
        rows = random.integers(0, height - SIDE + 1, count)
        columns = random.integers(left, right - SIDE + 1, count)
        found += [
            photograph[row : row + SIDE, column : column + SIDE]
            for row, column in zip(rows, columns, strict=True)
        ]
    labels = torch.arange(len(photographs())).repeat_interleave(count)
    return torch.from_numpy(np.stack(found)[:, None]), labels


@lru_cache(maxsize=1)
def photographs() -> list[NDArray[np.float32]]:
    """Twenty photographs in grey, `(height, width)`, from 0 to 1."""
    images = [getattr(data, name)() for name in FROM_SKIMAGE]
    images += [data.stereo_motorcycle()[0], *load_sample_images().images]
    grey = [rgb2gray(image) if image.ndim == 3 else image for image in images]
    return [img_as_float32(image) for image in grey]
