"""The picture of spatial sparsity: a panel per site, true values, live taps outlined."""

import sys

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from models import chain
from test_api import small_net
from torch import nn
from torch.fx import GraphModule

import spre_fx
from spre_fx import masks


def net() -> nn.Sequential:
    return chain(
        stem=nn.Conv2d(3, 16, 3, padding=1),
        bn0=nn.BatchNorm2d(16),
        square=nn.Conv2d(16, 16, 3, padding=1),
        bn1=nn.BatchNorm2d(16),
        wide=nn.Conv2d(16, 16, (1, 7), padding=(0, 3)),
        bn2=nn.BatchNorm2d(16),
        point=nn.Conv2d(16, 32, 1),
        bn3=nn.BatchNorm2d(32),
        bare=nn.Conv2d(32, 16, 3),  # no batch norm, so no SpRe branch
    )


def prepared(**options: object) -> GraphModule:
    return spre_fx.prepare(net(), "1:8", **options)


def panels(figure: Figure) -> dict[str, Axes]:
    return {ax.get_title(): ax for ax in figure.axes if ax.get_title()}


def values(ax: Axes) -> torch.Tensor:
    (image,) = ax.images
    return torch.from_numpy(image.get_array().filled(torch.nan))


def outlined(ax: Axes) -> set[tuple[int, int]]:
    """The (row, column) of every outlined tap."""
    return {(round(p.get_y() + 0.45), round(p.get_x() + 0.45)) for p in ax.patches}


def live(layer: nn.Module) -> set[tuple[int, int]]:
    taps = masks.live_taps(layer.weight.detach(), layer.pattern)
    return {(row, column) for row, column in taps.nonzero().tolist()}


def test_one_panel_per_conv_with_taps():
    figure = spre_fx.plot_spatial_sparsity(prepared())
    assert list(panels(figure)) == ["square", "wide", "bare"]
    assert len(figure.axes) == 3 + 1  # and the colour bar


def test_values_are_the_spatial_sparsity_of_the_unstructured_mask():
    model = prepared()
    for name, ax in panels(spre_fx.plot_spatial_sparsity(model)).items():
        layer = model.get_submodule(name)
        mask = masks.unstructured_mask(layer.weight.detach(), layer.pattern)
        assert torch.equal(values(ax), 1 - mask.double().mean((0, 1)))
        written = [float(text.get_text()) for text in ax.texts]
        expected = (100 * values(ax)).flatten().tolist()
        assert written == pytest.approx(expected, abs=0.51 if name == "wide" else 0.051)


def test_live_taps_of_sites_with_a_branch_are_outlined():
    model = prepared()
    found = panels(spre_fx.plot_spatial_sparsity(model))
    for name in ("square", "wide"):
        assert outlined(found[name]) == live(model.get_submodule(name)) != set()
    assert outlined(found["bare"]) == set()


def test_without_branches_nothing_is_outlined():
    figure = spre_fx.plot_spatial_sparsity(prepared(branch=None))
    assert all(outlined(ax) == set() for ax in panels(figure).values())


def test_outlines_are_the_masks_in_force_and_values_the_weights_of_now():
    model = prepared(method="asp")
    square = model.get_submodule("square")
    then = live(square)
    with torch.no_grad():
        square.weight[..., 0, 0] *= 1000
        square.weight[..., 2, 2] *= 0.001
    ax = panels(spre_fx.plot_spatial_sparsity(model))["square"]
    assert outlined(ax) == then != live(square)
    assert values(ax)[0, 0] < 1 - 1 / 8 < values(ax)[2, 2]


def test_colours_are_shared_and_the_threshold_is_marked():
    figure = spre_fx.plot_spatial_sparsity(prepared())
    low, high = figure.axes[-1].get_xlim()
    for ax in panels(figure).values():
        assert ax.images[0].get_clim() == (low, high)
        assert low < values(ax).min() < values(ax).max() < high
    (mark,) = [line.get_xdata()[0] for line in figure.axes[-1].lines]
    assert low < mark == 1 - 1 / 8 < high


def test_every_pattern_is_marked_and_named():
    figure = spre_fx.plot_spatial_sparsity(prepared(overrides={"wide": "2:4"}))
    assert list(panels(figure)) == ["square\n1:8", "wide\n2:4", "bare\n1:8"]
    assert [line.get_xdata()[0] for line in figure.axes[-1].lines] == [1 - 1 / 8, 1 - 2 / 4]


