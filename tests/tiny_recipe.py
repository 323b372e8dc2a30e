"""A recipe that trains within a second; a script too, if examples/ is on its path."""

from dataclasses import dataclass

from cifar10 import ResNet32
from torch import nn

from recipes import options, training


@dataclass(frozen=True, kw_only=True)
class Tiny(ResNet32):
    """Two convs, of which one can be sparse, on CIFAR-10."""

    warmup_epochs: int = 0

    def model(self) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(3, 8, 3, stride=4, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
        )


def main() -> None:
    """Read the command line and train."""
    found = options.parser(__doc__).parse_args()
    training.main(Tiny(root=found.data), found)


if __name__ == "__main__":
    main()
