"""LBC against its definition: forward, gradient of the scores, removal, and what is left."""

import copy
import pickle
from itertools import combinations

import pytest
import torch
from test_api import small_net, train
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import spre_fx
from spre_fx.lbc import LBC, CombinationMask
from spre_fx.patterns import Pattern
from spre_fx.schedules import CubicRamp

RAMP = CubicRamp(2, 8, every=2)


def mask_of(scores: list[float], pattern: Pattern) -> CombinationMask:
    """One group of M weights with these scores."""
    module = CombinationMask(torch.zeros(1, pattern.m, dtype=torch.float64), pattern)
    with torch.no_grad():
        module.scores.copy_(torch.tensor(scores).view_as(module.scores))
    return module


def left(share: float) -> torch.Tensor:
    return torch.tensor(share, dtype=torch.float64)


def test_scores_start_so_that_those_that_hold_a_member_sum_to_one():
    module = CombinationMask(torch.zeros(6, 8, 3, 3), Pattern(2, 4))
    assert module.scores.shape == (6, 2, 3, 3, 6)
    assert (module.scores @ module.members).eq(1).all()


def test_removal_of_the_lowest_scores_by_hand():
    # 2:4, combinations in order: 01 02 03 12 13 23.
    module = mask_of([0.6, 0.5, 0.4, 0.3, 0.2, 0.1], Pattern(2, 4))
    weight = torch.zeros(1, 4)
    assert module(weight, left(-1.0)).tolist() == [[1, 1, 1, 1]]
    assert not module.removed.any()
    module(weight, left(0.4))  # 1 + ceil(5 * 0.4) = 3 stay: 01 02 03
    assert module.removed.flatten().tolist() == [False] * 3 + [True] * 3
    module(weight, left(0.1))  # 1 + ceil(0.5) = 2 stay: 01 02, so member 3 goes
    assert module(weight, left(-1.0)).tolist() == [[1, 1, 1, 0]]
    assert module(weight, None).tolist() == [[1, 1, 0, 0]]
    module(weight, left(0.0))
    assert module(weight, left(-1.0)).tolist() == [[1, 1, 0, 0]]


def test_a_flat_pattern_has_a_score_for_each_combination_of_its_own_groups():
    weight = torch.zeros(3, 1, 3, 3, dtype=torch.float64)  # 27 weights: seven groups, one partial
    module = CombinationMask(weight, Pattern(1, 4, flat=True))
    assert module.scores.shape == (1, 7, 4)
    assert module.removed.sum() == 1  # the last group has no fourth member
    with torch.no_grad():
        module.scores[0, 2, 3] = 9.0  # weight 11: filter 1, tap (0, 2)
    mask = module(weight, None)
    assert mask.shape == weight.shape
    assert mask.flatten().nonzero()[:, 0].tolist() == [0, 4, 11, 12, 16, 20, 24]


def test_a_removed_combination_never_comes_back():
    module = mask_of([3.0, 2.0, 1.0, 0.0], Pattern(1, 4))
    module(torch.zeros(1, 4), left(0.3))  # 1 + ceil(0.9) = 2 stay
    with torch.no_grad():
        module.scores[..., 3] = 99.0
    module(torch.zeros(1, 4), left(0.0))
    assert module(torch.zeros(1, 4), left(-1.0)).tolist() == [[1, 0, 0, 0]]


def test_equal_scores_go_by_index():
    module = mask_of([1.0] * 6, Pattern(2, 4))
    module(torch.zeros(1, 4), left(0.0))
    assert (~module.removed).flatten().nonzero().tolist() == [[0]]


