"""Importing the package is cheap: what is heavy is imported when it is first used."""

import subprocess
import sys

import pytest

import spre_fx

HEAVY = ("networkx", "matplotlib", "torchvision", "sklearn", "tqdm", "tabulate", "spre_fx.passes")
HEAVY += ("onnx", "onnxruntime", "onnxscript", "openvino", "safetensors")


def test_importing_imports_nothing_heavy():
    code = (
        "import sys, torch; before = set(sys.modules); import spre_fx; "
        f"print([name for name in {HEAVY} if name in set(sys.modules) - before])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", spre_fx.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(spre_fx, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        _ = spre_fx.prune
