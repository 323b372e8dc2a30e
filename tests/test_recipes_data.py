"""CIFAR-10 and ImageNet as they lie on the disk: what is read, and what is refused how."""

import pickle

import numpy as np
import pytest
import torch
from recipes_data import CLASSES, write_batch, write_cifar10, write_imagenet
from torchvision.transforms import v2

from recipes import cifar10_data, imagenet_data
from recipes.cifar10_data import CIFAR10
from recipes.errors import RecipeError

PIXELS = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32)])


def test_cifar10_is_what_was_written(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    data = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    write_batch(folder / "test_batch", data, [7, 0])
    read = CIFAR10(tmp_path, cifar10_data.EVALUATION, PIXELS)
    assert len(read) == 2
    for number, label in enumerate([7, 0]):
        image, found = read[number]
        assert found == label
        # A row is the red plane, then the green one, then the blue one, line by line.
        assert torch.equal(image, torch.from_numpy(data[number]).reshape(3, 32, 32).float())


def test_all_five_training_files_are_read(tmp_path):
    root = write_cifar10(tmp_path, images=3)
    assert len(CIFAR10(root, cifar10_data.TRAINING, PIXELS)) == 15


def test_a_folder_without_cifar10(tmp_path):
    with pytest.raises(RecipeError) as refusal:
        CIFAR10(tmp_path, cifar10_data.TRAINING, PIXELS)
    assert str(refusal.value) == (
        f"--data {tmp_path}: expected cifar-10-batches-py/data_batch_1 to _5 and "
        f"cifar-10-batches-py/test_batch, found no {tmp_path}/cifar-10-batches-py/data_batch_1. "
        "Unpack cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html there."
    )


class Harm:
    def __reduce__(self):
        return print, ("harm was done",)


ROWS = np.zeros((2, 3072), np.uint8)
REFUSED = {
    "no pickle": (b"<html>404</html>", "expected a batch of CIFAR-10, found another file"),
    "empty": (b"", "expected a batch of CIFAR-10, found another file"),
    "code": (pickle.dumps({"data": Harm()}), "it wants builtins.print"),
    "CIFAR-100": (
        pickle.dumps({"data": ROWS, "fine_labels": [1, 2]}, protocol=2),
        "expected 'data' and 'labels' in it, found data, fine_labels.",
    ),
    "no dict": (pickle.dumps(7), "expected 'data' and 'labels' in it, found neither."),
    "shape": (
        pickle.dumps({"data": ROWS, "labels": [1]}, protocol=2),
        "expected uint8 data of shape (1, 3072), one row per label, found uint8 of shape (2, 3072)",
    ),
    "labels": (
        pickle.dumps({"data": ROWS, "labels": [1, 10]}, protocol=2),
        "expected labels from 0 to 9, found 1 to 10",
    ),
}


@pytest.mark.parametrize(("content", "words"), REFUSED.values(), ids=REFUSED)
def test_other_files_are_refused(content, words, tmp_path, capsys):
    root = write_cifar10(tmp_path)
    path = root / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as refusal:
        CIFAR10(root, cifar10_data.TRAINING, PIXELS)
    assert str(refusal.value).startswith(f"{path}: ")
    assert words in str(refusal.value)
    assert "harm" not in capsys.readouterr().out


def test_imagenet_is_what_was_written(tmp_path):
    root = write_imagenet(tmp_path, train=2, val=1)
    assert imagenet_data.class_names(root) == list(CLASSES)
    for part, images in (("train", 2), ("val", 1)):
        data = imagenet_data.images(root, part, PIXELS)
        assert [label for _, label in data] == [n for n in range(3) for _ in range(images)]
        assert data[0][0].shape == (3, 40, 48)


def refusal_of(root):
    with pytest.raises(RecipeError) as refusal:
        imagenet_data.images(root, "val", PIXELS)
    assert str(refusal.value).startswith(f"--data {root}: expected ")
    return str(refusal.value)


def test_folders_that_are_not_imagenet(tmp_path):
    layout = "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, one folder per class"
    assert f"{layout}, found no folder {tmp_path}/train." in refusal_of(tmp_path)
    root = write_imagenet(tmp_path)
    for each in (root / "val" / CLASSES[2]).iterdir():
        each.unlink()
    assert f"{layout}. Found no valid file for the classes {CLASSES[2]}" in refusal_of(root)
    (root / "val" / CLASSES[2]).rmdir()
    words = f"the same classes in train and val, found 1 in one of them only, such as {CLASSES[2]}."
    assert words in refusal_of(root)


def test_the_validation_set_as_the_archive_has_it(tmp_path):
    root = write_imagenet(tmp_path)
    for each in sorted((root / "val").glob("*/*.JPEG")):
        each.rename(root / "val" / each.name)
    for name in CLASSES:
        (root / "val" / name).rmdir()
    found = refusal_of(root)
    assert f"found no folder in {root}/val. The archive of the validation set has no" in found
    assert "torchvision.datasets.ImageNet(DIR, 'val') sorts it into them" in found
