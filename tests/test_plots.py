"""Pictures of spatial sparsity: what is drawn, and in one scale for several models."""

import pytest
from test_api import small_net
from torch import nn

import spre_fx


def titles(figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes if ax.get_title()]


def images(figure) -> list:
    return [ax.get_images()[0] for ax in figure.axes if ax.get_images()]


def test_one_model():
    figure = spre_fx.plot_spatial_sparsity(spre_fx.prepare(small_net(), "1:8"))
    assert titles(figure) == ["3"]
    (image,) = images(figure)
    assert image.get_array().shape == (3, 3)


def test_methods_under_each_other_in_one_scale(tmp_path):
    models = {
        "SR-STE": spre_fx.prepare(small_net(), "1:8"),
        "plain": spre_fx.prepare(small_net(), "1:8", branch=None),
        "ASP": spre_fx.prepare(small_net(), "1:8", method="asp"),
    }
    figure = spre_fx.plot_spatial_sparsity(models, tmp_path / "methods.svg")
    assert (tmp_path / "methods.svg").exists()
    assert titles(figure) == ["3"]
    assert [ax.get_ylabel() for ax in figure.axes][:3] == ["SR-STE", "plain", "ASP"]
    assert len({image.get_clim() for image in images(figure)}) == 1
    outlined = [len(ax.patches) for ax in figure.axes[:3]]
    assert outlined[0] > 0
    assert outlined[1] == 0


def test_sites_that_a_method_lacks_stay_empty():
    net = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(2)))
    models = {"both": spre_fx.prepare(net, "1:8"), "one": spre_fx.prepare(net, "1:8", exclude="1")}
    figure = spre_fx.plot_spatial_sparsity(models)
    assert [len(ax.get_images()) for ax in figure.axes[:4]] == [1, 1, 1, 0]


def test_patterns_are_named_where_they_differ():
    models = {"8": spre_fx.prepare(small_net(), "1:8"), "4": spre_fx.prepare(small_net(), "1:4")}
    assert titles(spre_fx.plot_spatial_sparsity(models)) == ["3\n1:8", "1:4"]


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (small_net(), "a dense Sequential"),
        (spre_fx.finalize(spre_fx.prepare(small_net(), "1:8")), "a deployed one"),
        (spre_fx.prepare(nn.Sequential(nn.Linear(8, 8)), "1:8"), "only linears"),
        ({}, "an empty mapping"),
    ],
    ids=["dense", "deployed", "linear", "empty"],
)
def test_what_cannot_be_drawn(model, found):
    with pytest.raises(spre_fx.ModelError, match=found):
        spre_fx.plot_spatial_sparsity(model)
