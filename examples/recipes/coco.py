"""Detection and instance segmentation on COCO."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import Dataset
from torchvision.transforms import v2

from recipes import checkpoints, coco_detectors, distributed
from recipes.coco_data import AspectRatioBatches, CocoImages, Split, splits
from recipes.coco_evaluation import average_precision, detections
from recipes.errors import RecipeError
from recipes.logs import say
from recipes.recipe import Batch, EpochSampler, Recipe
from recipes.schedules import warmup_steps


@dataclass(frozen=True, kw_only=True)
class Coco(Recipe):
    """Sec. 4.3 of Zhang et al., 2306.05612v3, with MMDetection's "1x" schedule.

    The paper names MMDetection and "a training pipeline aligned with SR-STE", and no numbers. Its
    dense baselines are MMDetection's models of the 1x schedule (37.4; 38.2 and 34.7), so this has
    the numbers of schedule_1x.py, faster-rcnn_r50_fpn.py and mask-rcnn_r50_fpn.py there. Which
    layers are sparse is said nowhere, and the detection folder of SR-STE's code
    (aojunzz/NM-sparsity) is empty: here it is the ResNet, pre-trained at the same pattern, and FPN,
    RPN and heads stay dense, unless `exclude` has other names. The detectors are torchvision's,
    which differ from MMDetection's in the loss of boxes (smooth L1 for L1) and in RoIAlign's
    sampling.

    Attributes:
        detector: "fasterrcnn" or "maskrcnn".
        depth: Layers of the ResNet.
        min_size: Pixels that an image's shorter side is resized to.
        max_size: Pixels that its longer side may then have at most.
        backbone: A classifier's checkpoint, whose ResNet the training starts from.
        pretrained_detector: Whether it starts from a whole dense detector instead.
    """

    epochs: int = 12
    batch_size: int = 16
    lr: float = 0.02
    weight_decay: float = 1e-4
    metric: str = "box AP"
    exclude: tuple[str, ...] = coco_detectors.ALL_BUT_RESNET
    detector: str
    depth: int = 50
    min_size: int = 800
    max_size: int = 1333
    backbone: Path | None = None
    pretrained_detector: bool = False

    def model(self) -> coco_detectors.Detector:
        """Fresh; `prepared` loads the backbone, which may be N:M sparse.

        Raises:
            RecipeError: If it is to start from two checkpoints.
        """
        if self.backbone is not None and self.pretrained_detector:
            raise RecipeError(
                f"--backbone {self.backbone}: expected no --pretrained with it, since a detector "
                "has a backbone of its own, found both. Leave one out."
            )
        classes = len(self._training.categories)
        return coco_detectors.build(
            self.detector, self.depth, classes, self.min_size, self.max_size
        )

    def prepared(self, model: nn.Module) -> None:
        """Start from the backbone's weights."""
        assert isinstance(model, coco_detectors.Detector)
        if self.backbone is not None:
            coco_detectors.start_from(model, checkpoints.weights(self.backbone), self.backbone)
        elif self.pretrained_detector:
            coco_detectors.freeze(model, coco_detectors.STEM)
            coco_detectors.hold_statistics(model, branches=False)

    def training_data(self) -> CocoImages:
        """The images with objects, half of the time mirrored."""
        return self._training

    def evaluation_data(self) -> CocoImages:
        """All images of the validation set."""
        return self._evaluation

    @cached_property
    def _splits(self) -> tuple[Split, Split]:
        return splits(self.root)

    @cached_property
    def _training(self) -> CocoImages:
        mirror = v2.RandomHorizontalFlip(0.5)
        data = CocoImages(self._splits[0], masks=self._masks, transform=mirror)
        listed = len(data)
        data.keep_those_with_objects()
        say(f"{listed - len(data)} of {listed} training images have no objects: left out")
        return data

    @cached_property
    def _evaluation(self) -> CocoImages:
        data = CocoImages(self._splits[1])
        if self._masks:
            data.require("segmentation")
        if data.categories != self._training.categories:
            raise RecipeError(
                f"--data {self.root}: expected the same categories to train and to evaluate on, "
                f"found ids {self._training.categories} and {data.categories}."
            )
        return data

    @property
    def _masks(self) -> bool:
        return self.detector == "maskrcnn"

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The detector's own: of proposals, classes, boxes and masks."""
        images, targets = batch
        losses: dict[str, Tensor] = model([_scaled(image) for image in images], targets)
        return losses

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """COCO's average precision in percent, of boxes and of masks.

        Images are seen one by one: in a batch they are padded to one size, and what is found in
        one depends a little on the others.
        """
        data = self._evaluation
        found: list[dict[str, Any]] = []
        for images, targets in batches:
            for image, target in zip(images, targets, strict=True):
                (output,) = model([_scaled(image)])
                found += detections(target["image_id"], output, data.categories)
        everything = [each for part in distributed.gather(found) for each in part]
        kinds = ("box", "mask") if self._masks else ("box",)
        precision = average_precision(data.truth, everything, kinds)
        return {name: 100 * value for name, value in precision.items()}

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
        """SGD with momentum 0.9; all that is trained decays, as in MMDetection."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return SGD(trained, lr, momentum=0.9, weight_decay=weight_decay)

    def lr_factor(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """500 steps of warm-up; a tenth from 8 of 12 epochs on, and again from 11."""
        milestones = [round(epochs * done / 12) * steps_per_epoch for done in (8, 11)]
        return warmup_steps(step, 500, milestones, start=0.001)

    def collate(self, samples: list[tuple[Tensor, Any]]) -> tuple[list[Tensor], list[Any]]:
        """Lists, since images differ in size."""
        return [image for image, _ in samples], [target for _, target in samples]

    def training_batches(
        self, data: Dataset[Any], sampler: EpochSampler, batch_size: int
    ) -> AspectRatioBatches:
        """Wide images together, and high ones, as in MMDetection."""
        assert isinstance(data, CocoImages)
        return AspectRatioBatches(sampler, data.landscape(), batch_size)


def _scaled(image: Tensor) -> Tensor:
    """Bytes as 0 to 1; the detector standardises and resizes them."""
    return image / 255
