"""The weights a site multiplies with: read from its modules and from the graph between them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.fx import Node

from spre_fx.errors import InvariantError
from spre_fx.modules import Layer, NMLayer
from spre_fx.passes.matcher import Site


def masked_weight(layer: Layer) -> Tensor:
    """B * W of an N:M layer with the masks in force, W of any other."""
    return layer.masked_weight()[0] if isinstance(layer, NMLayer) else layer.weight


def spre_weight(site: Site) -> Tensor:
    """B^S * W^S, with B^S as the graph computes it; W^S where no mask is wired yet."""
    assert site.spre is not None
    weight, mask = site.spre.layer.weight, spre_mask(site)
    return weight if mask is None else weight * mask


def spre_mask(site: Site) -> Tensor | None:
    """B^S with the masks in force, as the graph computes it; None where no mask is wired yet."""
    conv = site.layer
    if site.spre is None or not isinstance(conv, NMLayer) or conv.live_taps is None:
        return None
    if len(site.spre.conv.args) == 1:
        raise _not_the_masks(site, "none")
    items = {1: conv.masked_weight()[1], 2: conv.live_taps(conv.weight, None)}
    mask: Tensor = _value(site.spre.conv.args[1], site, items)
    return mask


def _value(node: Any, site: Site, items: Mapping[int, Tensor]) -> Any:
    """The value of a node between the conv of a site, which returns `items`, and its branch."""
    if not isinstance(node, Node):
        return node
    index: Any = node.args[1] if node.target is operator.getitem else None
    if isinstance(index, int) and index in items and node.args[0] is site.conv:
        return items[index]
    if node.op != "call_function" or node.target is operator.getitem:
        raise _not_the_masks(site, f"one that depends on {node.name}")
    assert callable(node.target)
    return node.target(*(_value(argument, site, items) for argument in node.args))


def _not_the_masks(site: Site, found: str) -> InvariantError:
    return InvariantError(
        f"{site.name}: expected its SpRe branch to take a mask made by functions from the masks of "
        f"{site.name}, found {found}. Undo what changed the graph since `prepare`."
    )
