"""`sites`: what every conv and linear of a model is, read from its graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from spre_fx import records
from spre_fx.dense_form import dense_view
from spre_fx.modules import Layer, NMLayer
from spre_fx.passes.base import Reason, Skip
from spre_fx.passes.branches import masked_weight, spre_weight
from spre_fx.passes.edit import copy_model
from spre_fx.passes.graph_view import Candidate, GraphView
from spre_fx.passes.matcher import Site, match_site
from spre_fx.passes.modularise_calls import read_layer
from spre_fx.passes.regions import assemble, divide, find_regions, is_divided
from spre_fx.unstructured import UnstructuredMethod


class State(str, Enum):
    """What has become of a conv or linear."""

    DENSE = "dense"
    SKIPPED = "skipped"
    NM = "N:M"
    SPRE = "N:M + SpRe"
    DEPLOYED = "deployed N:M"
    UNSTRUCTURED = "unstructured"
    DEPLOYED_UNSTRUCTURED = "deployed unstructured"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class SiteInfo:
    """One conv or linear of a model.

    Attributes:
        name: Its qualified name (the node's name for a functional call).
        state: What has become of it.
        structure: What the graph computes there, such as "N:M Conv2d -> BN + SpRe -> BN".
        weight_shape: `(C_out, C_in/groups, *kernel)`; () for a functional call.
        pattern: "N:M", or None.
        density: Non-zeros of the (main) weight over its size, masks applied.
        live_taps: Live taps of the SpRe branch and taps of the kernel, or None.
        parameters: Elements of all parameters of the site: conv, bn and SpRe branch.
        nonzeros: Non-zeros of the weights of both branches, masks applied.
        backend: What it was lowered to, or None.
        dense_ms: Milliseconds of the dense layer where the backend was chosen by measuring, else
            None.
        chosen_ms: Milliseconds of what it was lowered to, likewise.
        reason: Why it was skipped, in two words, or None.
        note: The sentence behind it, or why there is no SpRe branch, or the choice of a backend.
    """

    name: str
    state: State
    structure: str
    weight_shape: tuple[int, ...]
    pattern: str | None
    density: float
    live_taps: tuple[int, int] | None
    parameters: int
    nonzeros: int
    backend: str | None
    dense_ms: float | None
    chosen_ms: float | None
    reason: str | None
    note: str


def sites(model: nn.Module) -> list[SiteInfo]:
    """Every conv and linear of a model: dense, prepared or deployed. Reads, never edits.

    Args:
        model: A dense, prepared or deployed model.

    Returns:
        One record per conv and linear, in the order of the model's modules.
    """
    _, views = with_graphs(model)
    return list(describe(views).values())


def site_table(model: nn.Module) -> str:
    """The records of `sites` as a plain text table."""
    headers = (
        *("name", "state", "pattern", "weight", "density", "live taps"),
        *("backend", "dense ms", "ms", "note"),
    )
    rows = [
        (
            site.name,
            site.state,
            site.pattern,
            "x".join(map(str, site.weight_shape)),
            f"{site.density:.4g}",
            "{}/{}".format(*site.live_taps) if site.live_taps else None,
            site.backend,
            milliseconds(site.dense_ms),
            milliseconds(site.chosen_ms),
            site.note.removeprefix(f"{site.name}: "),
        )
        for site in sites(model)
    ]
    return tabulate(rows, headers, disable_numparse=True)


def milliseconds(time: float | None) -> str | None:
    """A time for a table, to three digits."""
    return None if time is None else f"{time:.3g}"


def with_graphs(model: nn.Module) -> tuple[nn.Module, dict[str, GraphView]]:
    """A model that is made of its regions, the very one where it is, and views of them by name.

    Of a lowered model these are the regions of its dense form, with the records of what is run.
    """
    graphs = model = dense_view(model)
    if not is_divided(model):
        copied = copy_model(model)
        graphs = assemble(copied, divide(copied))
    views = {region.names[0]: GraphView(region.graph_module) for region in find_regions(graphs)}
    for name, layer in uncalled_layers(model, graphs).items():
        records.note(layer, Reason.NOT_CALLED, f"{name}: is never called in the traced forward")
        nothing = GraphModule(nn.Module(), Graph())
        nothing.add_submodule(name, layer)
        views[name] = GraphView(nothing)
    return graphs, views


def uncalled_layers(model: nn.Module, graphs: nn.Module) -> dict[str, Layer]:
    """Copies of the convs and linears of a model that its graphs leave out, by name."""
    called = dict(graphs.named_modules(remove_duplicate=False))
    return {
        name: copy.deepcopy(module)
        for name, module in model.named_modules()
        if isinstance(module, Layer) and name not in called
    }


@torch.no_grad()
def describe(views: Mapping[str, GraphView]) -> dict[str, SiteInfo]:
    """The records of `sites` by name."""
    return {  # of what is inside a module kept whole, the region inside knows more than that around
        name: _describe(view, candidate)
        for view in views.values()
        for name, candidate in view.candidates.items()
    }


def _describe(view: GraphView, candidate: Candidate) -> SiteInfo:
    module = candidate.module
    if module is None:
        return _describe_call(view, candidate)
    match = match_site(view, candidate)
    site = match if isinstance(match, Site) else None
    kernels = [masked_weight(module)]
    live_taps = None
    if site is not None and site.spre is not None:
        kernels.append(spre_weight(site))
        live_taps = _live_taps(kernels[1])
    nonzeros = [int(kernel.count_nonzero()) for kernel in kernels]
    record = records.read(module)
    pattern = _pattern(module, record)
    unstructured = "unstructured" in record or _is_unstructured(module)
    return SiteInfo(
        name=candidate.name,
        state=_state(module, record, live_taps),
        structure=_structure(module, "unstructured" if unstructured else pattern, site),
        weight_shape=tuple(module.weight.shape),
        pattern=pattern,
        density=nonzeros[0] / module.weight.numel(),
        live_taps=live_taps,
        parameters=sum(p.numel() for part in _parts(module, site) for p in part.parameters()),
        nonzeros=sum(nonzeros),
        backend=record.get("backend"),
        dense_ms=record.get("dense_ms"),
        chosen_ms=record.get("chosen_ms"),
        reason=None if pattern else record.get("reason"),
        note="; ".join(record[key] for key in _NOTES if key in record),
    )


_NOTES: tuple[Literal["note", "permutation"], ...] = ("note", "permutation")


def _describe_call(view: GraphView, candidate: Candidate) -> SiteInfo:
    """A functional call, or a weight that attention kept whole reads by itself."""
    weight = view.tensor(candidate.name if candidate.inside else f"{candidate.name}.weight")
    what, reason = "nn.MultiheadAttention", Reason.OPAQUE
    note = f"is read by {candidate.inside}, which is kept whole"
    if candidate.calls:
        function = getattr(candidate.calls[0].target, "__name__", "function")
        what, reason = f"F.{function}", Reason.FUNCTIONAL
        call = read_layer(view, candidate)
        why = call.detail if isinstance(call, Skip) else f"{function} is called as a function"
        note = why.removeprefix(f"{candidate.name}: ")
    return SiteInfo(
        name=candidate.name,
        state=State.DENSE,
        structure=what,
        weight_shape=() if weight is None else tuple(weight.shape),
        pattern=None,
        density=1.0,
        live_taps=None,
        parameters=0 if weight is None else weight.numel(),
        nonzeros=0 if weight is None else int(weight.count_nonzero()),
        backend=None,
        dense_ms=None,
        chosen_ms=None,
        reason=str(reason),
        note=f"{candidate.name}: {note}",
    )


def _is_unstructured(module: nn.Module) -> bool:
    return isinstance(module, NMLayer) and isinstance(module.method, UnstructuredMethod)


def _pattern(module: nn.Module, record: records.Record) -> str | None:
    if isinstance(module, NMLayer):
        return None if _is_unstructured(module) else str(module.pattern)
    return record.get("pattern")


def _live_taps(weight: Tensor) -> tuple[int, int]:
    taps = weight.flatten(2).count_nonzero(dim=(0, 1))
    return int(taps.count_nonzero()), taps.numel()


def _state(module: nn.Module, record: records.Record, live_taps: object) -> State:
    if _is_unstructured(module):
        return State.UNSTRUCTURED
    if "unstructured" in record:
        return State.DEPLOYED_UNSTRUCTURED
    if isinstance(module, NMLayer):
        return State.NM if live_taps is None else State.SPRE
    if "pattern" in record:
        return State.DEPLOYED
    return State.SKIPPED if "reason" in record else State.DENSE


def _structure(module: nn.Module, sparsity: str | None, site: Site | None) -> str:
    kind = type(module).__name__.removeprefix("NM")
    main = kind
    if sparsity is not None:
        main = f"unstructured {kind}" if sparsity == "unstructured" else f"N:M {kind}"
    if site is None:
        return main
    return f"{main} -> BN" if site.spre is None else f"{main} -> BN + SpRe -> BN"


def _parts(module: nn.Module, site: Site | None) -> list[nn.Module]:
    if site is None:
        return [module]
    spre = [] if site.spre is None else [site.spre.layer, site.spre.norm]
    return [module, site.norm, *spre]
