"""Folds BN into conv and the SpRe branch into the main one: a single N:M conv per site (Eq. 10).

    bn(conv(x; B * W)) + bn_spre(conv_spre(x; B^S * W^S))   ->   conv(x; W*) + b*

Batch norms are folded with their running statistics whatever mode the graph is in. A layer that is
N:M sparse but has no batch norm keeps B * W; a dense conv is folded with its batch norm alone.
Every new kernel is proved on the spot: it obeys its pattern, and it computes what the branches it
replaces compute.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from spre_fx import records
from spre_fx.batch_norm import statistics
from spre_fx.errors import InvariantError
from spre_fx.fold import Branch, merge
from spre_fx.modules import Layer, MaskSchedule, NMLayer, SpReConv, new_plain
from spre_fx.passes.base import Account, Pass, Skip
from spre_fx.passes.branches import masked_weight, spre_weight
from spre_fx.passes.edit import erase_unused, replace_module
from spre_fx.passes.graph_view import Candidate, GraphView, input_of
from spre_fx.passes.matcher import Site, match_site
from spre_fx.unstructured import UnstructuredMethod
from spre_fx.verify import BranchModules, check_agreement, check_pattern


@dataclass(frozen=True)
class FoldBranches(Pass):
    """Merge the branches of every site into one conv, and prove each."""

    @torch.no_grad()
    def rewrite(self, graph_module: GraphModule) -> Account:
        """Replace modules and remove the nodes of the branches."""
        view = GraphView(graph_module)
        found = {name: _match(view, candidate) for name, candidate in view.candidates.items()}
        for name, match in found.items():
            if isinstance(match, Site):
                _fold_site(graph_module, match)
            elif not isinstance(match, Skip):
                folded = _fold(name, match, [BranchModules(_masked_layer(match), None)])
                replace_module(graph_module, name, folded)
                for call in view.candidates[name].calls:
                    call.args, call.kwargs = (input_of(call),), {}
        schedules = [n for n in view.digraph if isinstance(view.module_of(n), MaskSchedule)]
        schedules += [user for node in schedules for user in view.users(node)]
        sites = [match for match in found.values() if isinstance(match, Site)]
        erase_unused(graph_module, schedules + [site.end for site in sites])
        for site in sites:
            _check_items_are_gone(view, site)
        skipped = {name: match for name, match in found.items() if isinstance(match, Skip)}
        return Account(tuple(name for name in found if name not in skipped), skipped)

    def ensures(self, graph_module: GraphModule) -> None:
        """No module of the training graph is left."""
        view = GraphView(graph_module)
        for name, module in graph_module.named_modules():
            if isinstance(module, NMLayer | SpReConv) and view.enclosing_leaf(name) is None:
                raise _not_as_built(name, f"a {type(module).__name__} whose branches do not")


def _check_items_are_gone(view: GraphView, site: Site) -> None:
    """The masks that a conv returned beside y have no other use than its branch."""
    if site.spre is None:
        return
    for item in view.users(site.conv):
        if not item._erased:
            found = f"{item.name}, a value of it that is used elsewhere, which does not"
            raise _not_as_built(site.name, found)


def _not_as_built(name: str, found: str) -> InvariantError:
    return InvariantError(
        f"{name}: expected every site folded, found {found} belong to the graph that `prepare` "
        "built. Undo what changed the graph since, and finalize again."
    )


def _match(view: GraphView, candidate: Candidate) -> Site | Layer | Skip:
    """What to fold: a site, an N:M layer on its own, or nothing."""
    match, module = match_site(view, candidate), candidate.module
    return module if isinstance(match, Skip) and isinstance(module, NMLayer) else match


def _fold_site(graph_module: GraphModule, site: Site) -> None:
    branches = [BranchModules(_masked_layer(site.layer), site.norm)]
    if site.spre is not None:
        layer = new_plain(site.spre.layer, spre_weight(site), site.spre.layer.bias)
        branches.append(BranchModules(layer, site.spre.norm))
    replace_module(graph_module, site.name, _fold(site.name, site.layer, branches))
    site.conv.args, site.conv.kwargs = (input_of(site.conv),), {}
    site.end.replace_all_uses_with(site.conv)


def _fold(name: str, layer: Layer, branches: Sequence[BranchModules]) -> Layer:
    weight, bias = merge(
        [
            Branch(b.layer.weight, b.layer.bias, None if b.bn is None else statistics(b.bn))
            for b in branches
        ]
    )
    exact = new_plain(layer, weight, bias)
    folded = copy.deepcopy(exact).to(layer.weight.dtype)
    check_agreement(name, branches, exact, folded)
    if isinstance(layer, NMLayer) and isinstance(layer.method, UnstructuredMethod):
        records.write(folded, records.Record(unstructured=type(layer.method).__name__))
    elif isinstance(layer, NMLayer):
        check_pattern(name, folded, layer.pattern)
        records.write(folded, records.Record(pattern=str(layer.pattern)))
    else:
        records.write(folded, records.read(layer))
    return folded


def _masked_layer(layer: Layer) -> Layer:
    return new_plain(layer, masked_weight(layer), layer.bias)
