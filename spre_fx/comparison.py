"""`diff`: what lies between two models, worked out from their two graphs and nothing else.

No pass is asked what it did. A pass that claims a rewrite it did not make shows no row for it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate
from torch import nn
from torch.fx import Graph, GraphModule, Node

from spre_fx.dense_form import dense_view
from spre_fx.inspection import SiteInfo, describe, milliseconds, with_graphs
from spre_fx.passes.alignment import align
from spre_fx.passes.graph_view import GraphView

_ABSENT = "-"


@dataclass(frozen=True)
class SiteChange:
    """One conv or linear in both models. `before` or `after` is None where it is in one only."""

    name: str
    before: SiteInfo | None
    after: SiteInfo | None

    @property
    def changed(self) -> bool:
        """Whether anything about the site differs but what is said of it."""
        return _essence(self.before) != _essence(self.after)


@dataclass(frozen=True)
class NodeChange:
    """One node that is not the same in both graphs.

    Attributes:
        change: "added", "removed", "replaced" (another module under the name) or "rewired" (other
            inputs).
        node: Its name.
        operation: What it does, before and after.
        inputs: The names of its inputs, before and after.
    """

    change: str
    node: str
    operation: tuple[str, str]
    inputs: tuple[str, str]


@dataclass(frozen=True)
class Totals:
    """Counts over a whole model: parameters, non-zeros of conv and linear weights, graph nodes."""

    sites: int
    parameters: int
    nonzeros: int
    nodes: int


@dataclass(frozen=True)
class Diff:
    """What lies between two models. Print it, or let a notebook show it.

    Attributes:
        sites: Every conv and linear of either model, in order.
        nodes: The nodes that differ.
        before: Totals of the first model.
        after: Totals of the second model.
    """

    sites: tuple[SiteChange, ...]
    nodes: tuple[NodeChange, ...]
    before: Totals
    after: Totals

    def __str__(self) -> str:
        return self.text()

    def text(self, *, nodes: bool = False) -> str:
        """Plain text tables.

        Args:
            nodes: Whether to add the table of nodes added, removed, replaced and rewired.
        """
        return self._render("simple", nodes=nodes)

    def markdown(self, *, nodes: bool = False) -> str:
        """The same tables in Markdown."""
        return self._render("github", nodes=nodes)

    def html(self, *, nodes: bool = False) -> str:
        """The same tables in HTML."""
        return self._render("html", nodes=nodes)

    def _repr_html_(self) -> str:
        return self.html()

    def _render(self, style: str, *, nodes: bool) -> str:
        tables = [
            tabulate(
                [_site_row(s) for s in self.sites], _SITE_HEADERS, style, colalign=_SITE_ALIGN
            ),
            tabulate(_total_rows(self.before, self.after), ("total", "before", "after"), style),
        ]
        if nodes:
            tables.append(tabulate([_node_row(n) for n in self.nodes], _NODE_HEADERS, style))
        return "\n\n".join(str(table) for table in tables)


def diff(before: nn.Module, after: nn.Module) -> Diff:
    """Compare any two of a dense model, its training graph and its deployed graph.

    Args:
        before: A dense, prepared or deployed model.
        after: Likewise.

    Returns:
        The comparison, computed from the two graphs.
    """
    before, after = dense_view(before), dense_view(after)
    (_, old), (_, new) = with_graphs(before), with_graphs(after)
    old_sites, new_sites = describe(old), describe(new)
    names = dict.fromkeys([*old_sites, *new_sites])
    return Diff(
        sites=tuple(SiteChange(n, old_sites.get(n), new_sites.get(n)) for n in names),
        nodes=tuple(
            change
            for path in dict.fromkeys([*old, *new])
            for change in _node_changes(old.get(path, _EMPTY), new.get(path, _EMPTY))
        ),
        before=_totals(before, old, old_sites),
        after=_totals(after, new, new_sites),
    )


def _essence(info: SiteInfo | None) -> object:
    return info and (
        info.structure,
        info.weight_shape,
        info.pattern,
        info.nonzeros,
        info.parameters,
    )


def _totals(model: nn.Module, views: dict[str, GraphView], infos: dict[str, SiteInfo]) -> Totals:
    return Totals(
        sites=len(infos),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        nonzeros=sum(info.nonzeros for info in infos.values()),
        nodes=sum(len(view.graph_module.graph.nodes) for view in views.values()),
    )


def _node_changes(before: GraphView, after: GraphView) -> list[NodeChange]:
    aligned = align(before, after)
    changes = []
    for old in before.digraph:
        new = aligned.get(old)
        operations = _operation(before, old), _operation(after, new)
        inputs = _inputs(before, old), _inputs(after, new)
        if new is None:
            changes.append(NodeChange("removed", old.name, operations, inputs))
        elif operations[0] != operations[1]:
            changes.append(NodeChange("replaced", old.name, operations, inputs))
        elif [aligned.get(maker) for maker in before.producers(old)] != after.producers(new):
            changes.append(NodeChange("rewired", old.name, operations, inputs))
    kept = set(aligned.values())
    for new in after.digraph:
        if new not in kept:
            operations = _ABSENT, _operation(after, new)
            changes.append(
                NodeChange("added", new.name, operations, (_ABSENT, _inputs(after, new)))
            )
    return changes


def _operation(view: GraphView, node: Node | None) -> str:
    if node is None:
        return _ABSENT
    if node.op == "call_module":
        return type(view.module_of(node)).__name__
    target = node.target if isinstance(node.target, str) else node.target.__name__
    return node.op if node.op in ("placeholder", "output") else target


def _inputs(view: GraphView, node: Node | None) -> str:
    return _ABSENT if node is None else ", ".join(maker.name for maker in view.producers(node))


_EMPTY = GraphView(GraphModule(nn.Module(), Graph()))
_SITE_HEADERS = (
    "site",
    "was",
    "is",
    "weight",
    "pattern",
    "density",
    "live taps",
    "parameters",
    "backend",
    "dense ms",
    "ms",
    "note",
)
_SITE_ALIGN = (*("left",) * 5, *("right",) * 3, "left", *("right",) * 2, "left")
_NODE_HEADERS = ("change", "node", "operation", "inputs before", "inputs after")


def _site_row(change: SiteChange) -> Sequence[str]:
    before, after = change.before, change.after
    known = after or before
    assert known is not None
    taps = next((i.live_taps for i in (after, before) if i is not None and i.live_taps), None)
    return (
        change.name,
        before.structure if before else _ABSENT,
        after.structure if after else _ABSENT,
        "x".join(map(str, known.weight_shape)),
        known.pattern or "",
        _arrow(_density(before), _density(after)),
        f"{taps[0]}/{taps[1]}" if taps else "",
        _arrow(_parameters(before), _parameters(after)),
        known.backend or "",
        milliseconds(known.dense_ms) or "",
        milliseconds(known.chosen_ms) or "",
        known.note.removeprefix(f"{change.name}: "),
    )


def _density(info: SiteInfo | None) -> str:
    return f"{info.density:.4g}" if info else _ABSENT


def _parameters(info: SiteInfo | None) -> str:
    return f"{info.parameters:,}" if info else _ABSENT


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"


def _total_rows(before: Totals, after: Totals) -> list[tuple[str, str, str]]:
    named = {
        "convs and linears": "sites",
        "parameters": "parameters",
        "non-zeros of their weights": "nonzeros",
        "graph nodes": "nodes",
    }
    return [(f, f"{getattr(before, a):,}", f"{getattr(after, a):,}") for f, a in named.items()]


def _node_row(change: NodeChange) -> Sequence[str]:
    return (
        change.change,
        change.node,
        _arrow(*change.operation),
        change.inputs[0],
        change.inputs[1] if change.inputs[1] != change.inputs[0] else "",
    )
