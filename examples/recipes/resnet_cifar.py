"""ResNets for 32x32 pixels: Sec. 4.2 of He et al., 1512.03385."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ResNetCIFAR(nn.Module):
    """A stem and three stages of basic blocks, on 32, 16 and 8 pixels.

    The code of SpRe (zyxxmu/SpRE, models/resnet_cifar.py) has no padding at the stem, and no ReLU
    between the convs of a block; here both are as He et al. have them.

    Args:
        depth: Layers with weights, 6n + 2 for n blocks a stage.
        width: Channels of the first stage; each next one has twice as many.
        classes: Of the classifier.
    """

    def __init__(self, depth: int, width: int, classes: int = 10) -> None:
        super().__init__()
        if (depth - 2) % 6:
            raise ValueError(f"depth={depth}: expected 6n + 2.")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.fc = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """`(N, 3, 32, 32)` -> logits `(N, classes)`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def _stage(before: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(before, width, stride)
    return nn.Sequential(first, *(Block(width, width, 1) for _ in range(blocks - 1)))


class Block(nn.Module):
    """Two 3x3 convs around a shortcut without weights: option A, zeros for new channels."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.added = width - before

    def forward(self, x: Tensor) -> Tensor:
        """`(N, before, H, W)` -> `(N, width, H / stride, W / stride)`."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.added:
            half = self.added // 2
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, half, self.added - half))
        return F.relu(out + x)
