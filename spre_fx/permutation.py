"""Which order of channels keeps the most magnitude under an N:M mask (Pool & Yu, NeurIPS 2021).

Input channels of a layer may change places, as long as whatever makes them follows. Only which
channels share a group matters. Take channel i of one group and j of another. With theta_i the N-th
largest magnitude of i's group without i, for each row of the weight, exchanging the two changes the
kept magnitude by

    sum max(|w_j| - theta_i, 0) - max(|w_i| - theta_i, 0)  + the same with i and j exchanged
  = (D_ij - D_ii + D_ji - D_jj) / 2      with D_ij = sum |theta_i - |w_j||,

so one matrix of L1 distances holds the gain of every exchange, and an exchange changes only the
rows of D that belong to the two groups.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spre_fx.errors import OptionError
from spre_fx.patterns import Pattern


@dataclass(frozen=True)
class ChannelPermutation:
    """How long, and from which seed, to search for an order of channels.

    A sweep exchanges, in disjoint pairs of groups, the channels that gain most. Where no exchange
    gains, the channels of a few groups are dealt again at random, and the result is kept if sweeps
    from there end higher. The result is a function of the weights, `sweeps` and `seed`; a limit in
    seconds makes it depend on the machine as well.

    Attributes:
        sweeps: Most sweeps for one set of channels.
        seconds: Time limit for the whole model, shared out by the size of each search. None: none.
        seed: Seed of the random deals.
        progress: Whether to show a progress bar on a terminal, where tqdm is installed.

    Raises:
        OptionError: If sweeps < 1 or seconds <= 0.
    """

    sweeps: int = 100
    seconds: float | None = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise OptionError(f"ChannelPermutation(sweeps={self.sweeps}): expected sweeps >= 1.")
        if self.seconds is not None and not self.seconds > 0:
            raise OptionError(
                f"ChannelPermutation(seconds={self.seconds}): expected seconds > 0, or None."
            )


@dataclass(frozen=True)
class Consumer:
    """A layer that takes the channels to be put in order.

    Attributes:
        magnitude: `(C_in/groups, rows)`: |W| with input channels first, filters and taps behind.
        pattern: Its N:M pattern.
        slots: `(S,)`: the positions among its channels that may change places.
    """

    magnitude: Tensor
    pattern: Pattern
    slots: Tensor


def best_order(
    consumers: Sequence[Consumer], options: ChannelPermutation, seconds: float | None = None
) -> Tensor:
    """An order of the S channels that keeps at least as much magnitude as the one they are in.

    Args:
        consumers: Every N:M layer that takes the channels. Slot k is the same channel in each.
        options: Sweeps and seed.
        seconds: Time limit for this search; None for none.

    Returns:
        `(S,)` int64 on the CPU: slot k receives the channel that was in slot `order[k]`.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    search = _Search(consumers)
    generator = torch.Generator().manual_seed(options.seed)
    best, failures = search.snapshot(), 0
    for _ in range(options.sweeps):
        before = search.kept
        if search.sweep() and search.kept > before:
            if deadline is not None and time.monotonic() > deadline:
                break
            continue
        late = deadline is not None and time.monotonic() > deadline
        failures = 0 if search.kept > best.kept else failures + 1
        best = search.snapshot() if search.kept > best.kept else best
        if late or failures > len(search.order) or len(search.clusters) < 2:
            break
        search.restore(best)
        search.deal(generator)
    return (search.snapshot() if search.kept > best.kept else best).order.cpu()


@dataclass(frozen=True)
class _Snapshot:
    order: Tensor
    kept: float
    distances: tuple[Tensor, ...]
    kept_of_group: tuple[Tensor, ...]


