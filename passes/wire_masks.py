"""Makes the weights N:M sparse and wires the masks through the graph.

    y, B, taps = conv(x)                B from the mask method, Algorithm 1, line 3
    B^S        = B * taps               Eq. 8
    y_spre     = conv_spre(x, B^S)      second term of Eq. 9

In the ablations of Fig. 5, B^S is B itself ("same") or B * not taps ("inverse").

A schedule that counts steps becomes a node of its own, whose value goes to every layer; so does
any schedule where live taps have a memory, which must be told of each training forward.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.fx import GraphModule, Node

from spre_fx import masks, records
from spre_fx.criteria import Criterion, CriterionTaps
from spre_fx.errors import InvariantError
from spre_fx.methods import MaskMethod
from spre_fx.modules import MaskSchedule, NMLayer, SpReConv, emit_masks, make_nm
from spre_fx.passes.base import Account, Pass, Skip
from spre_fx.passes.edit import add_module
from spre_fx.passes.graph_view import Candidate, GraphView, input_of
from spre_fx.passes.matcher import Site, SpReBranch, match_site
from spre_fx.passes.policy import Policy
from spre_fx.patterns import Pattern
from spre_fx.schedules import Schedule
from spre_fx.spatial_mask import SpatialMask, SpRe
from spre_fx.subclasses import has_hooks
from spre_fx.weight_criteria import WeightCriterion


@dataclass(frozen=True)
class WireMasks(Pass):
    """Mask every layer the policy names, and hand the masks to the SpRe branches.

    Attributes:
        policy: The pattern of each layer.
        method: How a mask is chosen and what gradient the weights receive.
        schedule: At which training forwards the masks are recomputed.
        branch: How B^S is made: as in Eq. 8, or otherwise.
        criterion: How B^U is chosen, with or without `update_taps`; None: by magnitude.
        clock: What counts the steps of a model of which this graph is only a part.
    """

    policy: Policy
    method: MaskMethod
    schedule: Schedule
    branch: SpRe = field(default_factory=SpRe)
    criterion: Criterion | WeightCriterion | None = None
    clock: MaskSchedule | None = None

    def rewrite(self, graph_module: GraphModule) -> Account:
        """Turn layers into their N:M kind and connect the masks."""
        view = GraphView(graph_module)
        patterns = {
            name: self.policy.pattern_for(view, candidate)
            for name, candidate in view.candidates.items()
        }
        applied = {name: p for name, p in patterns.items() if isinstance(p, Pattern)}
        skipped = {name: skip for name, skip in patterns.items() if isinstance(skip, Skip)}
        sites = {name: match_site(view, view.candidates[name]) for name in applied}
        update = self._add_schedule(graph_module) if applied else None
        for name, pattern in applied.items():
            self._sparsify(view.candidates[name], pattern, sites[name], update)
        for name, skip in skipped.items():
            module = view.candidates[name].module
            if not isinstance(module, NMLayer):
                records.note(module, skip.reason, skip.detail)
        return Account(tuple(applied), skipped)

    def _add_schedule(self, graph_module: GraphModule) -> Node | None:
        counts = self.schedule.counts_steps or self.branch.needs_memory(self.criterion)
        if not counts or self.clock is not None:
            return None
        device = next(graph_module.parameters()).device
        schedule = MaskSchedule(self.schedule, self.method).to(device).train(graph_module.training)
        name = add_module(graph_module, "mask_schedule", schedule)
        first = next(node for node in graph_module.graph.nodes if node.op != "placeholder")
        with graph_module.graph.inserting_before(first):
            return graph_module.graph.call_module(name)

    def _sparsify(
        self, candidate: Candidate, pattern: Pattern, site: Site | Skip, update: Node | None
    ) -> None:
        assert candidate.module is not None
        layer = make_nm(
            candidate.module, pattern, self.method, keep_masks=self.schedule.keeps_masks
        )
        layer.clock = None if self.clock is None else (self.clock,)
        for call in candidate.calls:
            extra = [] if update is None else [update]
            call.args, call.kwargs = (input_of(call), *extra), {}
            if extra and has_hooks(candidate.module):  # a hook that returns new arguments has one
                call.args, call.kwargs = (input_of(call),), {"update": update}
        if isinstance(site, Site) and site.spre is not None:
            emit_masks(layer)
            layer.live_taps = self._taps(layer) or layer.live_taps
            site.spre.layer.straight_through = self.branch.straight_through
            _wire(site.conv, site.spre, self.branch)

    def _taps(self, layer: NMLayer) -> nn.Module | None:
        """Live taps that are more than a function of the weights; None where they are not."""
        taps: nn.Module | None = None
        if isinstance(self.criterion, Criterion):
            by_magnitude = masks.live_taps(layer.weight, layer.pattern)
            taps = CriterionTaps(by_magnitude, layer.pattern, self.criterion, self.schedule)
        elif self.branch.needs_memory(self.criterion):
            taps = SpatialMask(layer.weight, layer.pattern, self.branch, self.criterion)
        return taps and taps.train(layer.training)

    def ensures(self, graph_module: GraphModule) -> None:
        """Every SpRe branch takes its mask from a conv."""
        view = GraphView(graph_module)
        branches = [n for n in view.digraph if isinstance(view.module_of(n), SpReConv)]
        if all(len(branch.args) == 2 for branch in branches):
            return
        for name, candidate in view.candidates.items():
            site = match_site(view, candidate)
            if isinstance(site, Site) and site.spre is not None and len(site.spre.conv.args) != 2:
                raise InvariantError(
                    f"{name}: expected its SpRe branch {site.spre.conv.target} to take the input "
                    f"and a mask, found {site.spre.conv.args}. Run WireMasks with a policy that "
                    "includes every layer DuplicateBranches gave a branch."
                )


def _wire(conv: Node, spre: SpReBranch, branch: SpRe) -> None:
    graph, users = conv.graph, list(conv.users)

    def node(target: Callable[..., object], args: tuple[Node | int, ...], what: str) -> Node:
        return graph.create_node("call_function", target, args, name=f"{conv.name}_{what}")

    with graph.inserting_after(conv):  # each goes right behind the conv, so the last comes first
        taps = node(operator.getitem, (conv, 2), "live_taps") if branch.taps != "same" else None
        mask = node(operator.getitem, (conv, 1), "nm_mask")
        y = node(operator.getitem, (conv, 0), "y")
    for user in users:
        user.replace_input_with(conv, y)
    if taps is not None and branch.taps == "inverse":
        with graph.inserting_after(taps):
            taps = node(torch.logical_not, (taps,), "dead_taps")
    spre_mask = mask
    if taps is not None:
        with graph.inserting_after(taps):
            spre_mask = node(masks.spre_mask, (mask, taps), "spre_mask")
    spre.conv.args = (input_of(spre.conv), spre_mask)
