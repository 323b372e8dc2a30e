"""LBC: the N:M mask as the best of all combinations of N out of M, learnt with the weights.

Zhang, Lin, Lin, Luo, Li, Chao, Wu and Ji, "Learning best combination for efficient N:M sparsity",
NeurIPS 2022, as the authors' code (zyxxmu/LBC) has it. Each group of M weights has one score per
combination of N of them. For a group with scores s, the combinations still there R, and A the 0-1
matrix of combinations and members:

    forward    B_i = 1 if a combination of R holds member i, else 0
    backward   dL/ds_c = sum_i A_ci * dL/dB_i  for c in R, 0 for the removed      (straight through)
               hence, with y computed from B * W:  dL/ds_c = sum_{i in c} W_i * dL/d(B_i W_i)
    removal    at an update step t, the lowest scores of each group go until
               1 + ceil((C - 1) * (1 - (t - t_i) / (t_f - t_i))^3)  of its C combinations are left

Scores start at 1 / C(M-1, N-1), so that those of the combinations that hold a member sum to 1.
Weights take the gradient B * g. Deviations: a member is held if a combination of R holds it, not
if the scores of those sum to something other than 0, which for learnt scores is the same but by
accident; removed combinations are a buffer, not scores set to 0; equal scores go by index; t
counts training forwards, not epochs.

Before t_f, B holds more than N of M. Evaluation, `finalize` and `sites` therefore take the one
remaining combination with the highest score, which is what would be left: always N:M. (The
authors evaluate with B as it stands; the two are the same from t_f on.)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from spre_fx import masks
from spre_fx.errors import OptionError
from spre_fx.masked_weight import masked_weight
from spre_fx.methods import MaskMethod
from spre_fx.operators import operator
from spre_fx.patterns import Pattern
from spre_fx.schedules import CubicRamp, Schedule


@dataclass(frozen=True)
class LBC(MaskMethod):
    """LBC (Zhang et al., NeurIPS 2022): a learnt score per combination, the best one is left.

    Needs `schedule=CubicRamp(t_i, t_f)`. The scores `<site>.nm_mask.scores` are parameters: the
    optimizer has to get them, with the others of the prepared model. With a SpRe branch they take
    the gradient of both branches, since B^S is made of B.

    Attributes:
        most: Combinations of N out of M that are let in. 1,000 scores per group of 16 weights are
            already 60 times the weights.

    Raises:
        OptionError: If most < 2.
    """

    most: int = 1000
    # Nor does B need one there: no combination that remains holds a member that B does not.
    kept_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.most < 2:
            raise OptionError(f"LBC(most={self.most}): expected most >= 2 combinations.")

    def check(self, patterns: Collection[Pattern], schedule: Schedule) -> None:
        """Refuse patterns with too many combinations, and schedules that are no ramp."""
        for pattern in patterns:
            count = comb(pattern.m, pattern.n)
            if count > self.most:
                raise OptionError(
                    f"LBC: {pattern} has {count:,} combinations of {pattern.n} out of "
                    f"{pattern.m}, each with a score in every group; expected at most "
                    f"{self.most:,}. Take a smaller M, another method, or LBC(most={count})."
                )
        if not isinstance(schedule, CubicRamp):
            raise OptionError(
                f"LBC: expected schedule=CubicRamp(t_i, t_f), the steps between which combinations "
                f"are removed, found {schedule}."
            )

    def mask_module(self, weight: Tensor, pattern: Pattern, *, keep: bool) -> nn.Module:  # noqa: ARG002
        """The scores and what is left of the combinations; always kept."""
        return CombinationMask(weight, pattern)

    def signal(self, schedule: Schedule, step: Tensor) -> Tensor:
        """The share of the combinations to be left, negative where none are to be removed."""
        assert isinstance(schedule, CubicRamp)
        return torch.where(schedule.is_update(step), schedule.left(step), -1.0)

    def masked(self, weight: Tensor, mask: Tensor) -> Tensor:
        """B * W, with the ordinary gradients: B * g to W, W * g to B and so to the scores."""
        return masked_weight(weight, mask)


class CombinationMask(nn.Module):
    """B of LBC: scores, removed combinations, and the mask they make.

    Args:
        weight: `(C_out, C_in/groups, *kernel)`. A last partial group counts as padded with zeros;
            combinations that spend members on the padding are removed from the start.
        pattern: The N:M pattern.

    Attributes:
        scores: Parameter `(C_out, groups, *kernel, C)`, one per combination; `(1, groups, C)` for a
            flat pattern.
        removed: Bool buffer of the same shape.
        members: The 0-1 matrix A, `(C, M)`; not in the `state_dict`.
    """

    per_rank: ClassVar[tuple[str, ...]] = ("removed", "members")
    removed: Tensor
    members: Tensor

    def __init__(self, weight: Tensor, pattern: Pattern) -> None:
        super().__init__()
        self.pattern = pattern
        self.weight_shape = weight.shape
        rows = masks.group_rows(weight, pattern)
        self.channels = rows.shape[1]
        groups = -(-self.channels // pattern.m)
        shape = (len(rows), groups, *rows.shape[2:], comb(pattern.m, pattern.n))
        start = 1 / comb(pattern.m - 1, pattern.n - 1)
        self.scores = nn.Parameter(weight.new_full(shape, start))
        self.register_buffer("removed", torch.zeros_like(self.scores, dtype=torch.bool))
        members = [
            [float(member in chosen) for member in range(pattern.m)]
            for chosen in combinations(range(pattern.m), pattern.n)
        ]
        self.register_buffer("members", weight.new_tensor(members), persistent=False)
        last = self.channels - (groups - 1) * pattern.m
        wasteful = self.members[:, :last].sum(1) < min(pattern.n, last)
        self.removed[:, -1] = wasteful
        self._held: _Held | None = None

    def forward(self, weight: Tensor, left: Tensor | None) -> Tensor:  # noqa: ARG002
        """B in the dtype of the scores.

        Args:
            weight: `(C_out, C_in/groups, *kernel)`; B does not depend on it.
            left: What `LBC.signal` says, in the graph of a model. None: the best combinations.
        """
        if left is None or not self.training:
            best = _ranking(self.scores.detach(), self.removed)[..., 0]
            return self._to_weight(self.members[best])
        if _may_remove(left):
            _remove(self.removed, self.scores.detach(), left)
        held = self._remaining()
        mask: Tensor = _StraightThrough.apply(
            self.scores, held.mask, held.removed, self.members, self.pattern
        )
        return mask

    def _remaining(self) -> _Held:
        """What the remaining combinations hold, which is the same until more are removed."""
        if torch.compiler.is_compiling() or self.removed.is_inference():
            return self._hold(version=-1)
        held, version = self._held, self.removed._version
        if (
            held is None
            or held.of is not self.removed
            or held.version != version
            or held.mask.dtype != self.scores.dtype
        ):
            held = self._held = self._hold(version)
        return held

    def _hold(self, version: int) -> _Held:
        members = _held_members(self.removed, self.members.to(self.scores.dtype))
        mask = self._to_weight(members)
        return _Held(self.removed, version, self.removed.clone(), mask)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": None}

    def _to_weight(self, groups: Tensor) -> Tensor:
        """`(C_out, groups, *kernel, M)` -> `(C_out, C_in/groups, *kernel)`."""
        rows = groups.movedim(-1, 2).flatten(1, 2)[:, : self.channels]
        weight = masks.ungroup_rows(rows, self.weight_shape, self.pattern)
        return weight.clone()  # FSDP warns of modules that return views


def _ranking(scores: Tensor, removed: Tensor) -> Tensor:
    """Combinations of each group from the highest score down, the removed ones last."""
    return scores.masked_fill(removed, -torch.inf).argsort(dim=-1, descending=True, stable=True)


def _may_remove(left: Tensor) -> bool:
    """False where it is known at no cost that nothing is to be removed, as `may_be_true`."""
    return torch.compiler.is_compiling() or left.device.type != "cpu" or left.item() >= 0


def _nothing(*_: Tensor) -> None:
    return None


@operator("remove_combinations", fake=_nothing, changes=("removed",))
def _remove(removed: Tensor, scores: Tensor, left: Tensor) -> None:
    """Remove all but a share of the combinations, if that is not negative.

    An operator, so that compiled steps on a CPU rank combinations only if any are to be removed.
    """
    if _may_remove(left):
        card = 1 + ((scores.shape[-1] - 1) * left).ceil().to(torch.int64)
        place = _ranking(scores, removed).argsort(-1)
        removed.logical_or_((place >= card) & (left >= 0))


def _held_fake(removed: Tensor, members: Tensor) -> Tensor:
    return members.new_empty(*removed.shape[:-1], members.shape[1])


@operator("held_members", fake=_held_fake)
def _held_members(removed: Tensor, members: Tensor) -> Tensor:
    """Which members the remaining combinations hold, `(C_out, groups, *kernel, M)`, 0 or 1.

    An operator, because compilers for CPUs turn bools into numbers one by one.
    """
    held = (~removed).to(members.dtype) @ members > 0  # whatever autocast makes of the product
    return held.to(members.dtype)


class _Held(NamedTuple):
    """Which members the remaining combinations hold.

    Attributes:
        of: The buffer of removed combinations that this was made of.
        version: That of the buffer's content then, by autograd's count.
        removed: Its content then.
        mask: B, of the shape of the weight and the type of the scores. Each forward hands out the
            same numbers: making them of bytes takes longer than all else that B takes.
    """

    of: Tensor
    version: int
    removed: Tensor
    mask: Tensor


class _StraightThrough(torch.autograd.Function):
    """B as numbers; its gradient goes straight to the scores of the remaining combinations."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        scores: Tensor,  # noqa: ARG004
        mask: Tensor,
        removed: Tensor,
        members: Tensor,
        pattern: Pattern,
    ) -> Tensor:
        ctx.save_for_backward(removed, members)
        ctx.pattern = pattern
        return mask.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        removed, members = ctx.saved_tensors
        groups = _to_groups(gradients[0], ctx.pattern)
        if ctx.pattern.n > 1:  # otherwise each combination is the member of its number
            groups = groups @ members.T
        return groups.masked_fill(removed, 0.0), None, None, None, None


def _to_groups(weight: Tensor, pattern: Pattern) -> Tensor:
    """`(C_out, C_in/groups, *kernel)` -> `(C_out, groups, *kernel, M)`, padded with zeros."""
    rows = masks.group_rows(weight, pattern)
    padding = -rows.shape[1] % pattern.m
    if padding:
        rows = torch.cat([rows, rows.new_zeros(len(rows), padding, *rows.shape[2:])], 1)
    groups: Tensor = rows.unflatten(1, (-1, pattern.m))
    return groups.movedim(2, -1)
