"""Models of torchvision go through prepare, training and finalize, and stay what they were."""

import pytest
import torch
import torchvision
from test_api import randomise_batch_norms
from torch import nn

import spre_fx

MODELS = {
    "resnet18": ({}, 64),
    "resnet50": ({}, 64),
    "vgg16_bn": ({}, 32),
    "mobilenet_v2": ({}, 64),
    "inception_v3": ({"init_weights": False}, 75),
    "densenet121": ({}, 64),
}


@pytest.mark.parametrize("name", MODELS)
def test_prepare_train_finalize(name):
    options, size = MODELS[name]
    model = torchvision.models.get_model(name, weights=None, num_classes=8, **options)
    if name == "inception_v3":  # its auxiliary classifier needs larger images than a quick test
        model.AuxLogits.conv1 = torchvision.ops.Conv2dNormActivation(128, 768, 1)
    prepared = spre_fx.prepare(randomise_batch_norms(model), "1:8")
    images = torch.randn(2, 3, size, size)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-3)
    for _ in range(2):
        outputs = prepared(images)
        first, *others = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = first.square().mean() + sum(other.square().mean() for other in others)
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
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deployed.modules()) or name in (
        "densenet121",
    )


def test_inception_in_training_returns_what_it_returned_before():
    model = torchvision.models.inception_v3(num_classes=8, init_weights=False)
    prepared = spre_fx.prepare(model, "2:4")
    images = torch.randn(2, 3, 299, 299)
    training = prepared(images)
    assert type(training).__name__ == "InceptionOutputs"
    with torch.no_grad():
        evaluation = prepared.eval()(images)
        deployed = spre_fx.finalize(prepared)
        torch.testing.assert_close(deployed(images), evaluation, rtol=1e-4, atol=1e-5)
    assert not any("AuxLogits" in site.name for site in spre_fx.sites(deployed))
