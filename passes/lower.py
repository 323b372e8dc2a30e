"""Lowers each folded N:M layer to what runs it: the choice of a backend, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule

from spre_fx import records
from spre_fx.backends import Backend
from spre_fx.passes.base import Account, Pass, Reason, Skip
from spre_fx.passes.edit import replace_module
from spre_fx.passes.graph_view import Candidate, GraphView
from spre_fx.patterns import Pattern


@dataclass(frozen=True)
class Lower(Pass):
    """Hand every folded N:M layer to the backend. One of a flat pattern stays a dense op.

    Attributes:
        backend: What to lower to.
    """

    backend: Backend

    def rewrite(self, graph_module: GraphModule) -> Account:
        """Replace each layer by what the backend makes of it, and write down the choice."""
        view = GraphView(graph_module)
        found = {name: self._lower(candidate) for name, candidate in view.candidates.items()}
        for name, module in found.items():
            if isinstance(module, nn.Module):
                replace_module(graph_module, name, module)
        skipped = {name: skip for name, skip in found.items() if isinstance(skip, Skip)}
        return Account(tuple(name for name in found if name not in skipped), skipped)

    def _lower(self, candidate: Candidate) -> nn.Module | Skip:
        record = records.read(candidate.module) if candidate.module is not None else {}
        if candidate.module is None or "pattern" not in record:
            detail = f"{candidate.name}: carries no N:M pattern"
            return Skip(Reason.NOT_SPARSE, detail)
        if "backend" in record:
            detail = f"{candidate.name}: is lowered to {record['backend']}"
            return Skip(Reason.ALREADY_DONE, detail)
        pattern = Pattern.parse(record["pattern"])
        if pattern.flat:
            detail = f"groups of {pattern} straddle filters, which no sparse op can take"
            records.write(candidate.module, record | records.Record(note=f"not lowered: {detail}"))
            return Skip(Reason.REFUSED, f"{candidate.name}: {detail}")
        lowered = self.backend.lower(candidate.module, pattern)
        if isinstance(lowered, str):
            return Skip(Reason.REFUSED, f"{candidate.name}: {lowered}")
        choice = records.Record(backend=self.backend.name, note=lowered.why)
        records.write(lowered.module, record | choice)
        return lowered.module
