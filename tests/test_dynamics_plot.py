"""The picture of mask dynamics: what is in it, for sites with and without a SpRe branch."""

import pytest
import torch
from test_api import small_net, train
from torch import nn

import spre_fx


def test_every_site_has_a_strip(tmp_path):
    prepared = spre_fx.prepare(small_net(), "1:8")
    tracker = spre_fx.MaskDynamics(prepared)
    for step in (0, 3, 9):
        tracker.record(step)
        train(prepared, torch.randn(4, 3, 9, 9))
    figure = tracker.plot(tmp_path / "dynamics.png")
    assert (tmp_path / "dynamics.png").stat().st_size > 10_000
    strips = figure.axes[2]
    assert [label.get_text() for label in strips.get_yticklabels()] == ["3", "6", "10"]
    assert strips.get_xlim() == (0, 9)
    (image,) = [c for c in strips.collections if hasattr(c, "get_coordinates")]
    live = torch.tensor([row.live_taps for row in tracker.rows if row.site == "3"]).T
    assert (image.get_array() == live[:, :-1].double().numpy()).all()


def test_a_model_without_branches_is_drawn_too():
    tracker = spre_fx.MaskDynamics(spre_fx.prepare(nn.Sequential(nn.Linear(8, 4)), "2:4"))
    tracker.record(0)
    tracker.record(1)
    assert len(tracker.plot().axes) == 5


def test_one_record_is_not_enough():
    tracker = spre_fx.MaskDynamics(spre_fx.prepare(nn.Sequential(nn.Linear(8, 4)), "2:4"))
    tracker.record(0)
    with pytest.raises(spre_fx.ModelError, match="two records or more, found 1"):
        tracker.plot()