class _Search:
    """The state of a search: which channel each slot holds, and the matrices D of that order."""

    def __init__(self, consumers: Sequence[Consumer]) -> None:
        slots = len(consumers[0].slots)
        self.device = consumers[0].magnitude.device
        self.parts = _parts(consumers)
        self.order = torch.arange(slots, device=self.device)
        self.cluster_of = _clusters([part.group_of for part in self.parts])
        self.clusters = _padded_members(self.cluster_of, absent=slots)
        for part in self.parts:
            part.update(torch.arange(len(part.members), device=self.device), self.order)

    @property
    def kept(self) -> float:
        """Kept magnitude of all groups that hold a slot."""
        return sum(float(part.kept_of_group.sum()) for part in self.parts)

    def snapshot(self) -> _Snapshot:
        return _Snapshot(
            self.order.clone(),
            self.kept,
            tuple(part.distance.clone() for part in self.parts),
            tuple(part.kept_of_group.clone() for part in self.parts),
        )

    def restore(self, snapshot: _Snapshot) -> None:
        self.order = snapshot.order.clone()
        for part, distance, kept in zip(
            self.parts, snapshot.distances, snapshot.kept_of_group, strict=True
        ):
            part.distance.copy_(distance)
            part.kept_of_group.copy_(kept)

    def sweep(self) -> bool:
        """Exchange the channels that gain most, in disjoint pairs of clusters; whether any did."""
        gain = self.parts[0].gain(self.order)
        for part in self.parts[1:]:
            gain += part.gain(self.order)
        scale = max(float(part.distance.mean()) for part in self.parts)
        pairs = _disjoint_best(gain, self.clusters, 4 * torch.finfo(gain.dtype).eps * scale)
        if len(pairs):
            left, right = pairs.unbind(1)
            self._hold(torch.cat([left, right]), self.order[torch.cat([right, left])])
        return len(pairs) > 0

    def deal(self, generator: torch.Generator) -> None:
        """Deal the channels of two or three clusters again at random."""
        count = min(len(self.clusters), 2 + int(torch.randint(2, (), generator=generator)))
        chosen = torch.randperm(len(self.clusters), generator=generator)[:count].to(self.device)
        slots = self.clusters[chosen].flatten()
        slots = slots[slots < len(self.order)]
        dealt = torch.randperm(len(slots), generator=generator).to(self.device)
        self._hold(slots, self.order[slots[dealt]])

    def _hold(self, slots: Tensor, channels: Tensor) -> None:
        self.order[slots] = channels
        for part in self.parts:
            part.update(part.group_of[slots].unique(), self.order)


class _Part:
    """Consumers that group the slots alike, with their rows side by side.

    Args:
        columns: `(S + fixed + 1, rows)`: magnitudes of the channels to be ordered, of those that
            share a group with them but stay, and zeros for the padding.
        members: `(groups, M)`: the columns of each group, of the slots rather than the channels.
        slots: S.
        n: N of the pattern.
    """

    def __init__(self, columns: Tensor, members: Tensor, slots: int, n: int) -> None:
        self.columns, self.members, self.n = columns, members, n
        self.distance = columns.new_empty(slots, slots)
        self.kept_of_group = torch.zeros(len(members), dtype=torch.float64, device=columns.device)
        self.fixed = torch.arange(slots, len(columns), device=columns.device)
        self.group_of = torch.empty(slots, dtype=torch.int64, device=columns.device)
        group, place = (members < slots).nonzero(as_tuple=True)
        self.group_of[members[group, place]] = group

    def update(self, groups: Tensor, order: Tensor) -> None:
        """Recompute what depends on who is in `groups`."""
        members = self.members[groups]
        value = self.columns[torch.cat([order, self.fixed])[members]]  # (groups, M, rows)
        largest = _largest(value, self.n + 1)
        self.kept_of_group[groups] = torch.stack(
            [part.sum(1, dtype=torch.float64) for part in largest[: self.n]]
        ).sum(0)
        nth, runner_up = largest[self.n - 1].unsqueeze(1), largest[self.n].unsqueeze(1)
        theta = torch.where(value >= nth, runner_up, nth)
        is_slot = members < len(order)
        channels = self.columns[: len(order)]
        self.distance[members[is_slot]] = torch.cdist(theta[is_slot], channels, p=1)

    def gain(self, order: Tensor) -> Tensor:
        """`(S, S)`: what exchanging the channels of two slots gains, nothing within a group."""
        distance = self.distance[:, order]
        gain = distance - distance.diagonal().unsqueeze(1).clone()
        gain = (gain + gain.T) / 2
        return gain.masked_fill_(self.group_of.unsqueeze(1) == self.group_of, 0)


def _largest(value: Tensor, count: int) -> list[Tensor]:
    """The `count` largest over axis 1, in falling order. Faster than a sort of short rows."""
    largest: list[Tensor] = []
    for rest in value.unbind(1):
        falling = rest
        for rank, held in enumerate(largest):
            largest[rank], falling = torch.maximum(held, falling), torch.minimum(held, falling)
        if len(largest) < count:
            largest.append(falling)
    return largest


