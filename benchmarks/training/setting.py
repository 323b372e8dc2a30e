"""What is measured: a network, its input, and how it is run."""

from __future__ import annotations

from dataclasses import dataclass

from spre_fx import Pattern

# Network -> images in a batch, and their height and width: what the targets are set for.
SIZES = {"resnet18": (32, 128), "resnet50": (16, 160)}
PATTERNS = ("2:4", "1:4", "1:8", "1:16")
MODES = ("eager", "compile")
DTYPES = ("float32", "bfloat16")  # bfloat16: autocast, as on weights of float32


@dataclass(frozen=True)
class Setting:
    """The conditions under which all contenders are compared.

    Attributes:
        model: A network of torchvision.
        batch: Images.
        pixels: Height and width of an image.
        pattern: "N:M".
        mode: "eager" or "compile".
        threads: Of the process.
        device: "cpu" or "cuda".
        dtype: "float32", or "bfloat16" for autocast.
        channels_last: Whether images and weights lie in memory that way.

    Raises:
        PatternError: If the pattern is not one.
        ValueError: If another field has none of its values.
    """

    model: str
    batch: int
    pixels: int
    pattern: str = "2:4"
    mode: str = "eager"
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    channels_last: bool = False

    def __post_init__(self) -> None:
        Pattern.parse(self.pattern)
        for name, allowed in (("mode", MODES), ("device", ("cpu", "cuda")), ("dtype", DTYPES)):
            if (found := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}={found!r}: expected one of {allowed}.")

    @property
    def has_targets(self) -> bool:
        """Whether the targets are meant for it."""
        return SIZES.get(self.model) == (self.batch, self.pixels)

    @property
    def network(self) -> str:
        """The network and its input, on one line."""
        layout = ", channels_last" if self.channels_last else ""
        return (
            f"{self.model}, batch {self.batch}, {self.pixels} px, {self.device}, {self.dtype}"
            f"{layout}"
        )

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        return f"{self.network}, {threads}, {self.mode}, {self.pattern}"
