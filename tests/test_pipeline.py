"""Pipelines: the passes, their order, one copy for all, and one account for each."""

import pytest
import torch
from models import AuxiliaryHead, Residual, assert_same, kinds, run
from torch import nn
from torch.fx import GraphModule

from spre_fx import GMP, SRSTE, CubicRamp, EveryK, EveryStep, Pattern, SpRe
from spre_fx.backends import DenseBackend
from spre_fx.choice import Timings
from spre_fx.modules import NMLayer
from spre_fx.passes import (
    ComputeSparsely,
    DuplicateBranches,
    FoldBranches,
    FuseEpilogues,
    Lower,
    ModulariseCalls,
    Pipeline,
    Policy,
    SpecialiseToEval,
    WireMasks,
    WireUnstructured,
    deployment_pipeline,
    lowering_pipeline,
    trace,
    training_pipeline,
)

POLICY = Policy(Pattern(1, 4))
TRAINING = training_pipeline(POLICY, SRSTE(), EveryStep(), branch=SpRe(), gamma=0.5)
DEPLOYMENT = deployment_pipeline()


def test_the_training_pipeline_duplicates_and_wires() -> None:
    assert TRAINING.passes == (
        ModulariseCalls(),
        DuplicateBranches(POLICY, 0.5),
        WireMasks(POLICY, SRSTE(), EveryStep()),
    )


def test_without_a_branch_the_training_pipeline_only_wires() -> None:
    plain = training_pipeline(POLICY, SRSTE(), EveryK(2), branch=None, gamma=1.0)
    assert plain.passes == (ModulariseCalls(), WireMasks(POLICY, SRSTE(), EveryK(2)))


@pytest.mark.parametrize("branch", [SpRe(), None], ids=str)
def test_sparse_compute_comes_last(branch: SpRe | None) -> None:
    options = {"branch": branch, "gamma": 0.5}
    dense = training_pipeline(POLICY, SRSTE(), EveryStep(), **options)
    sparse = training_pipeline(POLICY, SRSTE(), EveryStep(), **options, sparse=True)
    assert sparse.passes == (*dense.passes, ComputeSparsely())
    assert sparse.index_of_masks == dense.index_of_masks
    assert isinstance(sparse.passes[sparse.index_of_masks], WireMasks)


@pytest.mark.parametrize("sparse", [True, False])
def test_unstructured_masks_have_a_pass_of_their_own(sparse: bool) -> None:
    options = {"branch": None, "gamma": 1.0, "sparse": sparse}
    pipeline = training_pipeline(POLICY, GMP(), CubicRamp(0, 4), **options)
    wire = WireUnstructured(POLICY, GMP(), CubicRamp(0, 4))
    assert pipeline.passes == (ModulariseCalls(), wire, *[ComputeSparsely()] * sparse)
    assert pipeline.index_of_masks == 1


def test_the_deployment_pipeline_specialises_and_folds() -> None:
    assert DEPLOYMENT.passes == (SpecialiseToEval(), FoldBranches())


def test_the_lowering_pipeline_lowers_and_fuses() -> None:
    pipeline = lowering_pipeline(DenseBackend(), {}, Timings(""))
    assert pipeline.passes == (Lower(DenseBackend()), FuseEpilogues())


def test_a_pipeline_computes_what_its_passes_do_one_by_one() -> None:
    start = TRAINING(trace(AuxiliaryHead()))[0]
    deployed, accounts = DEPLOYMENT(start)
    step = start
    for each, account in zip(DEPLOYMENT.passes, accounts, strict=True):
        step, expected = (result := each(step)).graph_module, result.account
        assert account == expected
    assert kinds(deployed) == kinds(step)
    assert_same(dict(deployed.state_dict()), dict(step.state_dict()))
    assert [account.applied for account in accounts] == [
        ("aux.conv",),
        ("conv1", "conv2"),
    ]


def facts(gm: GraphModule) -> tuple[object, ...]:
    modes = [(name, type(module), module.training) for name, module in gm.named_modules()]
    return gm.code, [(node.name, node.args) for node in gm.graph.nodes], modes


@pytest.mark.parametrize("pipeline", [TRAINING, DEPLOYMENT])
def test_a_pipeline_leaves_its_input_as_it_was(pipeline: Pipeline) -> None:
    gm = trace(Residual())
    if pipeline is DEPLOYMENT:
        gm = TRAINING(gm)[0]
    before, state = facts(gm), {name: value.clone() for name, value in gm.state_dict().items()}
    result, _ = pipeline(gm)
    assert facts(gm) == before
    assert_same(dict(gm.state_dict()), state)
    theirs = {value.data_ptr() for value in result.state_dict().values()}
    assert theirs.isdisjoint(value.data_ptr() for value in state.values())


def test_in_place_a_pipeline_works_on_the_very_graph() -> None:
    gm = trace(Residual())
    conv, weight = gm.conv1, gm.conv1.weight
    prepared, accounts = TRAINING.run_in_place(gm)
    assert prepared is gm
    assert len(accounts) == 3
    assert gm.conv1 is conv
    assert isinstance(conv, NMLayer)
    assert conv.weight is weight


def test_an_empty_pipeline_is_a_copy() -> None:
    gm = trace(Residual())
    copied, accounts = Pipeline(())(gm)
    assert accounts == []
    assert copied is not gm
    assert copied.code == gm.code


def test_a_training_graph_runs_forward_and_backward_and_is_deployed() -> None:
    gm = TRAINING(trace(Residual()))[0]
    optimizer = torch.optim.SGD(gm.parameters(), 0.1)
    x = torch.randn(4, 8, 6, 6)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(gm(x), torch.tensor([0, 1, 2, 3])).backward()
        assert all(p.grad is not None for p in gm.parameters())
        optimizer.step()
    deployed = DEPLOYMENT(gm)[0]
    ours, theirs = (run(m, x, training=False)["output 0"] for m in (deployed, gm))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert set(kinds(deployed)) == {
        *("placeholder", "Conv2d", "ReLU", "add", "adaptive_avg_pool2d", "flatten", "Linear"),
        "output",
    }
