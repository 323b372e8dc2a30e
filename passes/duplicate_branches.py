"""Duplicates each conv-BN pair into a main branch and a SpRe branch.

    y = bn(conv(x))   ->   y = bn(conv(x)) + bn_spre(conv_spre(x))          (Eq. 9, masks to come)

Identities and views between the conv and its batch norm, which leave channels alone, are repeated
in the SpRe branch. 1x1 convs, linear layers and convs without a batch norm of their own get no
second branch.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch.fx import GraphModule

from spre_fx import records
from spre_fx.batch_norm import new_spre_batch_norm
from spre_fx.modules import new_spre_conv
from spre_fx.passes.base import Account, Pass, Reason, Skip
from spre_fx.passes.edit import add_module
from spre_fx.passes.graph_view import Candidate, GraphView, input_of
from spre_fx.passes.matcher import Site, match_site, steps
from spre_fx.passes.policy import Policy


@dataclass(frozen=True)
class DuplicateBranches(Pass):
    """Give every conv-BN site with K > 1 a SpRe branch with fresh weights.

    Attributes:
        policy: Which layers are made sparse; the others get no branch.
        gamma: Starting value of gamma of `bn_spre`.
    """

    policy: Policy
    gamma: float = 1.0

    def rewrite(self, graph_module: GraphModule) -> Account:
        """Add the branches."""
        view = GraphView(graph_module)
        found = {name: self._match(view, candidate) for name, candidate in view.candidates.items()}
        applied = {name: site for name, site in found.items() if isinstance(site, Site)}
        skipped = {name: skip for name, skip in found.items() if isinstance(skip, Skip)}
        for site in applied.values():
            self._add_branch(view, site)
        for name, skip in skipped.items():
            records.note(view.candidates[name].module, skip.reason, skip.detail)
        return Account(tuple(applied), skipped)

    def _match(self, view: GraphView, candidate: Candidate) -> Site | Skip:
        pattern = self.policy.pattern_for(view, candidate)
        if isinstance(pattern, Skip):
            return pattern
        site = match_site(view, candidate)
        if isinstance(site, Skip):
            return site
        if site.spre is not None:
            return Skip(Reason.ALREADY_DONE, f"{site.name}: has a SpRe branch, {site.spre.conv}")
        if site.layer.weight.shape[2:].numel() == 1:
            detail = f"{site.name}: a 1x1 kernel has one tap, no SpRe branch"
            return Skip(Reason.KERNEL_1X1, detail)
        return site

    def _add_branch(self, view: GraphView, site: Site) -> None:
        graph_module, graph = view.graph_module, view.graph_module.graph
        new_bn = new_spre_batch_norm(site.norm, self.gamma)
        conv_spre = add_module(graph_module, f"{site.name}_spre", new_spre_conv(site.layer))
        bn_spre = add_module(graph_module, f"{site.bn.target}_spre", new_bn)
        with graph.inserting_after(site.bn):
            spre_conv_node = graph.call_module(conv_spre, (input_of(site.conv),))
        value = spre_conv_node
        for step in steps(view, site.chain):
            with graph.inserting_after(value):
                args = (value, *step.args[1:])
                value = graph.create_node(step.op, step.target, args, step.kwargs)
        with graph.inserting_after(value):
            spre_bn_node = graph.call_module(bn_spre, (value,))
        with graph.inserting_after(spre_bn_node):
            branches, name = (site.bn, spre_bn_node), f"{site.bn.name}_sum"
            add = graph.create_node("call_function", operator.add, branches, name=name)
        site.bn.replace_all_uses_with(add, delete_user_cb=lambda user: user is not add)
