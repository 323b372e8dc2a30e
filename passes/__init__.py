"""The compiler: tracer, matcher and one file per pass. Lives in `passes/` of the repository."""

from spre_fx.passes.base import Account, Pass, PassResult, Reason, Skip
from spre_fx.passes.compute_sparsely import ComputeSparsely
from spre_fx.passes.duplicate_branches import DuplicateBranches
from spre_fx.passes.fold_branches import FoldBranches
from spre_fx.passes.fuse_epilogues import FuseEpilogues
from spre_fx.passes.lower import Lower
from spre_fx.passes.matcher import Site, match_site
from spre_fx.passes.modularise_calls import ModulariseCalls
from spre_fx.passes.permute_channels import PermuteChannels
from spre_fx.passes.pipeline import (
    Pipeline,
    deployment_pipeline,
    lowering_pipeline,
    training_pipeline,
)
from spre_fx.passes.policy import Policy
from spre_fx.passes.specialise_to_eval import SpecialiseToEval
from spre_fx.passes.tracer import Tracer
from spre_fx.passes.tracing import trace
from spre_fx.passes.wire_masks import WireMasks
from spre_fx.passes.wire_unstructured import WireUnstructured

__all__ = [
    "Account",
    "ComputeSparsely",
    "DuplicateBranches",
    "FoldBranches",
    "FuseEpilogues",
    "Lower",
    "ModulariseCalls",
    "Pass",
    "PassResult",
    "PermuteChannels",
    "Pipeline",
    "Policy",
    "Reason",
    "Site",
    "Skip",
    "SpecialiseToEval",
    "Tracer",
    "WireMasks",
    "WireUnstructured",
    "deployment_pipeline",
    "lowering_pipeline",
    "match_site",
    "trace",
    "training_pipeline",
]
