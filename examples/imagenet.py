r"""ResNet-18 and -50, MobileNet-V1 and -V2, and DeiT-small on ImageNet-1K: Tables 2 to 6.

    torchrun --nproc-per-node 8 examples/imagenet.py --data DIR --output runs/r50 \
        --model resnet50 --pattern 1:16
    torchrun --nproc-per-node 8 examples/imagenet.py --data DIR --output runs/mb1 \
        --model mobilenet_v1 --pattern 1:8 --depthwise flat

DIR holds `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`.
"""

from __future__ import annotations

import argparse

from recipes import options, training
from recipes.imagenet import ImageNet

MODELS = ("resnet18", "resnet50", "mobilenet_v1", "mobilenet_v2", "deit_small")


def recipe(found: argparse.Namespace) -> ImageNet:
    """Sec. 4.1 of Zhang et al., 2306.05612v3; the rest as the configs of zyxxmu/SpRE."""
    if found.model == "deit_small":
        from recipes.deit import DeiT  # noqa: PLC0415 - timm takes seconds

        return DeiT(root=found.data, image_size=found.image_size)
    if found.model.startswith("mobilenet"):
        # configs/mobilenetv1.yaml, whose classifier is dense. There is none of MobileNet-V2, and
        # the paper has no number of epochs for either: V2 is trained like V1.
        hyper = {"epochs": 180, "weight_decay": 4e-5, "exclude": ("classifier",)}
    else:  # configs/resnet18.yaml and resnet50.yaml
        hyper = {"epochs": 120, "weight_decay": 1e-4}
    return ImageNet(
        root=found.data,
        network=found.model,
        image_size=found.image_size,
        batch_size=256,
        lr=0.1,
        **hyper,
    )


def main() -> None:
    """Read the command line and train."""
    parser = options.parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="resnet50", help="default: %(default)s")
    parser.add_argument("--image-size", type=int, default=224, help="pixels; default: 224")
    found = parser.parse_args()
    training.main(recipe(found), found)


if __name__ == "__main__":
    main()