def _parts(consumers: Sequence[Consumer]) -> list[_Part]:
    alike: dict[tuple[object, ...], tuple[Tensor, int, list[Tensor]]] = {}
    for consumer in consumers:
        members, columns = _members_and_columns(consumer)
        # One column more in the place of the padding is a channel that stays.
        key = (consumer.pattern, len(columns), tuple(members.flatten().tolist()))
        alike.setdefault(key, (members, consumer.pattern.n, []))[2].append(columns)
    slots = len(consumers[0].slots)
    return [_Part(torch.cat(cs, 1), members, slots, n) for members, n, cs in alike.values()]


def _members_and_columns(consumer: Consumer) -> tuple[Tensor, Tensor]:
    channels, device = len(consumer.magnitude), consumer.magnitude.device
    m, count = consumer.pattern.m, len(consumer.slots)
    groups = torch.arange(-(-channels // m) * m, device=device).view(-1, m)
    groups = groups[(consumer.slots // m).unique()]
    moves = torch.isin(groups, consumer.slots)
    stays = groups[~moves & (groups < channels)]
    column = torch.full((int(groups.max()) + 1,), count + len(stays), device=device)
    column[consumer.slots] = torch.arange(count, device=device)
    column[stays] = torch.arange(count, count + len(stays), device=device)
    magnitude = consumer.magnitude
    magnitude = magnitude if magnitude.dtype == torch.float64 else magnitude.float()
    zeros = magnitude.new_zeros(1, magnitude.shape[1])
    return column[groups], torch.cat([magnitude[consumer.slots], magnitude[stays], zeros])


def _clusters(groupings: Sequence[Tensor]) -> Tensor:
    """Numbers the smallest sets of slots that no grouping divides a group of."""
    cluster = groupings[0]
    while True:
        before = cluster
        for group_of in groupings[1:]:
            lowest = torch.full_like(cluster, len(cluster))
            lowest = lowest.scatter_reduce(0, group_of, cluster, "amin")
            cluster = lowest[group_of]
            lowest = torch.full_like(cluster, len(cluster))
            lowest = lowest.scatter_reduce(0, groupings[0], cluster, "amin")
            cluster = lowest[groupings[0]]
        if torch.equal(cluster, before):
            numbers: Tensor = cluster.unique(return_inverse=True)[1]
            return numbers


def _padded_members(cluster_of: Tensor, absent: int) -> Tensor:
    """`(clusters, largest cluster)`: the slots of each, padded with `absent`."""
    sizes = cluster_of.bincount()
    table = torch.full((len(sizes), int(sizes.max())), absent, device=cluster_of.device)
    slots = cluster_of.argsort(stable=True)
    first = sizes.cumsum(0) - sizes
    cluster = cluster_of[slots]
    place = torch.arange(len(slots), device=slots.device) - first[cluster]
    table[cluster, place] = slots
    return table


def _disjoint_best(gain: Tensor, clusters: Tensor, least: float) -> Tensor:
    """`(pairs, 2)`: exchanges of slots by falling gain, no cluster in two of them.

    Two clusters that are each other's best partner can be exchanged at once, whatever the others
    do, so a round takes all such pairs.
    """
    count, size = clusters.shape
    padded = torch.nn.functional.pad(gain, (0, 1, 0, 1), value=float("-inf"))
    blocks = padded[clusters.flatten()][:, clusters.flatten()].view(count, size, count, size)
    blocks = blocks.transpose(1, 2).reshape(count, count, size * size)
    best, where = blocks.max(2)
    numbers, pairs = torch.arange(count, device=gain.device), []
    while True:
        value, partner = best.max(1)
        if float(value.max()) <= least:
            break
        mutual = (partner[partner] == numbers) & (numbers <= partner) & (value > least)
        left = mutual.nonzero()[:, 0] if bool(mutual.any()) else value.argmax().unsqueeze(0)
        right = partner[left]
        inside = where[left, right]
        pairs.append(
            torch.stack([clusters[left, inside // size], clusters[right, inside % size]], 1)
        )
        taken = torch.cat([left, right])
        best[taken] = best[:, taken] = float("-inf")
    return torch.cat(pairs) if pairs else clusters.new_empty(0, 2)
