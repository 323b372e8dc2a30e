"""Lowers each folded N:M layer to what runs it: the choice of a backend, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.fx import GraphModule

from spre_fx import records
from spre_fx.backends import Backend, Lowered, dense, is_lowered
from spre_fx.choice import Choice, Shape, Timings
from spre_fx.passes.base import Account, Pass, Reason, Skip
from spre_fx.passes.edit import replace_module
from spre_fx.passes.graph_view import Candidate, GraphView
from spre_fx.patterns import Pattern
from spre_fx.subclasses import carry_hooks


@dataclass(frozen=True)
class Lower(Pass):
    """Run every folded N:M layer as fast as the backend can. One of a flat pattern stays dense.

    Attributes:
        backend: Whose ways to run a layer there are.
        shapes: The shapes of each layer's inputs, one for each of its calls in a forward. A layer
            that is in here is measured; of any other the backend's rule decides.
        timings: What has been measured before, and keeps what is measured now.
        progress: Whether to show a progress bar on a terminal, where tqdm is installed.
    """

    backend: Backend
    shapes: Mapping[nn.Module, Sequence[Shape]] = field(default_factory=dict)
    timings: Timings | None = field(default=None, compare=False)
    progress: bool = True

    def rewrite(self, graph_module: GraphModule) -> Account:
        """Replace each layer by what runs it, and write down the choice."""
        view = GraphView(graph_module)
        timings = self.timings or Timings(self.backend.machine)
        skipped = {}
        with _progress_bar(list(view.candidates.items()), self.progress and self.shapes) as bar:
            for name, candidate in bar:
                found = _refuse(view, candidate) or self._lower(candidate, timings)
                if isinstance(found, Skip):
                    skipped[name] = found
                else:
                    replace_module(graph_module, name, found)
        if any(map(is_lowered, graph_module.modules())):
            _allow_any_strides(graph_module)
        return Account(tuple(name for name in view.candidates if name not in skipped), skipped)

    def _lower(self, candidate: Candidate, timings: Timings) -> nn.Module | Skip:
        layer = candidate.module
        assert layer is not None
        record = records.read(layer)
        pattern = Pattern.parse(record["pattern"])
        ways = self.backend.candidates(layer, pattern)
        if isinstance(ways, str):
            choice = Choice(dense(layer, f"not lowered: {ways}"))
        else:
            choice = self._choose(layer, pattern, ways, timings)
        lowered = choice.lowered.module
        if lowered is not layer:
            carry_hooks(layer, lowered)
        records.write(lowered, record | _written(choice))
        if isinstance(ways, str):
            return Skip(Reason.REFUSED, f"{candidate.name}: {ways}")
        return lowered

    def _choose(
        self, layer: nn.Module, pattern: Pattern, ways: list[Lowered], timings: Timings
    ) -> Choice:
        shapes = self.shapes.get(layer, ())
        if ways and shapes:
            return timings.choose(layer, ways, shapes)
        return Choice(self.backend.rule(layer, pattern, ways, shapes[0] if shapes else None))


def _allow_any_strides(graph_module: GraphModule) -> None:
    """Turn views into reshapes: a lowered conv returns its output channels-last."""
    for node in graph_module.graph.nodes:
        is_view = (node.op, node.target) == ("call_method", "view")
        arguments = (*node.args, *node.kwargs.values())
        if is_view and not any(isinstance(each, torch.dtype) for each in arguments):
            node.target = "reshape"


def _refuse(view: GraphView, candidate: Candidate) -> Skip | None:
    """Why a candidate stays what it is whatever the backend, None for one that may be lowered."""
    name, module = candidate.name, candidate.module
    record = records.Record() if module is None else records.read(module)
    if module is None or "pattern" not in record:
        return Skip(Reason.NOT_SPARSE, f"{name}: carries no N:M pattern")
    if "backend" in record:
        return Skip(Reason.ALREADY_DONE, f"{name}: is lowered to {record['backend']}")
    if Pattern.parse(record["pattern"]).flat:
        pattern = record["pattern"]
        detail = f"groups of {pattern} straddle filters, which no sparse op can take"
    elif readers := [
        node.name
        for leaf in ("weight", "bias")
        for node in view.attributes.get(f"{name}.{leaf}", ())
    ]:
        detail = f"its parameters are also read by {', '.join(readers)}"
    else:
        return None
    records.write(module, record | records.Record(note=f"not lowered: {detail}"))
    return Skip(Reason.REFUSED, f"{name}: {detail}")


def _written(choice: Choice) -> records.Record:
    found = records.Record(backend=choice.lowered.kind, note=choice.lowered.why)
    if choice.dense_ms is not None and choice.chosen_ms is not None:
        found["dense_ms"], found["chosen_ms"] = choice.dense_ms, choice.chosen_ms
    return found


@contextmanager
def _progress_bar(
    candidates: list[tuple[str, Candidate]], wanted: object
) -> Iterator[Iterable[tuple[str, Candidate]]]:
    """The candidates, with a bar on a terminal where tqdm is installed and this takes a second."""
    try:
        from tqdm import tqdm
    except ImportError:
        wanted = False
    if not wanted:
        yield candidates
        return
    with tqdm(candidates, desc="measuring layers", unit="layer", disable=None, delay=1) as bar:
        yield bar
