"""Options that run.py and step_profile.py share: what goes in, and where it runs."""

from __future__ import annotations

import argparse
import functools
from typing import Any

import machine
import torch
from setting import DTYPES, SIZES, Setting

_PACKAGES = ("torch", "torchvision", "spre_fx")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add them to a command line."""
    sizes = "; ".join(f"{model}: {batch}, {pixels}" for model, (batch, pixels) in SIZES.items())
    parser.add_argument("--batch", type=int, help=f"images; default, with pixels, of {sizes}")
    parser.add_argument("--pixels", type=int, help="height and width of an image")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16: autocast, the default on cuda")
    parser.add_argument("--channels-last", action="store_true")


def setting_for(
    options: argparse.Namespace, model: str, pattern: str, threads: int, mode: str = "eager"
) -> Setting:
    """One setting; where no size of the input is asked for it is the network's own."""
    batch, pixels = SIZES.get(model, SIZES["resnet50"])
    return Setting(
        model,
        options.batch or batch,
        options.pixels or pixels,
        pattern,
        mode,
        threads,
        options.device,
        options.dtype or ("bfloat16" if options.device == "cuda" else "float32"),
        options.channels_last,
    )


@functools.cache
def machine_of(device: str) -> dict[str, Any]:
    """What it runs on, with the name of the GPU where that is what runs."""
    found = machine.describe(_PACKAGES)
    return found | {"gpu": torch.cuda.get_device_name()} if device == "cuda" else found
