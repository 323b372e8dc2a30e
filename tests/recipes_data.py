"""Data sets of a few images, in the formats that the real ones are distributed in."""

import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"

CLASSES = ("n01440764", "n01443537", "n02979186")


class _Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 did, which wrote CIFAR-10."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_string(self, text: str | bytes) -> None:
        data = text if isinstance(text, bytes) else text.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string


def write_batch(path: Path, data: np.ndarray, labels: list[int], label: str = "") -> None:
    """A file of CIFAR-10, byte for byte of the kind that the archive holds."""
    content = {"batch_label": label, "labels": labels, "data": data, "filenames": []}
    with path.open("wb") as file:
        _Python2Pickler(file, protocol=2).dump(content)
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core."))  # as it was then


def write_cifar10(root: Path, images: int = 4) -> Path:
    """So many images in each file; returns `root`."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        data = generator.integers(0, 256, (images, 3072), dtype=np.uint8)
        write_batch(folder / name, data, generator.integers(0, 10, images).tolist(), name)
    return root


def write_imagenet(root: Path, train: int = 3, val: int = 3, size: int = 40) -> Path:
    """So many JPEGs in each of three classes; returns `root`."""
    generator = np.random.default_rng(0)
    for part, images in (("train", train), ("val", val)):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for number in range(images):
                pixels = generator.integers(0, 256, (size, size + 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{name}_{number}.JPEG")
    return root
