"""Schedules: which steps are update steps, what they keep and count, and what they refuse."""

import pickle
from dataclasses import FrozenInstanceError, dataclass, fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spre_fx.errors import OptionError
from spre_fx.schedules import CubicRamp, EveryK, EveryStep, Freeze, Schedule

SCHEDULES = [EveryStep(), EveryK(3), Freeze(5), Freeze(5, EveryK(2)), Freeze(0), CubicRamp(2, 9, 3)]


def updates(schedule: Schedule, steps: range = range(21)) -> list[int]:
    """The update steps among `steps`."""
    return [step for step in steps if schedule.is_update(torch.tensor(step)).item()]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (EveryStep(), list(range(21))),
        (EveryK(1), list(range(21))),
        (EveryK(3), [0, 3, 6, 9, 12, 15, 18]),
        (EveryK(20), [0, 20]),
        (EveryK(21), [0]),
        (Freeze(5), [0, 1, 2, 3, 4]),
        (Freeze(1), [0]),
        (Freeze(0), []),
        (Freeze(5, EveryK(2)), [0, 2, 4]),
        (Freeze(4, EveryK(2)), [0, 2]),
        (Freeze(9, Freeze(3)), [0, 1, 2]),
        (Freeze(3, Freeze(9)), [0, 1, 2]),
        (Freeze(0, EveryK(2)), []),
        (CubicRamp(2, 8, 3), [2, 5, 8]),
        (CubicRamp(2, 9, 3), [2, 5, 8, 9]),
        (CubicRamp(17, 40), [17, 18, 19, 20]),
    ],
    ids=repr,
)
def test_update_steps_from_0_to_20(schedule: Schedule, expected: list[int]) -> None:
    assert updates(schedule) == expected


@given(st.integers(1, 50), st.integers(0, 10**12))
def test_every_k_updates_once_in_any_k_steps(k: int, start: int) -> None:
    (update,) = updates(EveryK(k), range(start, start + k))
    assert update % k == 0


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_answer_is_a_new_bool_scalar(schedule: Schedule) -> None:
    step = torch.tensor(4)
    answer = schedule.is_update(step)
    assert answer.dtype is torch.bool
    assert answer.shape == ()
    assert answer.device == step.device
    before = answer.item()
    step.add_(1)  # what MaskSchedule does next
    assert answer.item() == before


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_answer_stays_on_the_device_of_the_step(schedule: Schedule) -> None:
    assert schedule.is_update(torch.tensor(4, device="meta")).device.type == "meta"


@pytest.mark.parametrize(
    ("schedule", "keeps_masks", "counts_steps"),
    [
        (EveryStep(), False, False),
        (EveryK(1), True, True),
        (EveryK(3), True, True),
        (Freeze(1), True, True),
        (Freeze(5), True, True),
        (Freeze(5, EveryK(2)), True, True),
        (Freeze(0), True, True),
        (CubicRamp(2, 9), True, True),
    ],
    ids=repr,
)
def test_what_is_kept_and_counted(
    schedule: Schedule, keeps_masks: bool, counts_steps: bool
) -> None:
    assert schedule.keeps_masks is keeps_masks
    assert schedule.counts_steps is counts_steps


@pytest.mark.parametrize("k", [0, -1])
def test_every_k_refuses_less_than_one(k: int) -> None:
    with pytest.raises(OptionError) as refusal:
        EveryK(k)
    assert str(refusal.value) == f"EveryK(k={k}): expected k >= 1 training forwards."


def test_freeze_refuses_a_negative_step() -> None:
    with pytest.raises(OptionError) as refusal:
        Freeze(-1)
    assert str(refusal.value) == "Freeze(at=-1): expected a step >= 0."


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((5, 5), "CubicRamp(start=5, end=5): expected 0 <= start < end."),
        ((-1, 5), "CubicRamp(start=-1, end=5): expected 0 <= start < end."),
        ((0, 5, 0), "CubicRamp(every=0): expected every >= 1 forwards."),
    ],
)
def test_a_ramp_refuses(options: tuple[int, ...], words: str) -> None:
    with pytest.raises(OptionError) as refusal:
        CubicRamp(*options)
    assert str(refusal.value) == words


def test_a_ramp_follows_the_cubic_of_zhu_and_gupta() -> None:
    ramp = CubicRamp(10, 20)
    found = [ramp.sparsity(torch.tensor(step), 0.9, 0.1).item() for step in (0, 10, 15, 18, 20, 99)]
    expected = [0.1, 0.1, 0.9 - 0.8 * 0.5**3, 0.9 - 0.8 * 0.2**3, 0.9, 0.9]
    assert found == pytest.approx(expected, rel=1e-12)
    assert ramp.left(torch.tensor(15)).dtype is torch.float64


def test_a_freeze_of_a_bad_schedule_is_refused_by_the_bad_one() -> None:
    with pytest.raises(OptionError, match=r"^EveryK\(k=0\)"):
        Freeze(5, EveryK(0))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_schedules_are_frozen(schedule: Schedule) -> None:
    name = fields(schedule)[0].name if fields(schedule) else "anything"
    with pytest.raises(FrozenInstanceError):
        setattr(schedule, name, 1)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_schedules_survive_pickling(schedule: Schedule) -> None:
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert copy is not schedule
    assert updates(copy) == updates(schedule)


def test_schedules_are_equal_when_their_options_are() -> None:
    assert EveryStep() == EveryStep()
    assert EveryK(3) == EveryK(3) != EveryK(4)
    assert Freeze(5) == Freeze(5, EveryStep()) != Freeze(5, EveryK(1))
    assert Freeze(5) != Freeze(6)
    assert EveryK(1) != EveryStep()
    assert len({EveryK(3), EveryK(3), Freeze(3), EveryStep()}) == 3


def test_a_schedule_says_its_options() -> None:
    assert repr(Freeze(5, EveryK(2))) == "Freeze(at=5, before=EveryK(k=2))"


@dataclass(frozen=True)
class Warmup(Schedule):
    """Updates from a step on: what a user writes."""

    start: int

    def is_update(self, step: Tensor) -> Tensor:
        return step >= self.start


def test_a_schedule_of_ones_own_keeps_masks_and_counts_steps_unless_it_says_otherwise() -> None:
    schedule = Warmup(18)
    assert updates(schedule) == [18, 19, 20]
    assert updates(Freeze(20, schedule)) == [18, 19]
    assert schedule.keeps_masks
    assert schedule.counts_steps


def test_a_schedule_without_the_question_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="is_update"):
        Schedule()  # type: ignore[abstract]
