"""The two pipelines, which read like the paper's method: one named pass a line."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule

from spre_fx.backends import Backend
from spre_fx.choice import Shape, Timings
from spre_fx.criteria import Criterion
from spre_fx.methods import MaskMethod
from spre_fx.modules import MaskSchedule
from spre_fx.passes.base import Account, Pass
from spre_fx.passes.compute_sparsely import ComputeSparsely
from spre_fx.passes.duplicate_branches import DuplicateBranches
from spre_fx.passes.fold_branches import FoldBranches
from spre_fx.passes.fuse_epilogues import FuseEpilogues
from spre_fx.passes.lower import Lower
from spre_fx.passes.modularise_calls import ModulariseCalls
from spre_fx.passes.permute_channels import PermuteChannels
from spre_fx.passes.policy import Policy
from spre_fx.passes.specialise_to_eval import SpecialiseToEval
from spre_fx.passes.wire_masks import WireMasks
from spre_fx.passes.wire_unstructured import WireUnstructured
from spre_fx.schedules import Schedule
from spre_fx.spatial_mask import SpRe
from spre_fx.unstructured import UnstructuredMethod
from spre_fx.weight_criteria import WeightCriterion


@dataclass(frozen=True)
class Pipeline:
    """Passes in order, over one copy of the graph.

    Attributes:
        passes: The passes.
    """

    passes: tuple[Pass, ...]

    @property
    def index_of_masks(self) -> int:
        """The place of the pass that masks weights."""
        return next(
            index
            for index, each in enumerate(self.passes)
            if isinstance(each, WireMasks | WireUnstructured)
        )

    def __call__(self, graph_module: GraphModule) -> tuple[GraphModule, list[Account]]:
        """Run the passes on a copy of `graph_module`; the accounts come in their order."""
        return self.run_in_place(copy.deepcopy(graph_module))

    def run_in_place(self, graph_module: GraphModule) -> tuple[GraphModule, list[Account]]:
        """Run the passes on `graph_module` itself."""
        accounts = []
        for each in self.passes:
            result = each.run_in_place(graph_module)
            graph_module = result.graph_module
            accounts.append(result.account)
        graph_module.recompile()
        return graph_module, accounts


def training_pipeline(
    policy: Policy,
    method: MaskMethod,
    schedule: Schedule,
    *,
    branch: SpRe | None,
    gamma: float,
    criterion: Criterion | WeightCriterion | None = None,
    clock: MaskSchedule | None = None,
    sparse: bool = False,
) -> Pipeline:
    """Dense graph -> training graph."""
    modularise = ModulariseCalls()
    last = (ComputeSparsely(),) if sparse else ()
    if isinstance(method, UnstructuredMethod):
        return Pipeline((modularise, WireUnstructured(policy, method, schedule), *last))
    search = method.permutation
    permute = () if search is None else (PermuteChannels(policy, search),)
    first: tuple[Pass, ...] = (modularise, *permute)
    if branch is None:
        return Pipeline((*first, WireMasks(policy, method, schedule, clock=clock), *last))
    duplicate = DuplicateBranches(policy, gamma)
    wire = WireMasks(policy, method, schedule, branch, criterion, clock)
    return Pipeline((*first, duplicate, wire, *last))


def deployment_pipeline() -> Pipeline:
    """Training graph -> deployed graph of ordinary torch layers."""
    return Pipeline((SpecialiseToEval(), FoldBranches()))


def lowering_pipeline(
    backend: Backend, shapes: Mapping[nn.Module, Sequence[Shape]], timings: Timings
) -> Pipeline:
    """Deployed graph -> the graph that a machine runs."""
    return Pipeline((Lower(backend, shapes, timings), FuseEpilogues()))
