"""COCO 2017 as it is published: images and objects, for torchvision's detectors."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors
from torchvision.ops import box_convert, clip_boxes_to_image
from torchvision.transforms import v2

from recipes.errors import RecipeError
from recipes.recipe import EpochSampler

_LAYOUT = """\
    train2017/*.jpg
    val2017/*.jpg
    annotations/instances_train2017.json
    annotations/instances_val2017.json"""

Target = dict[str, Any]
Transform = Callable[[Any, Target], tuple[Any, Target]]


@dataclass(frozen=True)
class Split:
    """Where a part of the data lies.

    Attributes:
        images: The folder of its JPEG files.
        annotations: The JSON file of its objects.
    """

    images: Path
    annotations: Path


def splits(root: Path) -> tuple[Split, Split]:
    """The parts to train and to evaluate on.

    Raises:
        RecipeError: If `root` lacks a piece of COCO's layout.
    """
    training, evaluation = (
        Split(root / f"{name}2017", root / "annotations" / f"instances_{name}2017.json")
        for name in ("train", "val")
    )
    missing = [str(each.images) for each in (training, evaluation) if not each.images.is_dir()]
    missing += [
        str(each.annotations) for each in (training, evaluation) if not each.annotations.is_file()
    ]
    if missing:
        raise RecipeError(
            f"--data {root}: expected COCO 2017 as its archives unpack:\n{_LAYOUT}\nfound "
            f"no {', no '.join(missing)}. Unpack the missing archives there: "
            "https://cocodataset.org/#download"
        )
    return training, evaluation


class CocoImages(Dataset[tuple[Tensor, Target]]):
    """The images of a split, with their objects.

    A sample is an image, uint8 of shape `(3, H, W)`, and a dict of its `image_id`, the `boxes`
    `(count, 4)` of its objects as x1, y1, x2, y2 in pixels, their `labels` `(count,)` and, if asked
    for, `masks` `(count, H, W)`. Labels number the categories from 1, in the order of their ids.
    Crowds, and boxes less than a pixel wide or high, are no objects to learn from and left out, as
    in MMDetection; `truth` has them.

    Attributes:
        truth: The annotations.
        ids: Of the images, in order.
        categories: The category's id of each label, of label 1 first.

    Args:
        split: Where they are.
        masks: Whether samples have masks.
        transform: Of an image and its target.

    Raises:
        RecipeError: If the annotations are not COCO's, or images or what is needed of objects are
            missing.
    """

    def __init__(
        self, split: Split, *, masks: bool = False, transform: Transform | None = None
    ) -> None:
        self.split = split
        self.masks = masks
        self.transform = transform
        self.truth = _read(split.annotations)
        self.ids: list[int] = sorted(self.truth.getImgIds())
        self.categories: list[int] = sorted(self.truth.getCatIds())
        self._labels = {category: label for label, category in enumerate(self.categories, 1)}
        self._require_images()
        self.require("bbox", "area", "iscrowd", *(["segmentation"] if masks else []))

    def _require_images(self) -> None:
        files = {*os.listdir(self.split.images)}
        names = [self.truth.imgs[number]["file_name"] for number in self.ids]
        absent = [name for name in names if name not in files]
        if absent:
            raise RecipeError(
                f"{self.split.annotations}: expected its images in {self.split.images}, found "
                f"{len(absent)} of {len(names)} that are not there, such as {absent[0]}. Unpack "
                "the archives anew."
            )

    def require(self, *keys: str) -> None:
        """Look whether every object is described as far as that.

        Raises:
            RecipeError: If one is not.
        """
        for number, annotation in self.truth.anns.items():
            for key in keys:
                if key not in annotation:
                    raise RecipeError(
                        f"{self.split.annotations}: expected {', '.join(keys)} of every object, "
                        f"found no {key} in annotation {number}. Add it, as COCO defines it "
                        "(https://cocodataset.org/#format-data)."
                    )

    def keep_those_with_objects(self) -> None:
        """Leave out the images that have no object to learn from."""
        self.ids = [number for number in self.ids if self._objects(number)[0]]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        number = self.ids[index]
        with Image.open(self.split.images / self.truth.imgs[number]["file_name"]) as file:
            image: Tensor = tv_tensors.Image(file.convert("RGB"))
        objects, boxes = self._objects(number)
        labels = [self._labels[each["category_id"]] for each in objects]
        size = image.shape[-2:]
        target: Target = {
            "image_id": number,
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor(labels, dtype=torch.int64),
        }
        if self.masks:
            masks = torch.zeros(len(objects), *size, dtype=torch.uint8)
            for mask, each in zip(masks, objects, strict=True):
                mask.copy_(torch.from_numpy(self.truth.annToMask(each)))
            target["masks"] = tv_tensors.Mask(masks)
        if self.transform is not None:
            image, target = self.transform(image, target)
        sample: tuple[Tensor, Target] = v2.ToPureTensor()(image, target)
        return sample

    def _objects(self, number: int) -> tuple[list[dict[str, Any]], Tensor]:
        """The annotations of an image that are objects to learn from, and their boxes."""
        image = self.truth.imgs[number]
        objects = [each for each in self.truth.imgToAnns[number] if not each.get("iscrowd", 0)]
        boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float32).view(-1, 4)
        boxes = box_convert(boxes, "xywh", "xyxy")
        boxes = clip_boxes_to_image(boxes, (image["height"], image["width"]))
        kept = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
        return [each for each, keep in zip(objects, kept, strict=True) if keep], boxes[kept]

    def landscape(self) -> list[bool]:
        """Whether each image is wider than high."""
        images = [self.truth.imgs[number] for number in self.ids]
        return [image["width"] > image["height"] for image in images]


def _read(file: Path) -> COCO:
    expected = f"{file}: expected COCO's annotations of instances, found"
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress
            found = COCO(str(file))
    except (json.JSONDecodeError, AssertionError) as error:
        raise RecipeError(f"{expected} a file that is not whole. {error}") from error
    empty = [key for key in ("images", "annotations", "categories") if not found.dataset.get(key)]
    if empty:
        raise RecipeError(f"{expected} no {', no '.join(empty)}.")
    return found


class AspectRatioBatches(Sampler[list[int]]):
    """Batches of wide images and of high ones, so that little of a batch is padding.

    Images are taken in the order of the sampler. Batches are full, and as many as they would be of
    mixed images, so that ranks with equally many images have equally many batches: what is left of
    both kinds at the end makes one more where it suffices.

    Args:
        sampler: The images of an epoch, such as a DistributedSampler.
        landscape: Whether each image of the data is wider than high.
        batch_size: Images per batch.
    """

    def __init__(self, sampler: EpochSampler, landscape: Sequence[bool], batch_size: int) -> None:
        self._sampler = sampler
        self._landscape = landscape
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        waiting: dict[bool, list[int]] = {True: [], False: []}
        for index in self._sampler:
            batch = waiting[self._landscape[index]]
            batch.append(index)
            if len(batch) == self._batch_size:
                yield batch.copy()
                batch.clear()
        rest = waiting[True] + waiting[False]
        if len(rest) >= self._batch_size:
            yield rest[: self._batch_size]

    def __len__(self) -> int:
        return len(self._sampler) // self._batch_size  # type: ignore[arg-type]
