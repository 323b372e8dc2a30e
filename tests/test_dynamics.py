"""`MaskDynamics`: what moved between two records, by hand, and over a training."""

import io
import json

import pytest
import torch
from test_api import small_net, train
from torch import nn

import spre_fx


def linear(pattern: str = "1:2") -> nn.Module:
    prepared = spre_fx.prepare(nn.Sequential(nn.Linear(4, 2, bias=False)), pattern)
    set_weight(prepared, [[2.0, 1.0, 2.0, 1.0], [2.0, 1.0, 2.0, 1.0]])
    return prepared


def set_weight(model: nn.Module, values: list[list[float]]) -> None:
    model.get_submodule("0").weight.data = torch.tensor(values)


def test_churn_by_hand():
    model = linear()
    tracker = spre_fx.MaskDynamics(model)
    (first,) = tracker.record(0)
    assert (first.site, first.churn, first.flips, first.live_taps) == ("0", None, None, None)
    set_weight(model, [[1.0, 2.0, 2.0, 1.0], [2.0, 1.0, 2.0, 1.0]])
    assert [row.churn for row in tracker.record(1)] == [0.25]
    assert [row.churn for row in tracker.record(2)] == [0.0]


def test_live_taps_and_flips_by_hand():
    conv = nn.Conv1d(4, 1, 3, bias=False)
    model = spre_fx.prepare(nn.Sequential(conv, nn.BatchNorm1d(1)), "1:4")
    weight = model.get_submodule("0").weight
    tracker = spre_fx.MaskDynamics(model)
    weight.data = torch.tensor([[[9.0, 1, 1], [9, 1, 1], [9, 1, 1], [1, 1, 1]]])  # B^U keeps three
    (row,) = tracker.record(0)
    assert (row.live_taps, row.live_tap_count) == ((True, False, False), 1)
    weight.data = weight.data.flip(2)
    (row,) = tracker.record(10)
    assert (row.live_taps, row.flips) == ((False, False, True), 2)


def test_recording_changes_nothing_and_needs_no_hook():
    prepared = spre_fx.prepare(small_net(), "1:8", schedule=spre_fx.EveryK(3))
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    spre_fx.MaskDynamics(prepared).record(0)
    assert all(torch.equal(before[name], v) for name, v in prepared.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in prepared.modules())


def test_frozen_masks_stand_still():
    prepared = spre_fx.prepare(small_net(), "1:8", method="asp")
    tracker = spre_fx.MaskDynamics(prepared)
    tracker.record(0)
    train(prepared, torch.randn(4, 3, 9, 9))
    assert {row.churn for row in tracker.record(3)} == {0.0}


def test_it_resumes():
    prepared = spre_fx.prepare(small_net(), "1:8")
    first = spre_fx.MaskDynamics(prepared)
    first.record(0)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = spre_fx.MaskDynamics(prepared)
    second.load_state_dict(torch.load(file, weights_only=True))
    train(prepared, torch.randn(4, 3, 9, 9))
    assert second.record(5) == first.record(5)
    assert second.rows == first.rows
    assert json.loads(json.dumps(second.to_dict()))[0]["site"] == "3"


def test_what_it_refuses():
    with pytest.raises(spre_fx.ModelError, match="without N:M layers"):
        spre_fx.MaskDynamics(small_net())
    tracker = spre_fx.MaskDynamics(linear())
    tracker.record(4)
    with pytest.raises(spre_fx.OptionError, match="a step after 4"):
        tracker.record(4)
    with pytest.raises(spre_fx.ModelError, match="differ in 0, 10, 3, 6"):
        spre_fx.MaskDynamics(spre_fx.prepare(small_net(), "1:8")).load_state_dict(
            tracker.state_dict() | {"masks": {"0": torch.zeros(1, dtype=torch.uint8)}}
        )


class Writer:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = value


def test_a_writer_gets_every_number():
    tracker, writer = spre_fx.MaskDynamics(spre_fx.prepare(small_net(), "1:8")), Writer()
    tracker.record(0)
    tracker.write(writer, 0)
    tracker.write(writer, 5)  # records by itself
    assert len({row.step for row in tracker.rows}) == 2
    assert writer.scalars["live_taps/3", 0] == tracker.rows[0].live_tap_count
    assert writer.scalars["mask_churn/10", 5] == 0.0
    assert writer.scalars["live_tap_flips/3", 5] == 0
    assert ("mask_churn/3", 0) not in writer.scalars


@pytest.mark.filterwarnings("ignore")  # tensorboard's own
def test_tensorboard_takes_them(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        spre_fx.MaskDynamics(linear()).write(writer, 0)
        writer.flush()
    assert list(tmp_path.iterdir())
