"""Which node of one graph is which node of another, worked out from the two graphs alone.

Calls of modules with the same name correspond in their order, and so do inputs and outputs. From
there correspondence spreads backwards: where two corresponding nodes take a value at the same
position, and the same operation makes it, the makers correspond. Operations that nothing takes the
value of, such as assertions, correspond in their order as well.
"""

from __future__ import annotations

from collections import Counter

import networkx as nx
from torch.fx import Node

from spre_fx.passes.graph_view import GraphView


def align(before: GraphView, after: GraphView) -> dict[Node, Node]:
    """The node of `after` that corresponds to each node of `before`, where there is one."""
    anchors = _anchors(after)
    aligned = {node: anchors[key] for key, node in _anchors(before).items() if key in anchors}
    taken = set(aligned.values())
    for node in reversed(list(nx.topological_sort(before.digraph))):
        if node not in aligned:
            continue
        makers = zip(before.producers(node), after.producers(aligned[node]), strict=False)
        for old, new in makers:
            same = (old.op, old.target) == (new.op, new.target)
            if same and old.op != "call_module" and old not in aligned and new not in taken:
                aligned[old] = new
                taken.add(new)
    return aligned


def _anchors(view: GraphView) -> dict[tuple[str, str, int], Node]:
    count: Counter[tuple[str, str]] = Counter()
    anchors = {}
    for node in view.digraph:
        alone = node.op in ("placeholder", "get_attr", "call_module", "output")
        if alone or not view.users(node):
            key = (node.op, getattr(node.target, "__name__", str(node.target)))
            anchors[key[0], key[1], count[key]] = node
            count[key] += 1
    return anchors
