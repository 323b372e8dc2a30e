"""Which channels of a model are the same channel, and which may change places.

Every channel a layer makes is an atom. A value of the graph is an array of atoms along its channel
axis: a batch norm passes its array on, a concatenation joins arrays, a sum makes atoms at the same
position one atom. Two atoms may change places when they stand in the same arrays: then every array
still holds the atoms it held, in another order, and each tensor along a channel axis follows it.
Where an operation may depend on the order, its atoms are fixed, with the reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from networkx.utils import UnionFind
from torch import Tensor

from spre_fx.passes.base import Reason

Atoms = tuple[int, ...]


@dataclass(frozen=True)
class Channels:
    """A value with known channels.

    Attributes:
        atoms: The channels, in order.
        axis: The channel axis, counted from the right: -3 behind a `nn.Conv2d`.
        ndim: Number of axes, None where it is not known.
        spread: Whether the axis was flattened together with a feature map of unknown size, so that
            each channel spans an equal number of consecutive features.
    """

    atoms: Atoms
    axis: int
    ndim: int | None
    spread: bool = False

    @property
    def is_feature_map(self) -> bool:
        """Whether the channels are axis 1, right behind the batch."""
        return self.ndim is not None and self.axis == 1 - self.ndim


@dataclass(frozen=True)
class Fixed:
    """Why channels keep their order.

    Attributes:
        reason: One of the passes' closed list.
        detail: The rest of a sentence that begins "its input channels".
    """

    reason: Reason
    detail: str


@dataclass(frozen=True)
class Slot:
    """A tensor that follows the order of an array along one axis.

    Attributes:
        tensor: A parameter or buffer.
        axis: The axis.
        atoms: The array; for a grouped conv's input, of all groups together.
        groups: Equal parts of axis 0 that each index `axis` with their own part of the array.
    """

    tensor: Tensor
    axis: int
    atoms: Atoms
    groups: int = 1


class ChannelFlow:
    """The atoms of a model, what is known to be equal or fixed, and the tensors that follow."""

    def __init__(self) -> None:
        self._union: UnionFind[int] = UnionFind()
        self._count = 0
        self._fixed: list[tuple[Atoms, Fixed]] = []
        self._arrays: list[Atoms] = []
        self.slots: dict[tuple[int, int], Slot] = {}
        self.inputs: dict[int, Channels] = {}
        self.outputs: dict[int, Atoms] = {}

    def new(self, count: int) -> Atoms:
        """An array of atoms that nothing is known of yet."""
        atoms = tuple(range(self._count, self._count + count))
        self._count += count
        return self.array(atoms)

    def array(self, atoms: Sequence[int]) -> Atoms:
        """Note an array: its atoms only change places among themselves."""
        self._arrays.append(tuple(atoms))
        return self._arrays[-1]

    def unify(self, left: Atoms, right: Atoms) -> None:
        """Make atoms at the same position one atom."""
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            if one != other:
                self._union.union(one, other)

    def fix(self, atoms: Iterable[int], why: Fixed) -> None:
        """Let atoms keep their places. The first reason given stays."""
        self._fixed.append((tuple(atoms), why))

    def follow(self, tensor: Tensor | None, axis: int, atoms: Atoms, groups: int = 1) -> None:
        """Let a tensor follow an array along an axis; called again for it, the arrays are one."""
        if tensor is None:
            return
        known = self.slots.setdefault((id(tensor), axis), Slot(tensor, axis, atoms, groups))
        self.unify(known.atoms, atoms)

    def resolve(self, atoms: Atoms) -> Atoms:
        """One representative for all atoms that are the same channel."""
        return tuple(self._union[atom] for atom in atoms)

    def fixed(self) -> dict[int, Fixed]:
        """Why each atom that keeps its place does, by representative."""
        reasons: dict[int, Fixed] = {}
        for atoms, why in self._fixed:
            for atom in self.resolve(atoms):
                reasons.setdefault(atom, why)
        return reasons

    def movable(self) -> list[Atoms]:
        """The largest sets of atoms that may change places among themselves, two or more each."""
        places: dict[int, list[int]] = defaultdict(list)
        for number, array in enumerate(self._arrays):
            for atom in self.resolve(array):
                places[atom].append(number)
        sets: dict[tuple[int, ...], list[int]] = defaultdict(list)
        fixed = self.fixed()
        for atom, numbers in places.items():
            if atom not in fixed:
                sets[tuple(numbers)].append(atom)
        return [tuple(atoms) for atoms in sets.values() if len(atoms) > 1]

    @cached_property
    def _resolved_slots(self) -> list[tuple[Slot, Atoms]]:
        return [(slot, self.resolve(slot.atoms)) for slot in self.slots.values()]

    @cached_property
    def _followers(self) -> dict[int, list[int]]:
        """The slots, by number, that each atom stands in."""
        followers: dict[int, list[int]] = defaultdict(list)
        for number, (_, atoms) in enumerate(self._resolved_slots):
            for atom in set(atoms):
                followers[atom].append(number)
        return followers

    @torch.no_grad()
    def reorder(self, goes_to: dict[int, int]) -> None:
        """Put, wherever atom `a` stands, the channel of atom `goes_to[a]`.

        Call it when all arrays are known.
        """
        slots = dict.fromkeys(number for atom in goes_to for number in self._followers[atom])
        for number in slots:
            slot, atoms = self._resolved_slots[number]
            source = torch.tensor(_sources(atoms, goes_to), device=slot.tensor.device)
            if slot.groups == 1:
                slot.tensor.copy_(slot.tensor.index_select(slot.axis, source))
                continue
            parts = zip(slot.tensor.chunk(slot.groups), source.chunk(slot.groups), strict=True)
            for part, positions in parts:
                local = positions - positions.min()
                part.copy_(part.index_select(slot.axis, local))


def _sources(atoms: Atoms, goes_to: dict[int, int]) -> list[int]:
    """For each position, the one its new content comes from.

    An atom may stand in an array more than once, as when each channel spans several features: its
    first place takes from the first place of the other, and so on.
    """
    positions = defaultdict(list)
    for position, atom in enumerate(atoms):
        positions[atom].append(position)
    sources = [0] * len(atoms)
    for atom, own in positions.items():
        for position, source in zip(own, positions[goes_to.get(atom, atom)], strict=True):
            sources[position] = source
    return sources
