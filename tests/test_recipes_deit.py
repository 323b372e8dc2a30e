"""DeiT-small as it is trained: what decays, what is mixed, what an epoch sees."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from recipes_data import write_imagenet
from test_recipes import check_output
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import spre_fx
from recipes import options, training
from recipes.deit import DeiT, DeiTSmall
from recipes.errors import RecipeError
from recipes.options import Options


@pytest.fixture(name="recipe", scope="module")
def _recipe(tmp_path_factory) -> DeiT:
    return DeiT(root=write_imagenet(tmp_path_factory.mktemp("data"), train=4), image_size=32)


def test_weights_of_layers_decay_and_nothing_else(recipe):
    model = spre_fx.prepare(recipe.model(), "2:4", exclude=recipe.exclude)
    optimizer = recipe.optimizer(model, lr=1e-3, weight_decay=0.05)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay = {
        names[parameter]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert decay.keys() == set(names.values())
    weights = {
        f"{name}.weight"
        for name, module in DeiTSmall(32, 3).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    assert {name for name, value in decay.items() if value} == weights
    assert set(decay.values()) == {0.0, 0.05}


class Seen(nn.Module):
    """Answers with logits of 0, and keeps what it was given."""

    def forward(self, images: Tensor) -> Tensor:
        self.images = images.clone()
        return torch.zeros(len(images), 3)


def test_images_are_mixed_in_pairs(recipe):
    np.random.seed(0)  # what timm draws from
    model, images = Seen(), torch.arange(8.0)[:, None, None, None].expand(8, 3, 32, 32)
    loss = recipe.loss(model, (images.clone(), torch.arange(8) % 3))
    assert float(loss) == pytest.approx(torch.log(torch.tensor(3.0)))  # labels still sum to 1
    values = [set(image.unique().tolist()) for image in model.images]
    own = [len(found) == 1 and float(number) in found for number, found in enumerate(values)]
    assert not all(own)
    for number, found in enumerate(values):
        assert all(min(number, 7 - number) <= v <= max(number, 7 - number) for v in found)


def test_an_epoch_sees_a_third_of_the_images_three_times(recipe):
    data = recipe.training_data()
    sampler = recipe.training_sampler(data, seed=0)
    seen = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        seen.append(Counter(sampler))
    assert all(set(counts.values()) == {3} and len(counts) == 4 for counts in seen)
    assert seen[0] != seen[1]
    image, label = data[0]
    assert image.shape == (3, 32, 32)
    assert label == 0


class OneBlock(DeiTSmall):
    """A network of the same kind that trains within a second."""

    def __init__(self) -> None:
        VisionTransformer.__init__(
            self, img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=2, num_classes=3
        )


@dataclass(frozen=True, kw_only=True)
class Short(DeiT):
    def model(self) -> OneBlock:
        return OneBlock()


def test_it_is_trained_finalized_and_evaluated(recipe, tmp_path):
    words = ["--data", str(recipe.root), "--output", str(tmp_path), "--device", "cpu"]
    words += ["--workers", "0", "--epochs", "1", "--batch-size", "4", "--pattern", "2:4"]
    short = Short(root=recipe.root, image_size=32)
    training.run(short, Options.of(options.parser("").parse_args(words), short))
    deployed, _ = check_output(tmp_path, epochs=1)
    patterns = {site.name: site.pattern for site in spre_fx.sites(deployed)}
    assert patterns["blocks.0.mlp.fc1"] == "2:4"
    assert patterns["head"] is None


def test_an_odd_batch_is_refused(recipe):
    data = recipe.training_data()
    with pytest.raises(RecipeError) as refusal:
        recipe.training_batches(data, recipe.training_sampler(data, 0), 3)
    assert str(refusal.value) == (
        "--batch-size: expected an even number for each process, found 3."
    )
