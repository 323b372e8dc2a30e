"""One of two processes that evaluate together, on gloo.

    python coco_ranks.py RANK DIRECTORY

Writes the metrics to DIRECTORY/RANK.json. DIRECTORY/coco holds the data.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torchvision.ops import masks_to_boxes

from recipes import options
from recipes.coco import Coco
from recipes.evaluation import evaluate
from recipes.loaders import evaluation_loader


class ColourDetector(nn.Module):
    """Finds the red square and the lime triangle of `tiny_coco` by their colours."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [self._find(image) for image in images]

    def _find(self, image: Tensor) -> dict[str, Tensor]:
        red, green, _ = image
        masks = torch.stack([red - green > 0.5, green - red > 0.5])
        seen = masks.flatten(1).any(1)
        masks = masks[seen]
        return {
            "boxes": masks_to_boxes(masks) + torch.tensor([0.0, 0, 1, 1]),
            "labels": torch.tensor([1, 2])[seen],
            "scores": torch.tensor([0.9, 0.8])[seen],
            "masks": masks[:, None].float(),
        }


def measure(directory: Path, model: nn.Module | None = None) -> dict[str, float]:
    """Metrics, of boxes and masks, on all validation images; of the colour detector if of none."""
    root = directory / "coco"
    command = ["--data", str(root), "--output", str(directory), "--workers", "0"]
    ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    found = options.parser(None).parse_args([*command, "--batch-size", str(2 * ranks)])
    recipe = Coco(root=root, detector="maskrcnn")
    asked = options.Options.of(found, recipe)
    batches = evaluation_loader(recipe, asked, torch.device("cpu"))
    return evaluate(model or ColourDetector(), recipe, batches)


def main(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        timeout=timedelta(seconds=300),
        init_method=f"file://{directory}/meeting",
        rank=rank,
        world_size=2,
    )
    (directory / f"{rank}.json").write_text(json.dumps(measure(directory)))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
