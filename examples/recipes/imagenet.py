"""ImageNet-1K: its images, and the training of the CNNs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torchvision
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from recipes import imagenet_data
from recipes.classification import Classification

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ImageNet(Classification):
    """Crops of random size and place, mirrored or not, as data/imagenet.py of zyxxmu/SpRE.

    Attributes:
        network: A name of torchvision, or "mobilenet_v1".
        image_size: Pixels of a side.
    """

    network: str
    image_size: int = 224

    @cached_property
    def classes(self) -> int:
        """Class folders in `root`."""
        return len(imagenet_data.class_names(self.root))

    def model(self) -> nn.Module:
        """Fresh, with as many outputs as there are class folders."""
        if self.network == "mobilenet_v1":  # torchvision has none
            import timm  # noqa: PLC0415 - takes seconds

            mobilenet: nn.Module = timm.create_model(
                "mobilenetv1_100", num_classes=self.classes, act_layer="relu"
            )
            return mobilenet
        network: nn.Module = torchvision.models.get_model(
            self.network, weights=None, num_classes=self.classes
        )
        return network

    def training_data(self) -> ImageFolder:
        """The folder `train`."""
        augment = [v2.RandomResizedCrop(self.image_size), v2.RandomHorizontalFlip()]
        return imagenet_data.images(self.root, "train", v2.Compose([*augment, _standardised()]))

    def evaluation_data(self) -> ImageFolder:
        """The folder `val`: the centre of each image, 7/8 of its shorter side."""
        return imagenet_data.images(self.root, "val", centre(self.image_size))


def centre(
    size: int, interpolation: InterpolationMode = InterpolationMode.BILINEAR
) -> v2.Transform:
    """What images are evaluated at: 224 pixels out of 256, or another size in proportion."""
    resize = v2.Resize(size * 256 // 224, interpolation=interpolation)
    return v2.Compose([resize, v2.CenterCrop(size), _standardised()])


def _standardised() -> v2.Transform:
    return v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD)]
    )
