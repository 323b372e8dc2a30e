"""N:M sparse CNN training and inference on torch.fx, with Spatial Re-parameterization (SpRe).

    gm = spre_fx.prepare(model, pattern="1:8")    # before training
    deployed = spre_fx.finalize(gm)               # after training
    print(spre_fx.diff(gm, deployed))             # what changed, site by site

The compiler is imported when it is first used, so that importing this package costs little.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from spre_fx.criteria import SNIP, Criterion, GraSP, Taylor, update_taps
from spre_fx.errors import (
    InvariantError,
    ModelError,
    OptionError,
    PatternError,
    SpreError,
    TraceError,
    VerificationError,
)
from spre_fx.granet import GraNet
from spre_fx.lbc import LBC
from spre_fx.methods import ASP, SRSTE, MaskMethod
from spre_fx.patterns import Pattern
from spre_fx.schedules import CubicRamp, EveryK, EveryStep, Freeze, Schedule
from spre_fx.unstructured import GMP, RigL, UnstructuredMethod

if TYPE_CHECKING:
    from spre_fx.api import finalize, prepare
    from spre_fx.comparison import Diff, diff
    from spre_fx.inspection import SiteInfo, State, sites
    from spre_fx.plots import plot_spatial_sparsity

__version__ = "0.1.0"

__all__ = [
    "ASP",
    "GMP",
    "LBC",
    "SNIP",
    "SRSTE",
    "Criterion",
    "CubicRamp",
    "Diff",
    "EveryK",
    "EveryStep",
    "Freeze",
    "GraNet",
    "GraSP",
    "InvariantError",
    "MaskMethod",
    "ModelError",
    "OptionError",
    "Pattern",
    "PatternError",
    "RigL",
    "Schedule",
    "SiteInfo",
    "SpreError",
    "State",
    "Taylor",
    "TraceError",
    "UnstructuredMethod",
    "VerificationError",
    "diff",
    "finalize",
    "plot_spatial_sparsity",
    "prepare",
    "sites",
    "update_taps",
]

_HOME = {
    "Diff": "comparison",
    "SiteInfo": "inspection",
    "State": "inspection",
    "diff": "comparison",
    "finalize": "api",
    "plot_spatial_sparsity": "plots",
    "prepare": "api",
    "sites": "inspection",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'spre_fx' has no attribute {name!r}")
    return getattr(importlib.import_module(f"spre_fx.{_HOME[name]}"), name)
