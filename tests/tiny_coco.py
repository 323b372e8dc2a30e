"""COCO on a small scale: coloured shapes in JPEG files, and their instances in COCO's JSON."""

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

CATEGORIES = [{"id": 3, "name": "square"}, {"id": 7, "name": "triangle"}]
COLOURS = {3: "red", 7: "lime"}
SIZES = [(96, 64), (64, 96), (90, 60), (60, 90), (80, 80), (96, 64)]  # width, height


def write(root: Path) -> None:
    """Two objects in each image of both parts but the last; in the first, grey, a crowd too."""
    (root / "annotations").mkdir(parents=True)
    for part, sizes in (("train", SIZES), ("val", SIZES[3:])):
        folder = root / f"{part}2017"
        folder.mkdir()
        images, annotations = [], []
        for number, size in enumerate(sizes):
            name = f"{1000 + number:012d}.jpg"
            picture = Image.new("RGB" if number else "L", size, "grey")
            if number < len(sizes) - 1:
                annotations += _draw(picture, 1000 + number, len(annotations))
            picture.save(folder / name, quality=95)
            images.append(
                {"id": 1000 + number, "file_name": name, "width": size[0], "height": size[1]}
            )
        annotations.append(_crowd(images[0], len(annotations)))
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        file = root / "annotations" / f"instances_{part}2017.json"
        file.write_text(json.dumps(content))


def _draw(picture: Image.Image, image: int, count: int) -> list[dict[str, Any]]:
    """A square and a triangle, as the image is numbered a little lower."""
    down = image % 5
    shapes = {
        3: [(6, 8 + down), (30, 8 + down), (30, 32 + down), (6, 32 + down)],
        7: [(32, 50 + down), (56, 50 + down), (44, 24 + down)],
    }
    return [
        _annotation(picture, shape, category, image, count + number)
        for number, (category, shape) in enumerate(shapes.items(), 1)
    ]


def _annotation(
    picture: Image.Image, shape: list[tuple[int, int]], category: int, image: int, number: int
) -> dict[str, Any]:
    colour = "white" if picture.mode == "L" else COLOURS[category]
    ImageDraw.Draw(picture).polygon(shape, fill=colour)
    x, y = zip(*shape, strict=True)
    left, top, width, height = min(x), min(y), max(x) - min(x), max(y) - min(y)
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [left, top, width, height],
        "area": width * height / (1 if category == 3 else 2),
        "iscrowd": 0,
        "segmentation": [[float(value) for point in shape for value in point]],
    }


def _crowd(image: dict[str, Any], count: int) -> dict[str, Any]:
    """The leftmost two columns of an image, run-length encoded."""
    width, height = image["width"], image["height"]
    return {
        "id": count + 1,
        "image_id": image["id"],
        "category_id": 3,
        "bbox": [0, 0, 2, height],
        "area": 2 * height,
        "iscrowd": 1,
        "segmentation": {"size": [height, width], "counts": [0, 2 * height, (width - 2) * height]},
    }
