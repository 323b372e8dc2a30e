"""ImageNet-1K as folders of JPEGs: `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder

from recipes.errors import RecipeError

_LAYOUT = "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, one folder per class"
_FLAT = (
    "The archive of the validation set has no folders: torchvision.datasets.ImageNet(DIR, 'val') "
    "sorts it into them, given ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz."
)


def class_names(root: Path) -> list[str]:
    """The names of the class folders, the same in `train` and `val`, in the order of their labels.

    Raises:
        RecipeError: If the folders are not there, or differ.
    """
    found = {}
    for part in ("train", "val"):
        folder = root / part
        if not folder.is_dir():
            raise RecipeError(f"--data {root}: expected {_LAYOUT}, found no folder {folder}.")
        found[part] = sorted(each.name for each in folder.iterdir() if each.is_dir())
        if not found[part]:
            raise RecipeError(
                f"--data {root}: expected {_LAYOUT}, found no folder in {folder}. "
                + (_FLAT if part == "val" else "")
            )
    if found["train"] != found["val"]:
        differing = sorted({*found["train"]} ^ {*found["val"]})
        raise RecipeError(
            f"--data {root}: expected the same classes in train and val, found "
            f"{len(differing)} in one of them only, such as {differing[0]}."
        )
    return found["train"]


def images(root: Path, part: str, transform: Callable[[Image.Image], Tensor]) -> ImageFolder:
    """The images of "train" or "val".

    Raises:
        RecipeError: If there are none, or a class has none.
    """
    class_names(root)
    try:
        return ImageFolder(root / part, transform)
    except FileNotFoundError as error:  # a class without images
        raise RecipeError(f"--data {root}: expected {_LAYOUT}. {error}") from error
