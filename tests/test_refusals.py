"""Refusals, word for word, that the tests of their own files look at in part."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from models import Model, chain, randomise
from torch import Tensor, nn
from torch.nn import functional as F

import spre_fx
from spre_fx import files
from spre_fx.audit import audit
from spre_fx.cli import main
from spre_fx.fold import Branch, merge
from spre_fx.loading import load_model


def net() -> nn.Module:
    return chain(conv=nn.Conv2d(8, 8, 3), bn=nn.BatchNorm2d(8))


def prepared(**options: object) -> nn.Module:
    return spre_fx.prepare(net(), "1:4", **options)


def two_shapes() -> object:
    return merge([Branch(torch.ones(2, 2), None, None), Branch(torch.ones(2, 3), None, None)])


def another_state() -> None:
    state = spre_fx.MaskDynamics(prepared()).state_dict()
    state["masks"] = {"elsewhere": torch.ones(1)}
    spre_fx.MaskDynamics(prepared()).load_state_dict(state)


MODULE = f"{__name__}:"
A_NUMBER = 3


def needs_an_argument(size: int) -> nn.Module:
    return nn.Linear(size, size)


REFUSALS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (
        lambda: spre_fx.finalize(prepared(), backend="tpu"),  # type: ignore[arg-type]
        spre_fx.OptionError,
        "backend='tpu': expected one of 'auto', 'cpu', 'cuda', 'dense'.",
    ),
    (
        lambda: audit(net()),
        spre_fx.ModelError,
        "verify: expected a prepared or deployed model, found a Sequential without N:M layers.",
    ),
    (
        lambda: spre_fx.update_taps(
            prepared(criterion="taylor"), lambda: torch.ones(()), batches=0
        ),
        spre_fx.OptionError,
        "update_taps(batches=0): expected batches >= 1.",
    ),
    (
        another_state,
        spre_fx.ModelError,
        "MaskDynamics: expected the state of a tracker of this model, found one whose layers "
        "differ in conv, elsewhere.",
    ),
    (
        two_shapes,
        spre_fx.InvariantError,
        "expected branches with weights of one shape, found shapes [(2, 2), (2, 3)].",
    ),
    (
        lambda: spre_fx.GraNet(constraint="none"),  # type: ignore[arg-type]
        spre_fx.OptionError,
        "GraNet(constraint='none'): expected None, 'spatial' or 'equal'.",
    ),
    (
        lambda: prepared(method="lbc"),
        spre_fx.OptionError,
        "LBC: expected schedule=CubicRamp(t_i, t_f), the steps between which combinations are "
        "removed, found EveryStep().",
    ),
    (
        lambda: prepared(method="gmp"),
        spre_fx.OptionError,
        "GMP: expected schedule=CubicRamp(start, end, every), the steps over which sparsity grows, "
        "found EveryStep().",
    ),
    (
        lambda: prepared(method="rigl"),
        spre_fx.OptionError,
        "RigL: expected schedule=Freeze(at=T_end, before=EveryK(dT)), with the step T_end from "
        "which on masks stay, found EveryStep().",
    ),
    (
        lambda: load_model(f"{MODULE}A_NUMBER"),
        spre_fx.ModelError,
        f"{MODULE}A_NUMBER: expected a model, found a int.",
    ),
    (
        lambda: load_model(f"{MODULE}needs_an_argument"),
        spre_fx.ModelError,
        f"{MODULE}needs_an_argument: expected a callable that makes a model without arguments, "
        "found TypeError: needs_an_argument() missing 1 required positional argument: 'size'",
    ),
    (
        lambda: spre_fx.plot_spatial_sparsity({}),
        spre_fx.ModelError,
        "plot_spatial_sparsity: expected a model, found an empty mapping.",
    ),
    (
        lambda: spre_fx.plot_spatial_sparsity(net()),
        spre_fx.ModelError,
        "plot_spatial_sparsity: expected a prepared model with an N:M conv of more than one tap, "
        "found a dense Sequential. Call prepare on it first.",
    ),
]


@pytest.mark.parametrize(
    ("refused", "kind", "words"),
    REFUSALS,
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_the_words(refused: Callable[[], object], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as error:
        refused()
    assert str(error.value) == words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["inspect", "resnet18", "--override", "fc"],
            "'fc': expected GLOB=N:M or GLOB=dense.",
        ),
        (
            ["cost", "resnet18", "--input", "1,x"],
            "'1,x': expected sizes such as 1,3,224,224.",
        ),
        (
            ["verify", "state.pt"],
            "state.pt: holds a state_dict; expected --model, and the options it was prepared with, "
            "to know its layers and patterns.",
        ),
        (["plot", "state.pt"], "state.pt: expected a prepared model, found a state_dict."),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_words_of_the_command_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(net().state_dict(), "state.pt")
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse leaves by itself
        code = stop.code
    assert code == 2
    assert words in capsys.readouterr().err


def test_a_description_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    text = "{"
    entry = f"{files._VERSION} {files._digest_of_text(text)} {text}"
    path.write_bytes(safetensors.torch.save({"x": torch.ones(1)}, {files._ENTRY: entry}))
    with pytest.raises(spre_fx.FileError) as error:
        spre_fx.load(path)
    with pytest.raises(ValueError, match="Expecting") as reason:
        json.loads(text)
    assert str(error.value) == f"{path}: expected a description in JSON, found: {reason.value}."


def test_layers_that_are_never_called_are_named() -> None:
    class Never(Model):
        def __init__(self) -> None:
            super().__init__()
            self.never = nn.Conv2d(8, 8, 3)

    with pytest.warns(UserWarning, match="never calls") as caught:
        spre_fx.prepare(Never(), "1:4")
    assert str(caught[0].message) == (
        "Never has layers that its forward never calls, and the result leaves out: never."
    )


class Functional(nn.Module):
    """Functional calls that no module could make, whose weights therefore stay dense."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(8, 8)
        self.wide.bias = nn.Parameter(torch.zeros(1))
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.plain = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x.mT, self.wide.weight, self.wide.bias).mT
        x = F.batch_norm(
            self.conv(x), self.bn.running_mean * 1, self.bn.running_var, training=self.training
        )
        return F.batch_norm(
            self.plain(x),
            self.bn.running_mean,
            self.bn.running_var,
            training=self.training,
            eps=self.bn.eps * self.bn.running_var.sum(),
        )


