"""CIFAR-10 as its authors distribute it: the folder `cifar-10-batches-py`.

torchvision's reader demands the MD5 sums of the whole data set, so that no excerpt in the same
format can be read, and unpickles whatever the files hold; this one reads arrays only.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from recipes.errors import RecipeError

FOLDER = "cifar-10-batches-py"
TRAINING = tuple(f"data_batch_{number}" for number in range(1, 6))
EVALUATION = ("test_batch",)


class CIFAR10(Dataset[tuple[Any, int]]):
    """The images of some of the files, in memory.

    Args:
        root: What holds `cifar-10-batches-py`.
        names: Its files: `TRAINING` or `EVALUATION`.
        transform: From an RGB image of 32x32 pixels.

    Raises:
        RecipeError: If a file is not there, or is not of this format.
    """

    def __init__(
        self, root: Path, names: Sequence[str], transform: Callable[[Image.Image], Tensor]
    ) -> None:
        folder = root / FOLDER
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise RecipeError(
                f"--data {root}: expected {FOLDER}/data_batch_1 to _5 and {FOLDER}/test_batch, "
                f"found no {folder / missing[0]}. Unpack cifar-10-python.tar.gz from "
                "https://www.cs.toronto.edu/~kriz/cifar.html there."
            )
        files = [_read(folder / name) for name in names]
        self._images = np.concatenate([images for images, _ in files])
        self._labels = [label for _, labels in files for label in labels]
        self._transform = transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._images[index])), self._labels[index]


def _read(path: Path) -> tuple[np.ndarray, list[int]]:
    """Images `(count, 32, 32, 3)`, and labels."""
    try:
        with path.open("rb") as file:
            content = _Arrays(file, encoding="latin1").load()  # written by Python 2
    except (pickle.UnpicklingError, EOFError, TypeError, ValueError) as error:
        raise RecipeError(
            f"{path}: expected a batch of CIFAR-10, found another file. {error}"
        ) from error
    entries = sorted(map(str, content)) if isinstance(content, dict) else []
    if not {"data", "labels"} <= {*entries}:
        raise RecipeError(
            f"{path}: expected 'data' and 'labels' in it, found {', '.join(entries) or 'neither'}."
        )
    data, labels = np.asarray(content["data"]), [int(label) for label in content["labels"]]
    if data.shape != (len(labels), 3072) or data.dtype != np.uint8:
        raise RecipeError(
            f"{path}: expected uint8 data of shape ({len(labels)}, 3072), one row per label, found "
            f"{data.dtype} of shape {data.shape}."
        )
    if not all(0 <= label < 10 for label in labels):
        raise RecipeError(
            f"{path}: expected labels from 0 to 9, found {min(labels)} to {max(labels)}."
        )
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


class _Arrays(pickle.Unpickler):
    """Reads arrays of NumPy, and nothing that runs code."""

    def find_class(self, module: str, name: str) -> Any:
        """The few functions that make an array."""
        known = {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it wants {module}.{name}")
        return super().find_class(module, name)
