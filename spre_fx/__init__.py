"""N:M sparse CNN training and inference on torch.fx, with Spatial Re-parameterization (SpRe).

    gm = spre_fx.prepare(model, pattern="1:8")    # before training
    deployed = spre_fx.finalize(gm)               # after training
    print(spre_fx.diff(gm, deployed))             # what changed, site by site

What needs torch is imported when it is first used, so that importing this package costs little.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from spre_fx.errors import (
    FileError,
    InvariantError,
    ModelError,
    OptionError,
    PatternError,
    SpreError,
    TraceError,
    VerificationError,
)
from spre_fx.patterns import Pattern

if TYPE_CHECKING:
    from spre_fx.adoption import adopt
    from spre_fx.api import finalize, prepare
    from spre_fx.comparison import Diff, diff
    from spre_fx.cost_report import Cost
    from spre_fx.costs import cost
    from spre_fx.criteria import SNIP, Criterion, GraSP, Taylor, update_taps
    from spre_fx.dense_form import to_dense
    from spre_fx.dynamics import MaskDynamics
    from spre_fx.file_ledger import SavedFile
    from spre_fx.files import load, save
    from spre_fx.granet import GraNet
    from spre_fx.inspection import SiteInfo, State, sites
    from spre_fx.lbc import LBC
    from spre_fx.lowering import lower
    from spre_fx.methods import ASP, SRSTE, MaskMethod
    from spre_fx.onnx_export import OnnxReport, check_onnx, export_onnx
    from spre_fx.permutation import ChannelPermutation
    from spre_fx.plots import plot_spatial_sparsity
    from spre_fx.ranks import keep_masks_from_ddp
    from spre_fx.schedules import CubicRamp, EveryK, EveryStep, Freeze, Schedule
    from spre_fx.spatial_mask import SpRe
    from spre_fx.unstructured import GMP, RigL, UnstructuredMethod
    from spre_fx.weight_criteria import Change, RunningMean, WeightCriterion

__version__ = "0.1.0"

__all__ = [
    "ASP",
    "GMP",
    "LBC",
    "SNIP",
    "SRSTE",
    "Change",
    "ChannelPermutation",
    "Cost",
    "Criterion",
    "CubicRamp",
    "Diff",
    "EveryK",
    "EveryStep",
    "FileError",
    "Freeze",
    "GraNet",
    "GraSP",
    "InvariantError",
    "MaskDynamics",
    "MaskMethod",
    "ModelError",
    "OnnxReport",
    "OptionError",
    "Pattern",
    "PatternError",
    "RigL",
    "RunningMean",
    "SavedFile",
    "Schedule",
    "SiteInfo",
    "SpRe",
    "SpreError",
    "State",
    "Taylor",
    "TraceError",
    "UnstructuredMethod",
    "VerificationError",
    "WeightCriterion",
    "adopt",
    "check_onnx",
    "cost",
    "diff",
    "export_onnx",
    "finalize",
    "keep_masks_from_ddp",
    "load",
    "lower",
    "plot_spatial_sparsity",
    "prepare",
    "save",
    "sites",
    "to_dense",
    "update_taps",
]

_HOME = {
    "ASP": "methods",
    "Change": "weight_criteria",
    "ChannelPermutation": "permutation",
    "Cost": "cost_report",
    "Criterion": "criteria",
    "CubicRamp": "schedules",
    "Diff": "comparison",
    "EveryK": "schedules",
    "EveryStep": "schedules",
    "Freeze": "schedules",
    "GMP": "unstructured",
    "GraNet": "granet",
    "GraSP": "criteria",
    "LBC": "lbc",
    "MaskDynamics": "dynamics",
    "MaskMethod": "methods",
    "OnnxReport": "onnx_export",
    "RigL": "unstructured",
    "RunningMean": "weight_criteria",
    "SNIP": "criteria",
    "SRSTE": "methods",
    "SavedFile": "file_ledger",
    "Schedule": "schedules",
    "SiteInfo": "inspection",
    "SpRe": "spatial_mask",
    "State": "inspection",
    "Taylor": "criteria",
    "UnstructuredMethod": "unstructured",
    "WeightCriterion": "weight_criteria",
    "adopt": "adoption",
    "check_onnx": "onnx_export",
    "cost": "costs",
    "diff": "comparison",
    "export_onnx": "onnx_export",
    "finalize": "api",
    "keep_masks_from_ddp": "ranks",
    "load": "files",
    "lower": "lowering",
    "plot_spatial_sparsity": "plots",
    "prepare": "api",
    "save": "files",
    "sites": "inspection",
    "to_dense": "dense_form",
    "update_taps": "criteria",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'spre_fx' has no attribute {name!r}")
    return getattr(importlib.import_module(f"spre_fx.{_HOME[name]}"), name)
