"""Lets masked convs of a training graph leave out what their masks do, where that is faster.

No node changes: the conv of a main branch and that of its SpRe branch compute the same numbers by
other kernels, each pass of a training step by the faster ones for its shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule

from spre_fx.masked_conv import SparseCompute
from spre_fx.modules import NMConv2d, SpReConv2d
from spre_fx.native_conv import Geometry
from spre_fx.passes.base import Account, Pass, Reason, Skip
from spre_fx.passes.graph_view import Candidate, GraphView
from spre_fx.passes.matcher import Site, match_site


@dataclass(frozen=True)
class ComputeSparsely(Pass):
    """Say of each masked 2d conv that it may compute with its kept weights alone."""

    def rewrite(self, graph_module: GraphModule) -> Account:
        """Mark the convs."""
        view = GraphView(graph_module)
        skipped = {}
        for name, candidate in view.candidates.items():
            module = candidate.module
            reason = _refusal(name, module)
            if reason is not None:
                skipped[name] = reason
                continue
            assert isinstance(module, NMConv2d)
            density = module.pattern.density
            geometry = _geometry(module)
            module.sparse = SparseCompute(geometry, density, module.method.kept_gradient)
            spre = _spre_conv(view, candidate)
            if spre is not None:
                spre.sparse = SparseCompute(geometry, density, not spre.straight_through)
        return Account(tuple(name for name in view.candidates if name not in skipped), skipped)


def _refusal(name: str, module: nn.Module | None) -> Skip | None:
    if not isinstance(module, NMConv2d):
        found = type(module).__name__
        return Skip(Reason.NOT_SPARSE, f"{name}: expected a masked Conv2d, found {found}")
    if module.sparse is not None:
        return Skip(Reason.ALREADY_DONE, f"{name}: is marked by an earlier run")
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        detail = f"{name}: padding={module.padding!r}, padding_mode={module.padding_mode!r}"
        return Skip(Reason.REFUSED, detail)
    return None


def _geometry(conv: NMConv2d) -> Geometry:
    assert not isinstance(conv.padding, str)
    lists = (list(conv.stride), list(conv.padding), list(conv.dilation))
    return Geometry(*lists, conv.groups)


def _spre_conv(view: GraphView, candidate: Candidate) -> SpReConv2d | None:
    site = match_site(view, candidate)
    if not isinstance(site, Site) or site.spre is None:
        return None
    return site.spre.layer if isinstance(site.spre.layer, SpReConv2d) else None
