"""Puts input channels in the order that keeps the most magnitude under the N:M masks.

    y = W x = (W P^T) (P x)         P x made by permuting the rows of whatever makes x

Pool & Yu, "Channel permutations for N:M sparsity", NeurIPS 2021, here for any N:M. One order serves
all layers that take the same channels. The network computes what it did: rows of the makers, the
batch norms and depthwise convs between, and columns of the takers follow. Shapes and names stay.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from spre_fx import masks, records
from spre_fx.errors import InvariantError
from spre_fx.modules import Layer, NMLayer, SpReConv
from spre_fx.passes.base import Account, Pass, Reason, Skip
from spre_fx.passes.channel_flow import Atoms, ChannelFlow, Fixed
from spre_fx.passes.channel_rules import follow_channels
from spre_fx.passes.graph_view import Candidate, GraphView
from spre_fx.passes.policy import Policy
from spre_fx.patterns import Pattern
from spre_fx.permutation import ChannelPermutation, Consumer, best_order


@dataclass(frozen=True)
class PermuteChannels(Pass):
    """Reorder the input channels of every N:M layer whose makers can follow.

    Applied are the layers whose input channels changed places. The kept magnitude of all layers
    that share an order never falls, though that of one of them may. Axis 0 of a feature map is
    taken to be the batch. Layers that were permuted before for the same pattern are left alone.

    Attributes:
        policy: The pattern of each layer; dense layers follow their neighbours.
        search: How long to search, and from which seed.
    """

    policy: Policy
    search: ChannelPermutation

    def requires(self, graph_module: GraphModule) -> None:
        """Masks and SpRe branches come after."""
        for name, module in graph_module.named_modules():
            if isinstance(module, NMLayer | SpReConv):
                raise InvariantError(
                    f"{name}: expected a dense graph, found a {type(module).__name__}, whose mask "
                    "was made for the order of its channels. Run PermuteChannels before "
                    "DuplicateBranches and WireMasks."
                )

    @torch.no_grad()
    def rewrite(self, graph_module: GraphModule) -> Account:
        """Reorder weights, batch norms and biases, one set of channels after the other."""
        view = GraphView(graph_module)
        patterns = {
            name: self.policy.pattern_for(view, candidate)
            for name, candidate in view.candidates.items()
        }
        flow = follow_channels(view)
        skipped = {name: skip for name, skip in patterns.items() if isinstance(skip, Skip)}
        takers = {
            name: _Taker(name, candidate, pattern, flow)
            for name, candidate in view.candidates.items()
            if isinstance(pattern := patterns[name], Pattern)
        }
        before = {name: taker.kept() for name, taker in takers.items()}
        moved = self._reorder_all(flow, takers)
        fixed = flow.fixed()
        for name, taker in takers.items():
            if name not in moved:
                skipped[name] = taker.reason_to_stay(fixed)
            taker.note(before[name], skipped.get(name))
        return Account(tuple(name for name in takers if name not in skipped), skipped)

    def _reorder_all(self, flow: ChannelFlow, takers: Mapping[str, _Taker]) -> set[str]:
        """Search an order for every set of channels; the layers whose channels moved."""
        jobs = [job for atoms in flow.movable() if (job := _Job.of(atoms, takers.values()))]
        budget = self.search.seconds
        deadline = None if budget is None else time.monotonic() + budget
        left, moved = sum(job.cost for job in jobs), set()
        with _progress_bar(jobs, self.search.progress) as bar:
            for job in bar:
                share = None
                if deadline is not None:
                    share = max(0.0, deadline - time.monotonic()) * job.cost / left
                left -= job.cost
                if job.run(flow, self.search, share):
                    moved |= {taker.name for taker in job.movers}
        return moved


class _Taker:
    """An N:M layer and the channels it takes."""

    def __init__(
        self, name: str, candidate: Candidate, pattern: Pattern, flow: ChannelFlow
    ) -> None:
        assert candidate.module is not None
        incoming = flow.inputs.get(id(candidate.module))
        self.name, self.pattern, self.layer = name, pattern, candidate.module
        self.spread = incoming is not None and incoming.spread
        self.atoms: Atoms = () if incoming is None else flow.resolve(incoming.atoms)
        self.present = set(self.atoms)
        self.movable = False
        self.done = _note_of(self.layer).startswith(f"{pattern} ")

    def kept(self) -> float:
        """Magnitude the N:M mask of the weight as it is keeps."""
        weight = self.layer.weight
        return float((weight * masks.nm_mask(weight, self.pattern)).abs().sum(dtype=torch.float64))

    def consumer(self, atoms: Atoms) -> Consumer | None:
        """What a search needs to know, None where no exchange of these could change a mask."""
        positions = {atom: place for place, atom in enumerate(self.atoms)}
        if self.pattern.flat or self.spread or len(positions) < len(self.atoms):
            return None
        slots = torch.tensor([positions[atom] for atom in atoms], device=self.layer.weight.device)
        groups, channels = getattr(self.layer, "groups", 1), self.layer.weight.shape[1]
        block = int(slots[0]) // channels
        weight = self.layer.weight.detach().chunk(groups)[block]
        slots = slots - block * channels
        if len((slots // self.pattern.m).unique()) < 2:
            return None
        magnitude = weight.abs().transpose(0, 1).reshape(channels, -1)
        return Consumer(magnitude, self.pattern, slots)

    def reason_to_stay(self, fixed: Mapping[int, Fixed]) -> Skip:
        """Why the input channels kept their order."""
        if self.movable and self.done:
            detail = f"its input channels were put in order before, for {self.pattern}"
            return Skip(Reason.ALREADY_DONE, f"{self.name}: {detail}")
        if self.movable:
            detail = "no exchange of its input channels was found to keep more magnitude"
            return Skip(Reason.BEST_ORDER, f"{self.name}: {detail}")
        if self.pattern.flat:
            detail = "depthwise, its channels follow the order that other layers choose"
            return Skip(Reason.DEPTHWISE, f"{self.name}: {detail}")
        if self.spread:
            times = len(self.atoms) // len(self.present)
            detail = f"each channel spans {times} of its features, and moves them together"
            return Skip(Reason.SPANS_FEATURES, f"{self.name}: {detail}")
        for atom in self.atoms:
            if atom in fixed:
                why = fixed[atom]
                return Skip(why.reason, f"{self.name}: its input channels {why.detail}")
        detail = f"no two channels of different groups of M={self.pattern.m} may change places"
        return Skip(Reason.ONE_GROUP, f"{self.name}: {detail}")

    def note(self, before: float, skip: Skip | None) -> None:
        """Write down what became of the layer, for `sites`."""
        if self.done:
            return
        total = float(self.layer.weight.abs().sum(dtype=torch.float64)) or 1.0
        shares = f"{before / total:.4f} -> {self.kept() / total:.4f}"
        why = "permuted" if skip is None else skip.detail.removeprefix(f"{self.name}: ")
        sentence = f"{self.pattern} keeps {shares} of the magnitude: {why}"
        records.write(self.layer, records.read(self.layer) | records.Record(permutation=sentence))


def _note_of(layer: Layer) -> str:
    return records.read(layer).get("permutation", "")


@dataclass(frozen=True)
class _Job:
    """A set of channels to put in order.

    Attributes:
        atoms: The channels.
        takers: Every N:M layer that takes them.
        movers: Those of them that the order is chosen for.
        cost: Elements of the matrices of one sweep.
    """

    atoms: Atoms
    takers: tuple[_Taker, ...]
    movers: tuple[_Taker, ...]
    cost: int

    @classmethod
    def of(cls, atoms: Atoms, takers: Iterable[_Taker]) -> _Job | None:
        """The job of one set of channels, None where no order could keep more."""
        mine = tuple(taker for taker in takers if not taker.present.isdisjoint(atoms))
        consumers = {taker: taker.consumer(atoms) for taker in mine}
        movers = tuple(taker for taker, consumer in consumers.items() if consumer is not None)
        for taker in movers:
            taker.movable = True
        if all(taker.done for taker in movers):
            return None
        rows = sum(taker.layer.weight[:, 0].numel() for taker in movers)
        return cls(atoms, mine, movers, len(atoms) ** 2 * rows)

    def run(self, flow: ChannelFlow, search: ChannelPermutation, seconds: float | None) -> bool:
        """Search and reorder; whether more magnitude is kept. If not, all is as it was."""
        consumers = [taker.consumer(self.atoms) for taker in self.movers]
        order = best_order([c for c in consumers if c is not None], search, seconds).tolist()
        goes_to = {atom: self.atoms[source] for atom, source in zip(self.atoms, order, strict=True)}
        if all(atom == other for atom, other in goes_to.items()):
            return False
        before = self._kept()
        flow.reorder(goes_to)
        if self._kept() > before:
            return True
        flow.reorder({other: atom for atom, other in goes_to.items()})
        return False

    def _kept(self) -> float:
        return sum(taker.kept() for taker in self.takers)


@contextmanager
def _progress_bar(jobs: list[_Job], wanted: bool) -> Iterator[Iterable[_Job]]:
    """The jobs, with a bar on a terminal where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        wanted = False
    if not wanted:
        yield jobs
        return
    with tqdm(jobs, desc="permuting channels", unit="set", disable=None) as bar:
        yield bar