def test_a_kernel_without_any_variation_is_drawn():
    model = prepared(exclude=("wide", "bare"))
    with torch.no_grad():
        weight = model.get_submodule("square").weight
        weight.copy_(torch.arange(16.0).view(1, 16, 1, 1).expand_as(weight))
    (ax,) = panels(spre_fx.plot_spatial_sparsity(model)).values()
    assert set(values(ax).flatten().tolist()) == {1 - 1 / 8}
    assert outlined(ax) == set()


def test_1d_kernels_are_a_row():
    model = spre_fx.prepare(chain(conv=nn.Conv1d(16, 16, 5), bn=nn.BatchNorm1d(16)), "1:8")
    (ax,) = panels(spre_fx.plot_spatial_sparsity(model)).values()
    conv = model.get_submodule("conv")
    expected = masks.spatial_sparsity(masks.unstructured_mask(conv.weight.detach(), conv.pattern))
    assert torch.equal(values(ax), expected[None])
    taps = masks.live_taps(conv.weight.detach(), conv.pattern).nonzero().tolist()
    assert outlined(ax) == {(0, column) for (column,) in taps}


def test_3d_kernels_are_slices_side_by_side():
    model = spre_fx.prepare(chain(conv=nn.Conv3d(16, 16, (2, 3, 4)), bn=nn.BatchNorm3d(16)), "1:8")
    (ax,) = panels(spre_fx.plot_spatial_sparsity(model)).values()
    conv = model.get_submodule("conv")
    expected = masks.spatial_sparsity(masks.unstructured_mask(conv.weight.detach(), conv.pattern))
    shown = values(ax)
    assert shown.shape == (3, 4 + 1 + 4)
    assert torch.equal(shown[:, :4], expected[0])
    assert shown[:, 4].isnan().all()
    assert torch.equal(shown[:, 5:], expected[1])
    taps = masks.live_taps(conv.weight.detach(), conv.pattern).nonzero().tolist()
    assert outlined(ax) == {(row, 5 * depth + column) for depth, row, column in taps}


@pytest.mark.parametrize(
    ("parents", "title"),
    [
        ("layer1.0", "layer1.0.square"),
        ("features.denseblock1.denselayer12", "features.denseblock1.\ndenselayer12.square"),
        ("features.denseblock1.denselayer12.bottleneck", "…denselayer12.\nbottleneck.square"),
        ("backbone.layer1.0.block.conv2", "backbone.layer1.0.\nblock.conv2.square"),
        ("a_module_with_a_very_long_name", "…ith_a_very_long_name.\nsquare"),
    ],
)
def test_long_names_are_shortened(parents, title):
    model = net()
    for name in reversed(parents.split(".")):
        outer = nn.Sequential()
        outer.add_module(name, model)
        model = outer
    figure = spre_fx.plot_spatial_sparsity(spre_fx.prepare(model, "1:8"))
    assert next(iter(panels(figure))) == title


def test_many_sites_fit_a_grid():
    layers: dict[str, nn.Module] = {}
    for number in range(23):
        layers[f"conv{number}"] = nn.Conv2d(8, 8, 3, padding=1)
        layers[f"bn{number}"] = nn.BatchNorm2d(8)
    figure = spre_fx.plot_spatial_sparsity(spre_fx.prepare(chain(**layers), "2:4"))
    assert len(panels(figure)) == 23
    width, height = figure.get_size_inches()
    assert 1 < width / height < 2
    figure.canvas.draw()
    boxes = [ax.get_tightbbox() for ax in panels(figure).values()]
    for index, box in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width
        assert not any(box.overlaps(other) for other in boxes[:index])


def test_the_file_is_written_without_pyplot(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    spre_fx.plot_spatial_sparsity(prepared(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    spre_fx.plot_spatial_sparsity(prepared(), str(tmp_path / "picture.svg"))
    assert "<svg" in (tmp_path / "picture.svg").read_text()


def test_the_model_stays_as_it_was():
    model = prepared(schedule=spre_fx.EveryK(3)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spre_fx.plot_spatial_sparsity(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.training


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (net, "found a dense Sequential. Call prepare on it first"),
        (lambda: spre_fx.finalize(prepared()), "found a deployed one.* Draw the prepared model"),
        (
            lambda: spre_fx.prepare(nn.Sequential(nn.Linear(16, 8)), "1:8"),
            "found only linears and convs of one tap",
        ),
    ],
)
def test_what_cannot_be_drawn_says_why(model, found):
    with pytest.raises(spre_fx.ModelError, match=found):
        spre_fx.plot_spatial_sparsity(model())


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'spre_fx\[plot\]'"):
        spre_fx.plot_spatial_sparsity(prepared())


def images(figure: Figure) -> list:
    return [ax.get_images()[0] for ax in figure.axes if ax.get_images()]


def titles(figure: Figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes if ax.get_title()]


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
