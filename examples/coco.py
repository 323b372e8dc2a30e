r"""Faster and Mask R-CNN on COCO: Tables 7 and 8.

    python examples/coco.py --data DIR --output runs/frcnn --model fasterrcnn --pattern 1:4 \
        --backbone runs/r50/checkpoint.pt
    torchrun --nproc-per-node 8 examples/coco.py --data DIR --output runs/mrcnn \
        --model maskrcnn --pattern 1:4 --backbone runs/r50/checkpoint.pt

DIR holds COCO 2017 as its archives unpack: the folders `train2017` and `val2017`, and `annotations`
with `instances_train2017.json` and `instances_val2017.json`. The backbone is a ResNet-50 that
examples/imagenet.py trained at the same pattern, or a dense one, such as torchvision's, which
becomes sparse while the detector trains.
"""

from __future__ import annotations

from pathlib import Path

from recipes import options, training
from recipes.coco import Coco
from recipes.coco_detectors import MODELS


def main() -> None:
    """Read the command line and train."""
    parser = options.parser(__doc__)
    add = parser.add_argument
    add("--model", choices=tuple(MODELS), default="fasterrcnn", help="default: %(default)s")
    add("--depth", type=int, choices=(18, 34, 50, 101), default=50, help="of the ResNet")
    add("--backbone", type=Path, metavar="PATH", help="a classifier's checkpoint to start from")
    add("--min-size", type=int, default=800, help="pixels of the shorter side; default: 800")
    add("--max-size", type=int, default=1333, help="most of the longer side; default: 1333")
    found = parser.parse_args()
    recipe = Coco(
        root=found.data,
        detector=found.model,
        depth=found.depth,
        min_size=found.min_size,
        max_size=found.max_size,
        backbone=found.backbone,
        pretrained_detector=found.pretrained is not None,
    )
    training.main(recipe, found)


if __name__ == "__main__":
    main()
