"""`cost`: parameters and FLOPs of a model, in training and at test, against the dense model.

What Table 9 of Zhang et al., 2306.05612v3 counts. The paper states no rule; the one here gives its
SR-STE and test columns (`benchmarks/table9.py` sets all of them side by side).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from spre_fx import records
from spre_fx.cost_report import Amount, Cost, SiteCost, total
from spre_fx.inspection import with_graphs
from spre_fx.modules import NMLayer
from spre_fx.passes.branches import spre_mask
from spre_fx.passes.graph_view import Candidate, GraphView
from spre_fx.passes.matcher import Site, match_site
from spre_fx.passes.positions import Runs, count_runs
from spre_fx.passes.specialise_to_eval import SpecialiseToEval


@torch.no_grad()
def cost(model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> Cost:
    """Count parameters and FLOPs of a dense, prepared or deployed model, from its actual masks.

    The rule:

    - Counted are the weights of convs and linears; biases and batch norms are not.
    - A FLOP is a multiplication or an addition: two for each weight that is not masked, at each
      position of the output (of the input for a transposed conv), for every image of the batch.
      Positions in the padding count.
    - A training step is a forward and two products of the same size: the gradients of the input and
      of the weight. The forward runs under the mask, both gradients dense, for the transposed mask
      is not N:M, and removed weights receive gradients. That is (N/M + 2)/3 of dense.
    - The SpRe branch costs what B^S keeps, in all three products: weights outside it take no
      gradient.
    - In training W counts whole, since any weight can return; W^S counts at the live taps, with all
      channels there. At test what counts is the merged kernel: the weights that B or B^S keeps; for
      a deployed layer, those that are not zero.

    Sizes come from a run in evaluation mode, on fake tensors, which computes nothing. A model that
    `torch.fx` can follow in parts only runs on the input itself, for its own code may look at it.

    Args:
        model: A dense, prepared or deployed model. Never modified.
        example_input: What the model is called with, or a tuple of its positional arguments.

    Raises:
        ModelError: If the model cannot take the input.
    """
    graphs, views = with_graphs(model)
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    runs = count_runs(graphs, views, inputs)
    found = {}
    for view in views.values():
        at_test = GraphView(SpecialiseToEval()(view.graph_module).graph_module).candidates
        for name, candidate in view.candidates.items():
            found[name] = _site_cost(view, candidate, runs[name], tested=name in at_test)
    sites = found.values()
    return Cost(
        sites=tuple(sites),
        sparse=total(site for site in sites if site.pattern is not None),
        model=total(sites),
    )


def _site_cost(view: GraphView, candidate: Candidate, runs: Runs, *, tested: bool) -> SiteCost:
    pattern, size = _pattern(candidate.module), prod(runs.weight_shape)
    trained = pattern is None or isinstance(candidate.module, NMLayer)
    kept = _kept(view, candidate, size)
    live, taps = kept.live_taps or (0, 1)
    forward = 2 * runs.positions  # FLOPs of one weight
    return SiteCost(
        name=candidate.name,
        pattern=pattern,
        weight_shape=runs.weight_shape,
        live_taps=kept.live_taps,
        calls=runs.calls,
        parameters=Amount(
            dense_train=size,
            train=size + size * live // taps if trained else None,
            dense_test=size * tested,
            test=kept.merged * tested,
        ),
        flops=Amount(
            dense_train=3 * forward * size,
            train=forward * (kept.main + 2 * size + 3 * kept.spre) if trained else None,
            dense_test=forward * size * tested,
            test=forward * kept.merged * tested,
        ),
    )


@dataclass(frozen=True)
class _Kept:
    """How many weights of a layer B keeps, B^S, and either; the live taps of B^S, and all taps."""

    main: int
    spre: int
    merged: int
    live_taps: tuple[int, int] | None


def _kept(view: GraphView, candidate: Candidate, size: int) -> _Kept:
    layer = candidate.module
    if layer is None or _pattern(layer) is None:
        return _Kept(size, 0, size, None)
    if not isinstance(layer, NMLayer):
        count = int(layer.weight.count_nonzero())
        return _Kept(count, 0, count, None)
    mask = layer.masked_weight()[1]
    count = int(mask.count_nonzero())
    site = match_site(view, candidate)
    spre = spre_mask(site) if isinstance(site, Site) else None
    if spre is None:
        return _Kept(count, 0, count, None)
    live = spre.flatten(2).any(1).any(0)
    return _Kept(
        main=count,
        spre=int(spre.count_nonzero()),
        merged=int((mask | spre).count_nonzero()),
        live_taps=(int(live.count_nonzero()), live.numel()),
    )


def _pattern(layer: nn.Module | None) -> str | None:
    if layer is None:
        return None
    return str(layer.pattern) if isinstance(layer, NMLayer) else records.read(layer).get("pattern")
