"""The weights a site multiplies with: read from its modules and from the graph between them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.fx import Node

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
    items = {1: conv.masked_weight()[1], 2: conv.live_taps(conv.weight, None)}
    mask: Tensor = _value(site.spre.conv.args[1], items)
    return mask


def _value(node: Any, items: Mapping[int, Tensor]) -> Any:
    """The value of a node between a conv, which returns `items`, and its SpRe branch."""
    if not isinstance(node, Node):
        return node
    if node.target is operator.getitem:
        index = node.args[1]
        assert isinstance(index, int)
        return items[index]
    assert callable(node.target)
    return node.target(*(_value(argument, items) for argument in node.args))
