"""The contract of a pass, once for all of them: over every model, and for passes that lie."""

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import MODELS, Residual, assert_same, prepare, randomise, run
from torch import nn
from torch.fx import GraphModule

from spre_fx import (
    ASP,
    GMP,
    SRSTE,
    ChannelPermutation,
    CubicRamp,
    EveryK,
    EveryStep,
    InvariantError,
    Pattern,
)
from spre_fx.backends import DenseBackend
from spre_fx.cpu_backend import CPUBackend
from spre_fx.passes import (
    Account,
    ComputeSparsely,
    DuplicateBranches,
    FoldBranches,
    FuseEpilogues,
    Lower,
    ModulariseCalls,
    Pass,
    PassResult,
    PermuteChannels,
    Policy,
    Reason,
    Skip,
    SpecialiseToEval,
    WireMasks,
    WireUnstructured,
    trace,
)
from spre_fx.passes.graph_view import GraphView

POLICY = Policy(Pattern(1, 4))
DUPLICATE = DuplicateBranches(POLICY)
PERMUTE = PermuteChannels(POLICY, ChannelPermutation(sweeps=1, progress=False))
UNSTRUCTURED = WireUnstructured(POLICY, GMP(), CubicRamp(0, 4))
WIRE = WireMasks(POLICY, SRSTE(), EveryStep())


def modularised(model: nn.Module) -> GraphModule:
    return ModulariseCalls()(trace(model)).graph_module


def duplicated(model: nn.Module) -> GraphModule:
    return randomise(DUPLICATE(modularised(model)).graph_module)


def wired(model: nn.Module) -> GraphModule:
    return WIRE(duplicated(model)).graph_module


def specialised(model: nn.Module) -> GraphModule:
    return SpecialiseToEval()(prepare(model, schedule=EveryK(2))).graph_module


def folded(model: nn.Module) -> GraphModule:
    return FoldBranches()(specialised(model)).graph_module


@dataclasses.dataclass(frozen=True)
class Always(CPUBackend):
    """Packs whatever can be packed."""

    def rule(self, layer, pattern, candidates, input_shape):
        return candidates[0]


def packed(model: nn.Module) -> GraphModule:
    return Lower(Always())(folded(model)).graph_module


# Each pass and the graphs it is run on: those of its pipeline, and a dense one.
RUNS: dict[str, tuple[Pass, Callable[[nn.Module], GraphModule]]] = {
    "modularise": (ModulariseCalls(), trace),
    "duplicate": (DUPLICATE, modularised),
    "duplicate around functions": (DUPLICATE, trace),
    "permute a dense graph": (PERMUTE, trace),
    "wire a dense graph": (WIRE, trace),
    "wire unstructured masks": (UNSTRUCTURED, trace),
    "wire branches": (WIRE, duplicated),
    "wire branches with a schedule": (WireMasks(POLICY, ASP(), EveryK(2)), duplicated),
    "compute sparsely in a dense graph": (ComputeSparsely(), trace),
    "compute sparsely": (ComputeSparsely(), wired),
    "specialise a dense graph": (SpecialiseToEval(), trace),
    "specialise": (SpecialiseToEval(), prepare),
    "fold a dense graph": (FoldBranches(), trace),
    "fold": (FoldBranches(), specialised),
    "lower": (Lower(DenseBackend()), folded),
    "lower to packed layers": (Lower(Always()), folded),
    "fuse": (FuseEpilogues(), packed),
}
over_runs = pytest.mark.parametrize("run_name", RUNS)
over_models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def facts(gm: GraphModule) -> dict[str, object]:
    """Everything about a graph that must stay: code, nodes, modules, modes, records."""
    return {
        "code": gm.code,
        "nodes": [(id(n), n.name, n.op, n.target, n.args, n.kwargs) for n in gm.graph.nodes],
        "modules": [(name, id(m), type(m), m.training) for name, m in gm.named_modules()],
        "gradients": [(n, id(p), p.requires_grad) for n, p in gm.named_parameters()],
        "records": [copy.copy(getattr(m, "spre_fx_record", None)) for m in gm.modules()],
        "attributes": [set(vars(m)) for m in gm.modules()],
    }


def thinned() -> list[Any]:
    """Each pass on a third of the models, another third for the next pass; the others are slow."""
    return [
        pytest.param(build, run, id=f"{name}-{run}", marks=[pytest.mark.slow] * bool((i + j) % 3))
        for i, (name, build) in enumerate(MODELS.items())
        for j, run in enumerate(RUNS)
    ]


@pytest.mark.parametrize(("build", "run_name"), thinned())
def test_every_pass_keeps_the_contract(build: Callable[[], nn.Module], run_name: str) -> None:
    each, start = RUNS[run_name]
    model = build()
    gm = start(model)
    if hasattr(gm, "bn1"):
        gm.bn1.eval()
    before, state = facts(gm), {name: value.clone() for name, value in gm.state_dict().items()}
    candidates = list(GraphView(gm).candidates)

    result = each(gm)

    assert facts(gm) == before
    assert_same(dict(gm.state_dict()), state)
    assert result.graph_module is not gm
    check_account(result.account, candidates)
    check_graph(result.graph_module, torch.randn(model.shape))
    theirs = {id(module) for module in result.graph_module.modules()}
    assert theirs.isdisjoint(id(module) for module in gm.modules())

    again = each(result.graph_module)
    assert again.account.applied == ()
    assert again.graph_module.code == result.graph_module.code
    assert_same(dict(again.graph_module.state_dict()), dict(result.graph_module.state_dict()))


