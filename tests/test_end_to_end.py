"""Models of torchvision go through prepare, training and finalize, and stay what they were."""

import pytest
import torch
import torchvision
from test_api import randomise_batch_norms
from torch import nn

import spre_fx

MODELS = {
    "resnet18": ({}, 32),
    "resnet50": ({}, 32),
    "vgg16_bn": ({}, 32),
    "mobilenet_v2": ({}, 32),
    "inception_v3": ({"init_weights": False}, 299),  # its auxiliary classifier takes no less
    "densenet121": ({}, 32),
}


@pytest.mark.parametrize("name", MODELS)
def test_prepare_train_finalize(name):
    options, size = MODELS[name]
    model = torchvision.models.get_model(name, weights=None, num_classes=8, **options)
    prepared = spre_fx.prepare(randomise_batch_norms(model), "1:8")
    images = torch.randn(2, 3, size, size)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-3)
    for _ in range(2):
        outputs = prepared(images)
        assert isinstance(outputs, tuple) == (name == "inception_v3")
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum(output.square().mean() for output in several)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    deployed = spre_fx.finalize(prepared)
    with torch.no_grad():
        expected = prepared.eval()(images)
        outputs = deployed(images)
    assert isinstance(outputs, torch.Tensor)
    difference = (outputs - expected).abs().max() / expected.abs().max()
    assert difference < 1e-4
    left = [name for name, m in deployed.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert bool(left) == (name == "densenet121")  # where a batch norm comes before its conv
    assert not any("AuxLogits" in site.name for site in spre_fx.sites(deployed))
