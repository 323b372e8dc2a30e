"""`adopt`: a dense model whose weights are N:M already becomes what `finalize` would have made."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from spre_fx import masks, records
from spre_fx.checks import check_model, is_prepared
from spre_fx.errors import ModelError
from spre_fx.inspection import uncalled_layers
from spre_fx.lowering import BackendName, check_backend, lower_in_place
from spre_fx.passes.base import Reason, Skip
from spre_fx.passes.graph_view import Candidate, GraphView
from spre_fx.passes.pipeline import deployment_pipeline
from spre_fx.passes.policy import Policy
from spre_fx.passes.tracing import trace
from spre_fx.pattern_search import (
    LIMIT,
    LIMIT_IF_KNOWN,
    FoundPattern,
    largest_count,
    obeyed_patterns,
)
from spre_fx.patterns import Pattern
from spre_fx.verify import check_pattern

_ANY = Pattern(1, 2)


@torch.no_grad()
def adopt(
    model: nn.Module,
    pattern: str | Pattern | None = None,
    backend: BackendName = "auto",
    *,
    example_inputs: Any = None,
    dtype: torch.dtype | None = None,
) -> GraphModule:
    """Deploy a dense model whose weights were made N:M elsewhere: by apex's ASP, SR-STE, or others.

    Load the checkpoint into the dense model first (apex keeps its masks in buffers of their own:
    `load_state_dict(..., strict=False)`). Each layer's pattern is found from its zeros; batch norms
    are folded, which keeps the zeros, and the layers lowered, all as `finalize` does. A layer
    without a pattern stays dense, and `spre_fx.sites(result)` says why.

    Args:
        model: Any module that `torch.fx` can trace. Never modified.
        pattern: None: of each layer the tightest N:M that chance would not give (`pattern_search`).
            "N:M": every layer that obeys it gets it, the others stay dense.
        backend: As for `finalize`.
        example_inputs: As for `finalize`.
        dtype: As for `finalize`.

    Returns:
        A GraphModule in evaluation mode.

    Raises:
        PatternError: If `pattern` is not one.
        TraceError: If `torch.fx` cannot follow the model.
        ModelError: If no layer is N:M, `prepare` made the model, or it does not run on the example
            inputs.
        OptionError: If there is no such backend, or it cannot run on the model's device.
    """
    check_backend(backend)
    wanted = None if pattern is None else Pattern.parse(pattern)
    check_model(model)
    if is_prepared(model):
        raise ModelError(
            "expected a dense model whose weights are N:M, found one that `prepare` has prepared. "
            "finalize deploys it."
        )
    traced = trace(model)
    for name, layer in uncalled_layers(model, traced).items():
        traced.add_submodule(name, layer)
    view = GraphView(traced)
    choices = _choose(view, wanted)
    found = {name: choice for name, choice in choices.items() if isinstance(choice, Pattern)}
    if not found:
        raise ModelError(_nothing(wanted, choices))
    for name, choice in choices.items():
        module = view.candidates[name].module
        if isinstance(choice, Skip):
            records.note(module, choice.reason, choice.detail)
        elif module is not None:
            records.write(module, records.Record(pattern=str(choice)))
    deployed, _ = deployment_pipeline()(traced)
    for name, candidate in GraphView(deployed).candidates.items():
        if name in found and candidate.module is not None:
            check_pattern(name, candidate.module, found[name])
    lowered = lower_in_place(deployed, backend, example_inputs, dtype, stacklevel=4)
    assert isinstance(lowered, GraphModule)
    return lowered


def _choose(view: GraphView, wanted: Pattern | None) -> dict[str, Pattern | Skip]:
    if wanted is not None:
        return {name: _given(view, each, wanted) for name, each in view.candidates.items()}
    found = {name: _obeyed(view, each) for name, each in view.candidates.items()}
    known = {
        each.pattern
        for patterns in found.values()
        if not isinstance(patterns, Skip)
        for each in patterns
        if each.chance <= LIMIT
    }
    return {name: _tightest(view.candidates[name], each, known) for name, each in found.items()}


def _given(view: GraphView, candidate: Candidate, wanted: Pattern) -> Pattern | Skip:
    choice = Policy(wanted).pattern_for(view, candidate)
    module = candidate.module
    if isinstance(choice, Skip) or module is None or masks.obeys(module.weight, wanted):
        return choice
    count = largest_count(module.weight, wanted.m)
    detail = f"a group of {wanted.m} holds {count} non-zeros, more than {wanted} allows"
    return Skip(Reason.NOT_SPARSE, f"{candidate.name}: {detail}")


def _obeyed(view: GraphView, candidate: Candidate) -> list[FoundPattern] | Skip:
    choice = Policy(_ANY).pattern_for(view, candidate)
    if isinstance(choice, Skip) or candidate.module is None:
        return choice if isinstance(choice, Skip) else []
    return obeyed_patterns(candidate.module.weight)


def _tightest(
    candidate: Candidate, found: list[FoundPattern] | Skip, known: set[Pattern]
) -> Pattern | Skip:
    if isinstance(found, Skip):
        return found
    for each in found:
        if each.chance <= (LIMIT_IF_KNOWN if each.pattern in known else LIMIT):
            return each.pattern
    return Skip(Reason.NOT_SPARSE, f"{candidate.name}: {_why_dense(candidate, found)}")


def _why_dense(candidate: Candidate, found: list[FoundPattern]) -> str:
    assert candidate.module is not None
    weight = candidate.module.weight
    zeros = weight.numel() - int(weight.count_nonzero())
    if not zeros:
        return "its weight has no zeros"
    if zeros == weight.numel():
        return "its weight is all zeros, which is no pattern"
    share = f"{zeros / weight.numel():.1%} of its weights are zero"
    if not found:
        return f"{share}, but in no N:M pattern with M of 2 to 32"
    return f"{share}, and {found[0].pattern} may be chance (probability {found[0].chance:.1g})"


def _nothing(wanted: Pattern | None, choices: dict[str, Pattern | Skip]) -> str:
    skips = [choice.detail for choice in choices.values() if isinstance(choice, Skip)]
    shown = "; ".join(skips[:3]) + ("; ..." if len(skips) > 3 else "")
    return (
        f"nothing to adopt: expected layers whose weights are {wanted or 'N:M'} already, found "
        f"none. {shown or 'No conv or linear at all'}. For dense weights: prepare, train, finalize."
    )