def check_account(account: Account, candidates: list[str]) -> None:
    assert sorted([*account.applied, *account.skipped]) == sorted(candidates)
    for name, skip in account.skipped.items():
        assert isinstance(skip.reason, Reason)
        assert skip.detail.startswith(f"{name}: ")
        assert len(skip.detail) > len(name) + 5
        assert str(skip) == f"{skip.reason.value}: {skip.detail}"


def check_graph(gm: GraphModule, x: torch.Tensor) -> None:
    gm.graph.lint()
    code = gm.code
    gm.recompile()
    assert gm.code == code
    called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
    assert called <= {name for name, _ in gm.named_modules(remove_duplicate=False)}
    run(gm, x, training=True), run(gm, x, training=False)


@over_runs
@pytest.mark.parametrize("name", ["Residual", "AuxiliaryHead"])
def test_results_keep_their_outputs_copied_and_pickled(name: str, run_name: str) -> None:
    each, start = RUNS[run_name]
    model = MODELS[name]()
    result = each(start(model)).graph_module
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.randn(model.shape)
    expected = {mode: run(result, x, training=mode) for mode in (True, False)}
    for again in copy.deepcopy(result), loaded, pickle.loads(pickle.dumps(copy.deepcopy(loaded))):
        assert [m.training for m in again.modules()] == [m.training for m in result.modules()]
        for mode, outputs in expected.items():
            assert_same(run(again, x, training=mode), outputs)


@over_runs
def test_a_pickled_graph_is_as_good_a_start(run_name: str) -> None:
    each, start = RUNS[run_name]
    gm = start(Residual())
    ours, theirs = each(pickle.loads(pickle.dumps(gm))), each(gm)
    assert ours.account == theirs.account
    assert ours.graph_module.state_dict().keys() == theirs.graph_module.state_dict().keys()


@over_runs
def test_a_pass_is_a_frozen_dataclass_equal_by_its_options(run_name: str) -> None:
    each, _ = RUNS[run_name]
    assert dataclasses.is_dataclass(each)
    assert dataclasses.replace(each) == each
    assert pickle.loads(pickle.dumps(each)) == each
    with pytest.raises(dataclasses.FrozenInstanceError):
        each.anything = 1


def test_every_pass_of_the_package_is_held_to_the_contract() -> None:
    assert {type(each) for each, _ in RUNS.values()} == {
        kind for kind in Pass.__subclasses__() if kind.__module__.startswith("spre_fx.")
    }


@dataclasses.dataclass(frozen=True)
class Scripted(Pass):
    """A pass that does nothing, and says or does what it is told to."""

    account: Account
    edit: Callable[[GraphModule], None] = lambda _: None

    def rewrite(self, graph_module: GraphModule) -> Account:
        self.edit(graph_module)
        return self.account


def skips(*names: str) -> dict[str, Skip]:
    return {name: Skip(Reason.EXCLUDED, f"{name}: said so") for name in names}


ALL = ("conv1", "conv2", "shortcut.conv", "fc")
BUG = (
    "Expected every conv and linear in exactly one of applied and skipped. This is a bug of the "
    "pass."
)


@pytest.mark.parametrize(
    ("account", "said"),
    [
        (Account(ALL[:2], skips("fc")), "shortcut.conv: neither applied nor skipped"),
        (Account(("fc",), {}), "conv1, conv2, shortcut.conv: neither applied nor skipped"),
        (
            Account((*ALL, "bn1"), skips("ghost")),
            "bn1, ghost: accounted for, but no conv or linear of the graph",
        ),
        (Account(ALL, skips("conv2", "fc")), "conv2, fc: both applied and skipped"),
    ],
)
def test_a_pass_that_lies_about_its_candidates_is_refused(account: Account, said: str) -> None:
    with pytest.raises(InvariantError) as error:
        Scripted(account)(trace(Residual()))
    assert str(error.value) == f"Scripted: {said}. {BUG}"


def test_an_honest_pass_that_does_nothing_returns_an_equal_copy() -> None:
    gm = trace(Residual())
    result = Scripted(Account(ALL[:1], skips(*ALL[1:])))(gm)
    assert isinstance(result, PassResult)
    assert result.graph_module is not gm
    assert result.graph_module.code == gm.code


def use_before_definition(gm: GraphModule) -> None:
    nodes = list(gm.graph.nodes)
    nodes[1].append(nodes[3])
    nodes[1].prepend(nodes[3])


def test_a_pass_that_leaves_an_illegal_graph_is_refused_by_lint() -> None:
    with pytest.raises(RuntimeError, match="before it has been defined"):
        Scripted(Account(ALL, {}), use_before_definition)(trace(Residual()))


def test_an_edit_is_compiled() -> None:
    def negate(gm: GraphModule) -> None:
        output = next(iter(reversed(gm.graph.nodes)))
        with gm.graph.inserting_before(output):
            output.args = (gm.graph.call_function(torch.neg, output.args),)

    gm, x = trace(Residual()).eval(), torch.randn(2, 8, 6, 6)
    result = Scripted(Account(ALL, {}), negate)(gm)
    assert torch.equal(result.graph_module(x), -gm(x))


@dataclasses.dataclass(frozen=True)
class Demanding(Scripted):
    """A pass that takes or leaves nothing."""

    before: bool = True

    def requires(self, graph_module: GraphModule) -> None:
        if self.before:
            raise InvariantError("before")

    def ensures(self, graph_module: GraphModule) -> None:
        raise InvariantError("after")


@pytest.mark.parametrize("before", [True, False])
def test_requires_is_asked_before_and_ensures_after(before: bool) -> None:
    edited = []
    demanding = Demanding(Account(ALL, {}), edited.append, before=before)
    with pytest.raises(InvariantError, match=r"^before$" if before else r"^after$"):
        demanding(trace(Residual()))
    assert len(edited) == (not before)
