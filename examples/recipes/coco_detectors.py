"""Faster and Mask R-CNN on a ResNet with FPN, and the weights that their backbone starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from recipes.errors import RecipeError

ALL_BUT_RESNET = ("backbone.fpn", "rpn", "roi_heads")
STEM = ("conv1", "bn1")
_RESNET = "backbone.body"
_SCHEDULE = "mask_schedule."


class Detector(nn.Module):
    """A detector some of whose batch norms stay in evaluation mode.

    Attributes:
        held: Their names. They keep the running statistics that they were loaded with, which the
            few images of a detector's batch would spoil; scale and shift are trained.
    """

    held: tuple[str, ...] = ()

    def train(self, mode: bool = True) -> Detector:
        """Change the mode of all but the batch norms that are held."""
        super().train(mode)
        for name, module in self.named_modules():  # a deployed detector has none of them
            if name in self.held:
                module.eval()
        return self


class FasterRCNN(Detector, detection.FasterRCNN):  # type: ignore[misc]
    """torchvision's Faster R-CNN, with batch norms that can be held."""


class MaskRCNN(Detector, detection.MaskRCNN):  # type: ignore[misc]
    """torchvision's Mask R-CNN, with batch norms that can be held."""


MODELS = {"fasterrcnn": FasterRCNN, "maskrcnn": MaskRCNN}


def build(name: str, depth: int, classes: int, min_size: int, max_size: int) -> Detector:
    """A detector with fresh weights, all of them trainable.

    Args:
        name: A key of `MODELS`.
        depth: Layers of the ResNet.
        classes: Categories of objects.
        min_size: Pixels that an image's shorter side is resized to.
        max_size: Pixels that its longer side may then have at most.
    """
    backbone = resnet_fpn_backbone(
        backbone_name=f"resnet{depth}",
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=5,
    )
    return MODELS[name](
        backbone,
        num_classes=1 + classes,
        min_size=min_size,
        max_size=max_size,
        rpn_post_nms_top_n_train=1000,  # as MMDetection; torchvision's default is twice that
    )


def start_from(model: Detector, weights: Mapping[str, Any], source: object) -> None:
    """Load a classifier's ResNet into a detector, prepared or dense, and train it as MMDetection.

    Its batch norms keep their statistics. Its stem is not trained, nor is its first stage, unless
    that is dense and has to become N:M sparse. Of dense weights the SpRe branches start with
    gamma = 0, as spre_fx has it where it knows that weights are pre-trained.

    Args:
        model: The detector.
        weights: The classifier's `state_dict`.
        source: Where it is from, for the error.

    Raises:
        RecipeError: If it does not fit.
    """
    body = model.get_submodule(_RESNET)
    was_sparse, is_sparse = is_prepared(weights), is_prepared(body.state_dict())
    if was_sparse and not is_sparse:
        raise RecipeError(
            f"--backbone {source}: expected dense weights for a dense backbone, found N:M sparse "
            "ones. Train with the method and the pattern that they were trained with."
        )
    _load(body, weights, source)
    schedule = {name: value for name, value in weights.items() if name.startswith(_SCHEDULE)}
    model.load_state_dict(schedule, strict=False)  # masks that are kept go on from where they are
    freeze(model, (*STEM, "layer1") if was_sparse == is_sparse else STEM)
    if not was_sparse:
        for name, module in body.named_modules():
            if name.endswith("_spre") and isinstance(module, nn.BatchNorm2d):
                nn.init.zeros_(module.weight)
    hold_statistics(model, branches=was_sparse)


def is_prepared(weights: Mapping[str, Any]) -> bool:
    """Whether a `state_dict` is of a model that `spre_fx.prepare` returned."""
    facts = getattr(weights, "_metadata", {})
    return any("spre_fx" in fact for fact in facts.values())


def _load(body: nn.Module, weights: Mapping[str, Any], source: object) -> None:
    expected = f"--backbone {source}: expected weights of this ResNet, found others"
    try:
        missing, unexpected = body.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise RecipeError(f"{expected}. {error}") from error
    if not is_prepared(weights):  # they have no SpRe branches and no masks
        missing = [name for name in missing if "_spre." not in name and ".nm_mask." not in name]
    # What belongs to a classifier as a whole, and not to its backbone.
    unexpected = [name for name in unexpected if not name.startswith(("fc.", _SCHEDULE))]
    differing = [f"no {name}" for name in missing] + unexpected
    if differing:
        raise RecipeError(
            f"{expected}: {', '.join(differing[:3])}{', ...' if len(differing) > 3 else ''} "
            f"({len(missing)} missing, {len(unexpected)} unexpected). Take the --depth, the "
            "--pattern and the --branch that they were trained with."
        )


def freeze(model: Detector, children: tuple[str, ...]) -> None:
    """Train no parameter of these children of the ResNet."""
    for name in children:
        model.get_submodule(f"{_RESNET}.{name}").requires_grad_(False)


def hold_statistics(model: Detector, *, branches: bool) -> None:
    """Let the backbone's batch norms keep their statistics; those of SpRe branches if asked."""
    model.held = tuple(
        f"{_RESNET}.{name}"
        for name, module in model.get_submodule(_RESNET).named_modules()
        if isinstance(module, nn.BatchNorm2d) and (branches or not name.endswith("_spre"))
    )
    model.train(model.training)
