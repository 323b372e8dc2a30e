"""Models of Hugging Face's transformers, tiny and with random weights: prepared to deployed."""

from collections import Counter
from typing import Any

import pytest
import torch
from models import randomise
from torch import nn

import spre_fx
from spre_fx import State

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (an optional test extra)"
)

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
    "RegNet": (
        "RegNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8},
    ),
    "ConvNeXT": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    ),
    "ViT": (
        "ViTForImageClassification",
        {
            **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"intermediate_size": 32, "image_size": 32, "patch_size": 8},
        },
    ),
    "MobileNetV2": (
        "MobileNetV2ForImageClassification",
        {"depth_multiplier": 0.25, "image_size": 32},
    ),
}
# What is N:M with a SpRe branch, N:M, and dense.
SPARSE = {
    "ResNet": (4, 2, 1),
    "RegNet": (2, 9, 3),
    "ConvNeXT": (0, 6, 3),
    "ViT": (0, 13, 1),
    "MobileNetV2": (0, 35, 18),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind, options = TINY[name]
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**options, num_labels=5))
    return randomise(model).double()


@pytest.mark.parametrize("name", TINY)
def test_a_model_is_prepared_trained_and_finalized(name: str) -> None:
    model = build(name)
    gm = spre_fx.prepare(model, "1:4")
    assert gm.state_dict().keys() >= model.state_dict().keys()
    optimizer = torch.optim.SGD(gm.train().parameters(), 1e-3)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for _ in range(2):
        optimizer.zero_grad()
        output = gm(pixel_values=images, labels=torch.tensor([0, 1]))
        output.loss.backward()
        optimizer.step()
    deployed = spre_fx.finalize(gm)
    with torch.no_grad():
        ours, theirs = (each(pixel_values=images).logits for each in (deployed, gm.eval()))
    assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()
    states = Counter(site.state for site in spre_fx.sites(gm))
    assert tuple(states[s] for s in (State.SPRE, State.NM, State.SKIPPED)) == SPARSE[name]
