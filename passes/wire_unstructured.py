"""Masks the weights of an unstructured baseline: all masks come from one node of the graph.

masks = mask_schedule()             looks at all layers, updates masks where that is due
y     = conv(x, masks[i])           B * W
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch.fx import GraphModule

from spre_fx import records
from spre_fx.modules import NMLayer, make_nm
from spre_fx.passes.base import Account, Pass, Skip
from spre_fx.passes.edit import add_module
from spre_fx.passes.graph_view import GraphView, input_of
from spre_fx.passes.policy import Policy
from spre_fx.patterns import Pattern
from spre_fx.schedules import Schedule
from spre_fx.subclasses import has_hooks
from spre_fx.unstructured import UnstructuredMethod
from spre_fx.unstructured_masks import UnstructuredMasks


@dataclass(frozen=True)
class WireUnstructured(Pass):
    """Mask every layer the policy names, without N:M groups and without SpRe branches.

    Attributes:
        policy: The layers, and by their patterns the sparsity of each.
        method: The baseline.
        schedule: At which training forwards it updates masks.
    """

    policy: Policy
    method: UnstructuredMethod
    schedule: Schedule

    def rewrite(self, graph_module: GraphModule) -> Account:
        """Turn layers into masked ones and connect the masks."""
        view = GraphView(graph_module)
        found = {n: self.policy.pattern_for(view, c) for n, c in view.candidates.items()}
        skipped = {name: skip for name, skip in found.items() if isinstance(skip, Skip)}
        for name, skip in skipped.items():
            records.note(view.candidates[name].module, skip.reason, skip.detail)
        layers: dict[str, NMLayer] = {}
        for name, pattern in found.items():
            module = view.candidates[name].module
            if isinstance(pattern, Pattern) and module is not None:
                layers[name] = make_nm(module, pattern, self.method, keep_masks=True)
        if layers:
            self._wire(view, layers)
        return Account(tuple(layers), skipped)

    def _wire(self, view: GraphView, layers: dict[str, NMLayer]) -> None:
        graph_module, graph = view.graph_module, view.graph_module.graph
        masks = UnstructuredMasks(list(layers.values()), self.method, self.schedule)
        device = next(graph_module.parameters()).device
        name = add_module(graph_module, "mask_schedule", masks.to(device))
        masks.train(graph_module.training)
        first = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(first):
            all_masks = graph.call_module(name)
        for index, site in enumerate(layers):
            calls = view.candidates[site].calls
            with graph.inserting_after(all_masks):
                item = (all_masks, index)
                mask = graph.create_node(
                    "call_function", operator.getitem, item, name=f"{calls[0].name}_mask"
                )
            for call in calls:
                call.args, call.kwargs = (input_of(call), mask), {}
                if has_hooks(layers[site]):  # a hook that returns new arguments has one
                    call.args, call.kwargs = (input_of(call),), {"update": mask}
