"""Models of torchvision go through prepare, training and finalize, and stay what they were."""

from functools import partial

import pytest
import torch
import torchvision
from test_api import randomise_batch_norms
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops import Conv2dNormActivation

import spre_fx
from spre_fx import masks

MODELS = {
    "resnet18": ({}, 32),
    "resnet50": ({}, 32),
    "vgg16_bn": ({}, 32),
    "mobilenet_v2": ({}, 32),
    "inception_v3": ({"init_weights": False}, 299),  # its auxiliary classifier takes no less
    "densenet121": ({}, 32),
}


# A hundred million weights in one linear layer; images of 299 pixels.
HEAVY = ("resnet50", "vgg16_bn", "inception_v3", "densenet121")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in HEAVY)) for n in MODELS]
)
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


def mobilenet_v1() -> nn.Sequential:
    """Depthwise and pointwise convs in turn (Howard et al., 2017), small."""
    depthwise = partial(Conv2dNormActivation, kernel_size=3)
    return nn.Sequential(
        Conv2dNormActivation(3, 8, 3, stride=2),
        *(depthwise(8, 8, groups=8), Conv2dNormActivation(8, 16, 1)),
        *(depthwise(16, 16, groups=16, stride=2), Conv2dNormActivation(16, 10, 1)),
        depthwise(10, 20, groups=10),  # 180 weights, no multiple of 8 nor 16
    )


def mobilenet_v2() -> nn.Sequential:
    return nn.Sequential(
        Conv2dNormActivation(3, 8, 3, stride=2),
        InvertedResidual(8, 8, stride=1, expand_ratio=2),
        InvertedResidual(8, 12, stride=2, expand_ratio=3),
        nn.Conv2d(12, 12, 3, padding=1, groups=3),
        nn.BatchNorm2d(12),
    )


@pytest.mark.parametrize("build", [mobilenet_v1, mobilenet_v2])
@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "2:4"},
        {"pattern": "1:8", "method": "asp", "spre_gamma": 1.0},
        {"pattern": "1:16", "branch": "inverse"},
        {"pattern": "1:4", "method": "lbc", "schedule": spre_fx.CubicRamp(1, 3)},
        {"pattern": "1:4", "criterion": "taylor", "schedule": spre_fx.EveryK(2)},
        {"pattern": "1:4", "method": spre_fx.ASP(spre_fx.ChannelPermutation(progress=False))},
    ],
)
def test_depthwise_convs_with_flat_groups(build, options):
    model = randomise_batch_norms(build()).double()
    prepared = spre_fx.prepare(model, **options, depthwise="flat")
    sites = {site.name: site for site in spre_fx.sites(prepared)}
    depthwise = [n for n, m in model.named_modules() if getattr(m, "groups", 1) > 3]
    assert {sites[name].pattern for name in depthwise} == {f"{options['pattern']} flat"}
    assert {sites[name].state for name in depthwise} == {spre_fx.State.SPRE}
    others = {site.pattern for name, site in sites.items() if name not in depthwise}
    assert others <= {None, options["pattern"]}

    images = torch.randn(2, 3, 24, 24).double()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    for _ in range(3):
        if "criterion" in options:
            spre_fx.update_taps(prepared, lambda: prepared(images).square().mean())
        optimizer.zero_grad()
        prepared(images).square().mean().backward()
        optimizer.step()
    deployed = spre_fx.finalize(prepared)
    with torch.no_grad():
        expected, found = prepared.eval()(images), deployed(images)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()

    why = "straddle filters, which no sparse op can take"
    for name in depthwise:
        pattern = spre_fx.Pattern.parse(f"{options['pattern']} flat")
        assert masks.obeys(deployed.get_submodule(name).weight, pattern)
        site = next(site for site in spre_fx.sites(deployed) if site.name == name)
        assert (site.state, site.backend) == (spre_fx.State.DEPLOYED, None)
        assert site.note.startswith(f"not lowered: groups of {pattern} {why}")


def test_depthwise_convs_stay_dense_unless_asked_for():
    sites = {site.name: site for site in spre_fx.sites(spre_fx.prepare(mobilenet_v1(), "1:4"))}
    assert sites["1.0"].note == "1.0: depthwise, groups=8 equals C_in=8"
    with pytest.raises(spre_fx.OptionError, match="depthwise='yes': expected None or 'flat'"):
        spre_fx.prepare(mobilenet_v1(), "1:4", depthwise="yes")


def test_an_unstructured_method_prunes_depthwise_convs_if_asked():
    options = {"method": "gmp", "schedule": spre_fx.CubicRamp(0, 2), "depthwise": "flat"}
    prepared = spre_fx.prepare(mobilenet_v1(), "1:4", **options)
    site = next(site for site in spre_fx.sites(prepared) if site.name == "1.0")
    assert (site.state, site.pattern) == (spre_fx.State.UNSTRUCTURED, None)
