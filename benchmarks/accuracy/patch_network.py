"""The network that is trained: a small ResNet for 16x16 grey patches."""

from __future__ import annotations

from torch import nn
from torchvision.models.resnet import BasicBlock

WIDTHS = (16, 32)


def resnet(classes: int = 20, blocks: int = 1) -> nn.Sequential:
    """A stem of stride 2, then `blocks` residual blocks per width, on 8x8 and 4x4 pixels."""
    model = nn.Sequential()
    model.conv1 = nn.Conv2d(1, WIDTHS[0], 3, stride=2, padding=1, bias=False)
    model.bn1 = nn.BatchNorm2d(WIDTHS[0])
    model.relu = nn.ReLU()
    before = WIDTHS[0]
    for stage, width in enumerate(WIDTHS, 1):
        for block in range(blocks):
            stride = 1 if before == width else 2
            model.add_module(f"layer{stage}_{block}", _block(before, width, stride))
            before = width
    model.pool = nn.AdaptiveAvgPool2d(1)
    model.flatten = nn.Flatten()
    model.fc = nn.Linear(before, classes)
    return model


def _block(before: int, width: int, stride: int) -> BasicBlock:
    if stride == 1:
        return BasicBlock(before, width)
    conv = nn.Conv2d(before, width, 1, stride, bias=False)
    return BasicBlock(before, width, stride, nn.Sequential(conv, nn.BatchNorm2d(width)))
