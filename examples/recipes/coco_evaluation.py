"""COCO's average precision, from a detector's outputs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.ops import box_convert

Detection = dict[str, Any]  # an entry of COCO's results format

# What is compared with the ground truth: the key of a detection, and COCOeval's name for it.
KINDS = {"box": ("bbox", "bbox"), "mask": ("segmentation", "segm")}
MEASURES = ("AP", "AP50", "AP75")  # the first of those COCOeval has


def detections(
    image_id: int, output: dict[str, Tensor], categories: Sequence[int]
) -> list[Detection]:
    """A detector's output for one image, in COCO's results format.

    Args:
        image_id: Of the image.
        output: `boxes` `(count, 4)`, `labels` and `scores` `(count,)`, and of a Mask R-CNN `masks`
            `(count, 1, H, W)`, each pixel's probability.
        categories: The category's id of each label, of label 1 first.
    """
    boxes = box_convert(output["boxes"], "xyxy", "xywh").tolist()
    labels, scores = output["labels"].tolist(), output["scores"].tolist()
    found: list[Detection] = [
        {
            "image_id": image_id,
            "category_id": categories[label - 1],
            "bbox": box,
            "score": score,
        }
        for box, label, score in zip(boxes, labels, scores, strict=True)
    ]
    if "masks" in output:
        pixels = (output["masks"][:, 0] > 0.5).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        encoded = mask_codec.encode(np.asfortranarray(pixels))
        for detection, mask in zip(found, encoded, strict=True):
            detection["segmentation"] = mask
    return found


def average_precision(
    truth: COCO, found: Sequence[Detection], kinds: Sequence[str]
) -> dict[str, float]:
    """AP, the mean over IoU 0.5 to 0.95, and that at 0.5 and at 0.75, from 0 to 1.

    Args:
        truth: The annotations of all images, with and without detections.
        found: The detections.
        kinds: "box", "mask" or both.

    Returns:
        Such as {"box AP": 0.374, "box AP50": 0.581, "box AP75": 0.404}.
    """
    results = {}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress
        for kind in kinds:
            key, name = KINDS[kind]
            scoring = COCOeval(truth, _results(truth, found, key), name)
            scoring.evaluate()
            scoring.accumulate()
            scoring.summarize()
            for measure, value in zip(MEASURES, scoring.stats, strict=False):
                results[f"{kind} {measure}"] = float(value)
    return results


def _results(truth: COCO, found: Sequence[Detection], key: str) -> COCO:
    """Copies of the detections with `key` alone, by which COCOeval then judges their size."""
    keys = ("image_id", "category_id", "score", key)
    entries = [{name: detection[name] for name in keys} for detection in found]
    if entries:
        return truth.loadRes(entries)
    none = COCO()  # loadRes wants at least one
    none.dataset = {**truth.dataset, "annotations": []}
    none.createIndex()
    return none
