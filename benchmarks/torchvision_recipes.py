"""How to build each model of torchvision, without weights to download, and what it is trained on.

Inputs are the smallest that a model takes in training, two of a batch. Values are float64, or
float32 for models whose training would not fit into a few GiB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models import get_model_builder
from torchvision.ops import FrozenBatchNorm2d

FLOAT64_PARAMETERS = 150e6  # more take float32: weights, gradients and masked weights, 8 bytes each

# What torchvision builds with frozen batch norms, once there are weights to freeze them at.
_FROZEN = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fcos_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
)


@dataclass(frozen=True)
class Recipe:
    """How a model is built and fed.

    Attributes:
        options: Of its builder.
        shape: Of one input, without the batch.
        size: Of the batch.
        remark: Where the model or its input is not the usual one.
    """

    options: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = (3, 64, 64)
    size: int = 2
    remark: str = ""


@dataclass(frozen=True)
class Batch:
    """Arguments of the model in training and in evaluation.

    Attributes:
        training: Positional arguments.
        evaluation: Positional arguments.
    """

    training: tuple[Any, ...]
    evaluation: tuple[Any, ...]


def family(name: str) -> str:
    """What the model is for, by where torchvision keeps it."""
    parts = get_model_builder(name).__module__.split(".")[2:-1]
    names = {"optical_flow": "optical flow", "quantization": "quantised"}
    return names.get(parts[0], parts[0]) if parts else "classification"


def recipe(name: str) -> Recipe:
    """The recipe of the model called `name`."""
    kind = family(name)
    if kind == "detection":
        return _detection(name)
    special = {
        "inception_v3": Recipe({"init_weights": False}, (3, 299, 299)),
        "googlenet": Recipe({"init_weights": False}),
        "quantized_inception_v3": Recipe({"init_weights": False}, (3, 299, 299)),
        "quantized_googlenet": Recipe({"init_weights": False}),
        "s3d": Recipe(shape=(3, 16, 224, 224)),
        "vit_h_14": Recipe({"image_size": 56}, (3, 56, 56), remark="images of 56"),
    }
    if name in special:
        return special[name]
    for start, found in (
        ("vit_", Recipe({"image_size": 96}, (3, 96, 96), remark="images of 96")),
        ("maxvit", Recipe(shape=(3, 224, 224))),
        ("mvit", Recipe(shape=(3, 16, 224, 224), size=1, remark="a single clip")),
    ):
        if name.startswith(start):
            return found
    if kind == "optical flow":
        return Recipe(shape=(3, 128, 128), remark="its coordinates are float32")
    return Recipe(shape=(3, 8, 64, 64) if kind == "video" else (3, 64, 64))


def _detection(name: str) -> Recipe:
    """Every box counts, however unlikely: random weights would leave nothing to compare."""
    if "rcnn" in name:
        options: dict[str, Any] = {"box_score_thresh": 0.0, "rpn_score_thresh": 0.0}
        options |= {"box_detections_per_img": 20, "box_batch_size_per_image": 32}
    else:
        options = {"score_thresh": 0.0}
    if not name.startswith("ssd"):
        options |= {"min_size": 128, "max_size": 128}
    frozen = "frozen batch norms in the backbone" if name in _FROZEN else ""
    return Recipe(options, (3, 128, 128), remark=frozen)


def build(name: str) -> nn.Module:
    """The model, randomly initialised, in the type its size allows."""
    builder = get_model_builder(name)
    backbone = {"weights_backbone": None} if family(name) in ("detection", "segmentation") else {}
    model: nn.Module = builder(weights=None, **backbone, **recipe(name).options)
    if name in _FROZEN:
        _freeze(model.get_submodule("backbone"))
    count = sum(parameter.numel() for parameter in model.parameters())
    # RAFT makes its coordinates in float32, whatever its weights are.
    small = count <= FLOAT64_PARAMETERS and family(name) != "optical flow"
    return randomise(model.to(torch.float64 if small else torch.float32))


def _freeze(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(child.num_features, child.eps)
                setattr(parent, name, frozen.to(child.running_mean))


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Draw what new models have as zeros and ones: it would hide a wrong fold."""
    for module in model.modules():
        tensors = {**module._parameters, **module._buffers}
        mean, var, weight, bias = map(
            tensors.get, ("running_mean", "running_var", "weight", "bias")
        )
        if mean is not None and var is not None:
            mean.uniform_(-0.5, 0.5)
            var.uniform_(0.5, 2)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 0.5  # two steps near to what is there, lest deep nets overflow
        if "Norm" in type(module).__name__ and weight is not None and bias is not None:
            weight.uniform_(0.5, 1.5).mul_(torch.randn_like(weight).sign())
            bias.uniform_(-0.5, 0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):
            parameter.uniform_(0.5, 1.5)
        elif parameter.dim() > 1 and not parameter.any():  # the head of a ViT starts at zero
            parameter.normal_(std=0.05)
    return model


def batch(name: str, dtype: torch.dtype) -> Batch:
    """Two random inputs, with targets where the model computes its own loss."""
    shape = recipe(name).shape
    if family(name) == "detection":
        images = [torch.rand(shape, dtype=dtype) for _ in range(2)]
        return Batch((images, [_target(shape[-1], dtype) for _ in images]), (images,))
    if family(name) == "optical flow":
        pair = tuple(torch.rand(2, *shape, dtype=dtype) * 2 - 1 for _ in range(2))
        return Batch(pair, pair)
    x = torch.randn(recipe(name).size, *shape, dtype=dtype)
    return Batch((x,), (x,))


def _target(size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Two objects of class 1, with what any of the detectors wants to know of them."""
    corners = torch.tensor([[0.1, 0.1, 0.6, 0.5], [0.3, 0.4, 0.9, 0.95]], dtype=dtype) * size
    masks = torch.zeros(2, size, size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, corners.long().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    places = torch.rand(2, 17, 2, dtype=dtype) * (corners[:, None, 2:] - corners[:, None, :2])
    seen = torch.ones(2, 17, 1, dtype=dtype)
    keypoints = torch.cat([places + corners[:, None, :2], seen], 2).float()  # nothing else will do
    labels = torch.ones(2, dtype=torch.int64)
    return {"boxes": corners, "labels": labels, "masks": masks, "keypoints": keypoints}


def loss(name: str, outputs: Any) -> Tensor:
    """A detector's own loss; of any other model, how far its outputs are from random ones."""
    values = [y for y in tree_leaves(outputs) if isinstance(y, Tensor) and y.requires_grad]
    if family(name) == "detection":
        return torch.stack(values).sum()
    return torch.stack([(y - torch.randn_like(y)).square().mean() for y in values]).sum()


def features(model: nn.Module, run: Callable[[], Any]) -> list[Tensor]:
    """All tensors that come out of `run`, and of the model's backbone while it runs."""
    found: list[Any] = []
    backbone = dict(model.named_children()).get("backbone")
    hooks = (
        []
        if backbone is None
        else [backbone.register_forward_hook(lambda *hook: found.append(hook[2]))]
    )
    try:
        found.append(run())
    finally:
        for hook in hooks:
            hook.remove()
    return [y for y in tree_leaves(found) if isinstance(y, Tensor)]
