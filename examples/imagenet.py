r"""ResNet-18 and -50, MobileNet-V1 and -V2, and DeiT-small on ImageNet-1K: Tables 2 to 6.

    torchrun --nproc-per-node 8 examples/imagenet.py --data DIR --output runs/r50 \
        --model resnet50 --pattern 1:16
    torchrun --nproc-per-node 8 examples/imagenet.py --data DIR --output runs/mb1 \
        --model mobilenet_v1 --pattern 1:8 --depthwise flat

DIR holds `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from recipes import options, training
from recipes.imagenet import ImageNet

MODELS = ("resnet18", "resnet50", "mobilenet_v1", "mobilenet_v2", "deit_small")


@dataclass(frozen=True, kw_only=True)
class ResNet(ImageNet):
    """Sec. 4.1 of Zhang et al., 2306.05612v3; the rest as resnet50.yaml in zyxxmu/SpRE/configs.

    SR-STE's own configuration (aojunzz/NM-sparsity) has half the weight decay, no label smoothing,
    and shifts the colours of training images.
    """

    epochs: int = 120
    batch_size: int = 256
    lr: float = 0.1
    weight_decay: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class MobileNet(ImageNet):
    """As mobilenetv1.yaml in zyxxmu/SpRE/configs, with the dense classifier of its model.

    The paper has no number of epochs for MobileNets, and the authors no configuration of V2, which
    is trained like V1 here.
    """

    epochs: int = 180
    batch_size: int = 256
    lr: float = 0.1
    weight_decay: float = 4e-5
    exclude: tuple[str, ...] = ("classifier",)


def recipe(found: argparse.Namespace) -> ImageNet:
    """The recipe of a model."""
    root, size = found.data, found.image_size
    if found.model == "deit_small":
        from recipes.deit import DeiT  # noqa: PLC0415 - timm takes seconds

        return DeiT(root=root, image_size=size)
    kind = MobileNet if found.model.startswith("mobilenet") else ResNet
    return kind(root=root, image_size=size, network=found.model)


def main() -> None:
    """Read the command line and train."""
    parser = options.parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="resnet50", help="default: %(default)s")
    parser.add_argument("--image-size", type=int, default=224, help="pixels; default: 224")
    found = parser.parse_args()
    training.main(recipe(found), found)


if __name__ == "__main__":
    main()
