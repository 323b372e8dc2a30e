"""DeiT-small, and the training of its paper: Table 9 of Touvron et al., 2012.12877."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.utils.data import Dataset, Sampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

from recipes import distributed, imagenet_data
from recipes.errors import RecipeError
from recipes.imagenet import ImageNet, centre
from recipes.recipe import Batch, EpochSampler


class DeiTSmall(VisionTransformer):
    """timm's model, called with images alone: what it asks of its other arguments is no graph."""

    def __init__(self, image_size: int, classes: int) -> None:
        super().__init__(
            img_size=image_size,
            patch_size=16,
            embed_dim=384,
            depth=12,
            num_heads=6,
            num_classes=classes,
            drop_path_rate=0.1,
        )

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """`(N, 3, image_size, image_size)` -> logits `(N, classes)`."""
        logits: Tensor = super().forward(x)
        return logits


@dataclass(frozen=True, kw_only=True)
class DeiT(ImageNet):
    """DeiT-small as its own code trains it, which LBC's (zyxxmu/LBC) starts from.

    It has no conv with K > 1 that the pattern could go on, hence no SpRe branch: this is the plain
    N:M method. The classifier stays dense, as in LBC's code, and what LBC removes is gone after
    200 of 300 epochs.
    """

    network: str = "deit_small"
    epochs: int = 300
    batch_size: int = 1024
    lr: float = 1e-3  # 5e-4 * batch size / 512
    weight_decay: float = 0.05
    lr_floor: float = 1e-2  # of 1e-3
    exclude: tuple[str, ...] = ("head",)
    lbc_end: float = 2 / 3

    def model(self) -> DeiTSmall:
        """Fresh, with as many outputs as there are class folders."""
        return DeiTSmall(self.image_size, self.classes)

    def training_data(self) -> ImageFolder:
        """RandAugment and random erasing."""
        transform = create_transform(
            self.image_size,
            is_training=True,
            color_jitter=0.4,
            auto_augment="rand-m9-mstd0.5-inc1",
            interpolation="bicubic",
            re_prob=0.25,
            re_mode="pixel",
            re_count=1,
        )
        return imagenet_data.images(self.root, "train", transform)

    def evaluation_data(self) -> ImageFolder:
        """The folder `val`."""
        return imagenet_data.images(
            self.root, "val", centre(self.image_size, InterpolationMode.BICUBIC)
        )

    def training_sampler(self, data: Dataset[Any], seed: int) -> EpochSampler:
        """Three augmentations of each image it takes, a third of them in an epoch."""
        del seed  # timm's order is that of the epoch's number
        sampler: EpochSampler = RepeatAugSampler(  # type: ignore[no-untyped-call]
            data, distributed.world_size(), distributed.rank(), num_repeats=3, selected_round=0
        )
        return sampler

    def training_batches(
        self, data: Dataset[Any], sampler: EpochSampler, batch_size: int
    ) -> Sampler[list[int]]:
        """Batches of an even size, which are mixed in pairs."""
        if batch_size % 2:
            raise RecipeError(
                f"--batch-size: expected an even number for each process, found {batch_size}."
            )
        return super().training_batches(data, sampler, batch_size)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy with the labels of images mixed by mixup or CutMix, and smoothed."""
        mix = Mixup(  # type: ignore[no-untyped-call]
            mixup_alpha=0.8,
            cutmix_alpha=1.0,
            label_smoothing=self.label_smoothing,
            num_classes=self.classes,
        )
        images, labels = mix(*batch)
        return F.cross_entropy(model(images), labels)

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
        """AdamW; biases, norms and embeddings do not decay."""
        still = ("pos_embed", "cls_token")
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=still)
        return AdamW(groups, lr)