def test_functional_calls_that_no_module_could_make() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        notes = {s.name: s.note for s in spre_fx.sites(spre_fx.prepare(Functional(), "1:4"))}
    assert "with a weight of shape (8, 8) and a bias of another width" in notes["wide"]
    assert (
        "its statistics are not the buffers running_mean and running_var of a module"
        in (notes["conv"])
    )
    assert "its momentum or eps is computed" in notes["plain"]


def test_a_layer_of_two_parts_says_where_else_it_stands() -> None:
    shared = nn.Conv2d(8, 8, 3, padding=1)

    class TwoParts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = chain(own=nn.Conv2d(8, 8, 1), shared=shared)
            self.right = chain(shared=shared, own=nn.Conv2d(8, 8, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.right(x) if x.mean() > 0 else self.left(x)

    notes = {s.name: s.note for s in spre_fx.sites(spre_fx.prepare(TwoParts(), "1:4"))}
    assert notes["left.shared"] == "right.shared: it also stands at left.shared"


def test_a_training_graph_that_was_changed_is_not_folded() -> None:
    gm = randomise(prepared())
    (add,) = [node for node in gm.graph.nodes if node.name == "bn_sum"]
    add.replace_all_uses_with(add.args[0])
    gm.graph.erase_node(add)
    gm.recompile()
    with pytest.raises(spre_fx.InvariantError) as error:
        spre_fx.finalize(gm)
    assert "conv" in str(error.value)
    assert "belong to the graph that `prepare` built. Undo what changed the graph since" in str(
        error.value
    )


def test_a_mask_that_depends_on_something_else_is_refused() -> None:
    gm = randomise(prepared())
    spre = next(node for node in gm.graph.nodes if node.target == "conv_spre")
    with gm.graph.inserting_before(spre):
        other = gm.graph.call_method("mul", (spre.args[1], 1))
    spre.args = (spre.args[0], other)
    gm.recompile()
    with pytest.raises(spre_fx.InvariantError) as error:
        spre_fx.finalize(gm)
    assert str(error.value) == (
        "conv: expected its SpRe branch to take a mask made by functions from the masks of conv, "
        f"found one that depends on {other.name}. Undo what changed the graph since `prepare`."
    )