def test_the_gradient_of_a_score_is_the_sum_over_its_members():
    torch.manual_seed(1)
    pattern = Pattern(2, 4)
    module = CombinationMask(torch.zeros(3, 8, 2, dtype=torch.float64), pattern)
    weight = torch.randn(3, 8, 2, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        module.scores.copy_(torch.randn_like(module.scores))
    module(weight, left(0.25))
    upstream = torch.randn_like(weight)
    mask = module(weight, left(-1.0))
    (LBC().masked(weight, mask) * upstream).sum().backward()
    assert torch.equal(weight.grad, mask * upstream)
    for index in torch.cartesian_prod(*map(torch.arange, module.scores.shape)).tolist():
        out, group, tap, number = index
        chosen = list(combinations(range(4), 2))[number]
        terms = [(weight * upstream)[out, 4 * group + i, tap] for i in chosen]
        expected = torch.zeros(()) if module.removed[tuple(index)] else sum(terms)
        torch.testing.assert_close(
            module.scores.grad[tuple(index)], expected.detach().double(), rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize("pattern", [Pattern(1, 4), Pattern(2, 4), Pattern(3, 5)], ids=str)
@pytest.mark.parametrize("channels", [8, 10, 6])
def test_what_is_left_obeys_the_pattern_and_wastes_nothing(pattern, channels):
    module = CombinationMask(torch.zeros(4, channels, 3, 3), pattern)
    with torch.no_grad():
        module.scores.copy_(torch.rand_like(module.scores))
    best = module(torch.zeros(()), None)
    full, rest = divmod(channels, pattern.m)
    kept = full * pattern.n + min(pattern.n, rest)
    assert best.sum(1).eq(kept).all()
    module(torch.zeros(()), left(0.0))
    assert torch.equal(module(torch.zeros(()), left(-1.0)), best)


@pytest.mark.parametrize("branch", ["spre", None])
def test_the_cubic_schedule_in_training(branch):
    prepared = spre_fx.prepare(small_net(), "2:4", method="lbc", branch=branch, schedule=RAMP)
    images = torch.randn(2, 3, 9, 9)
    seen = []
    for _ in range(10):
        train(prepared, images, steps=1)
        (count,) = (~prepared.get_submodule("3.nm_mask").removed).sum(-1).unique().tolist()
        seen.append(count)
    # After step t: 1 + ceil(5 * (1 - (t - 2) / 6)^3) at t = 2, 4, 6, 8, and no change between.
    assert seen == [6, 6, 6, 6, 3, 3, 2, 2, 1, 1]
    scores = prepared.get_submodule("3.nm_mask").scores
    assert scores.grad is not None
    assert scores.std() > 0


@pytest.mark.parametrize("branch", ["spre", None])
@pytest.mark.parametrize("steps", [1, 5, 10])
def test_finalize_at_any_moment(branch, steps):
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    prepared = spre_fx.prepare(
        small_net().double(), "2:4", method="lbc", branch=branch, schedule=RAMP
    )
    train(prepared, images, steps)
    deployed = spre_fx.finalize(prepared)
    assert spre_fx.masks.obeys(deployed.get_submodule("3").weight.detach(), Pattern(2, 4))
    with torch.no_grad():
        expected = prepared.eval()(images)
        torch.testing.assert_close(deployed(images), expected, rtol=1e-10, atol=1e-12)


def test_evaluation_removes_nothing():
    prepared = spre_fx.prepare(small_net(), "2:4", method="lbc", schedule=CubicRamp(0, 3)).eval()
    before = copy.deepcopy(prepared.state_dict())
    prepared(torch.randn(2, 3, 9, 9))
    assert all(torch.equal(before[key], value) for key, value in prepared.state_dict().items())


def test_resuming_is_as_if_never_interrupted():
    images = torch.randn(2, 3, 9, 9)
    prepared = spre_fx.prepare(small_net(), "2:4", method="lbc", schedule=RAMP)
    assert "3.nm_mask.scores" in dict(prepared.named_parameters())
    train(prepared, images, 5)
    resumed = spre_fx.prepare(small_net(), "2:4", method="lbc", schedule=RAMP)
    resumed.load_state_dict(pickle.loads(pickle.dumps(prepared.state_dict())))
    for model in (prepared, resumed):
        train(model, images, 5)
    state = resumed.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in prepared.state_dict().items())


def test_it_compiles_whole_and_once():
    prepared = spre_fx.prepare(
        nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)),
        "2:4",
        method="lbc",
        schedule=CubicRamp(0, 4),
    )
    eager = copy.deepcopy(prepared)
    images = torch.randn(2, 8, 5, 5)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(prepared, fullgraph=True, backend=counter)
    for _ in range(6):
        train(compiled, images, 1)
        train(eager, images, 1)
    assert counter.frame_count == 1
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(prepared.state_dict()[key], value)


def test_under_autocast_masks_and_scores_stay_in_float32():
    torch.manual_seed(0)
    prepared = spre_fx.prepare(
        nn.Sequential(nn.Conv2d(8, 8, 3)), "2:4", method="lbc", schedule=RAMP, branch=None
    )
    gradients = []
    for enabled in (False, True):
        prepared.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = prepared(torch.ones(2, 8, 5, 5))
        y.float().sum().backward()
        (scores,) = (p for name, p in prepared.named_parameters() if name.endswith("scores"))
        gradients.append(scores.grad.clone())
    assert {p.dtype for p in prepared.parameters()} == {torch.float32}
    torch.testing.assert_close(*gradients, rtol=0.02, atol=0.02)
    masks_of = next(m for m in prepared.modules() if isinstance(m, CombinationMask))
    with torch.autocast("cpu", torch.bfloat16):
        assert masks_of._hold(-1).mask.dtype == torch.float32


@pytest.mark.parametrize("left", [-1.0, 0.5])
def test_its_operators_keep_the_rules(left):
    operators = torch.ops.spre_fx
    removed, scores = torch.rand(3, 2, 6) < 0.3, torch.rand(3, 2, 6)
    operands = (removed, scores, torch.tensor(left))
    torch.library.opcheck(operators.remove_combinations.default, operands)
    torch.library.opcheck(operators.held_members.default, (removed, torch.rand(6, 4).round()))
    before = removed.clone()
    operators.remove_combinations(*operands)
    assert (left > 0) == bool((removed > before).any())


def test_too_many_combinations_are_refused_with_their_number():
    with pytest.raises(spre_fx.OptionError, match=r"^LBC: 8:16 has 12,870 combinations of 8 out"):
        spre_fx.prepare(small_net(), "8:16", method="lbc", schedule=RAMP)
    with pytest.raises(spre_fx.OptionError, match="4:16 has 1,820"):
        spre_fx.prepare(small_net(), "2:4", method="lbc", schedule=RAMP, overrides={"3": "4:16"})
    LBC(most=12870).check([Pattern(8, 16)], RAMP)


@pytest.mark.parametrize("schedule", [None, spre_fx.EveryK(3)])
def test_a_schedule_without_an_end_is_refused(schedule):
    with pytest.raises(spre_fx.OptionError, match=r"expected schedule=CubicRamp\(t_i, t_f\)"):
        spre_fx.prepare(small_net(), "2:4", method="lbc", schedule=schedule)


def test_a_limit_below_two_is_refused():
    with pytest.raises(spre_fx.OptionError, match=r"LBC\(most=1\): expected most >= 2"):
        LBC(most=1)
