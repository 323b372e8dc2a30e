"""Live taps with a memory: each option against Eq. 8 written out, and when they change."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spre_fx
from spre_fx import Change, CubicRamp, Pattern, RunningMean, SpRe
from spre_fx.masks import live_taps, unstructured_mask
from spre_fx.spatial_mask import SpatialMask

PATTERN = Pattern(1, 4)
YES, NO = torch.tensor(True), torch.tensor(False)


def weight(seed: int = 0, kernel: tuple[int, ...] = (3, 3)) -> Tensor:
    """Random weights, larger at some taps than at others."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(kernel, generator=generator) + 0.5
    return torch.randn(8, 12, *kernel, generator=generator) * scale


def shares(values: Tensor) -> Tensor:
    """What B^U keeps at each tap, relative to the N/M that a uniform mask would."""
    kept = unstructured_mask(values, PATTERN).double().mean((0, 1))
    return kept / PATTERN.density


PAPER = SpRe()


def mask(options: SpRe = PAPER, criterion=None, first: Tensor | None = None) -> SpatialMask:
    return SpatialMask(weight() if first is None else first, PATTERN, options, criterion)


@given(seed=st.integers(0, 10**6), kernel=st.sampled_from([(3, 3), (1, 5), (2,), (3, 1, 2)]))
def test_without_options_it_is_eq_8(seed, kernel):
    taps = mask(first=weight(seed, kernel))
    assert torch.equal(taps.mask, live_taps(weight(seed, kernel), PATTERN))
    found = taps(weight(seed + 1, kernel), YES)
    assert torch.equal(found, live_taps(weight(seed + 1, kernel), PATTERN))


@given(seeds=st.lists(st.integers(0, 99), min_size=2, max_size=5))
def test_hysteresis_lets_a_tap_change_only_well_beyond_the_threshold(seeds):
    taps = mask(SpRe(hysteresis=0.2))
    alive = shares(weight()) > 1.2  # at first every tap has to come alive
    assert torch.equal(taps.mask, alive)
    for seed in seeds:
        now = shares(weight(seed))
        alive = (now > 1.2) | (alive & (now > 0.8))
        assert torch.equal(taps(weight(seed), YES), alive)


def test_hysteresis_settles_what_flickers():
    flips = {}
    for h in (0.0, 0.3):
        taps, before, flips[h] = mask(SpRe(hysteresis=h)), None, 0
        for step in range(60):
            noise = torch.randn(8, 12, 3, 3, generator=torch.Generator().manual_seed(step))
            now = taps(weight() + 0.2 * noise, YES)
            flips[h] += 0 if before is None else int((now != before).sum())
            before = now
    assert flips[0.3] < flips[0.0] / 2


def test_narrowing_goes_from_all_taps_to_those_of_eq_8():
    ramp = CubicRamp(2, 10)
    taps, counts = mask(SpRe(narrow=ramp)), []
    for step in range(14):
        found = taps(weight(), YES)
        needed = 1 - float(ramp.left(torch.tensor(step)))
        assert torch.equal(found, shares(weight()) > needed)
        counts.append(int(found.sum()))
    assert counts[0] == 9
    assert counts == sorted(counts, reverse=True)
    assert torch.equal(found, live_taps(weight(), PATTERN))


def test_random_taps_are_as_many_as_are_live_in_an_order_that_stays():
    taps = mask(SpRe("random"))
    for seed in range(8):
        found = taps(weight(seed), YES)
        count = live_taps(weight(seed), PATTERN).sum()
        assert torch.equal(found, taps.order < count)
    other = copy.deepcopy(taps)
    assert torch.equal(other.order, taps.order)
    torch.manual_seed(1)
    assert not torch.equal(mask(SpRe("random")).order, taps.order)


def test_the_criterion_looks_at_what_it_remembers():
    mean, change = mask(criterion=RunningMean(0.9)), mask(criterion=Change())
    first = weight(3)  # a checkpoint that was loaded after `prepare`
    memory = first.abs()
    for step in range(5):
        now = weight(3 + step)
        memory = memory if step == 0 else memory.lerp(now.abs(), 0.1)
        assert torch.equal(mean(now, YES), live_taps(memory, PATTERN))
        assert torch.equal(change(now, YES), live_taps(now - first, PATTERN))


@pytest.mark.parametrize("criterion", [None, RunningMean(0.5), Change()], ids=repr)
@pytest.mark.parametrize("options", [SpRe(hysteresis=0.1), SpRe(narrow=CubicRamp(0, 9))], ids=repr)
def test_nothing_changes_but_at_update_steps_of_training(options, criterion):
    taps = mask(options, criterion)
    for seed in range(3):
        taps(weight(seed), YES)
    before = copy.deepcopy(taps.state_dict())
    taps(weight(7), None)  # somebody looks: sites, finalize
    for update in (None, YES, NO):
        assert torch.equal(taps.eval()(weight(7), update), before["mask"])
    assert all(torch.equal(taps.state_dict()[name], value) for name, value in before.items())
    taps.train()(weight(7), NO)  # counted, and that is all
    assert taps.step == before["step"] + 1
    assert all(torch.equal(taps.state_dict()[n], v) for n, v in before.items() if n != "step")


def test_a_signal_that_is_no_bool_is_an_update():
    taps = mask(SpRe(hysteresis=0.0, narrow=CubicRamp(0, 1)))
    taps.step.fill_(5)
    for share in (-1.0, 0.5):  # of LBC
        found = taps(weight(4), torch.tensor(share, dtype=torch.float64))
        assert torch.equal(found, live_taps(weight(4), PATTERN))


def net() -> nn.Sequential:
    layers = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("straight", [False, True])
def test_the_gradient_of_the_branch_is_masked_or_passes_straight_through(straight):
    gm = spre_fx.prepare(net(), "1:4", branch=SpRe(straight_through=straight))
    x = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    y = gm.get_submodule("0")(x)
    branch_mask = (y[1] * y[2]).double()
    layer = gm.get_submodule("0_spre")
    layer(x, branch_mask).sin().sum().backward()
    leaf = (layer.weight.detach() * branch_mask).requires_grad_()
    nn.functional.conv2d(x, leaf, layer.bias, padding=1).sin().sum().backward()
    expected = leaf.grad if straight else leaf.grad * branch_mask
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-12, atol=1e-12)
    assert bool((layer.weight.grad[branch_mask == 0] != 0).any()) is straight


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_advances_the_memory_once(reentrant):
    plain = spre_fx.prepare(net(), "1:4", criterion="running-mean")
    twice = copy.deepcopy(plain)
    for step in range(3):
        x = torch.randn(2, 8, 5, 5, dtype=torch.float64, requires_grad=True)
        plain(x).sum().backward()
        checkpoint(twice, x, use_reentrant=reentrant).sum().backward()
        with torch.no_grad():
            for model in (plain, twice):
                model.get_submodule("0").weight.mul_(1 + step)
    for name in ("memory", "step", "mask"):
        found = twice.get_buffer(f"0.live_taps.{name}")
        assert torch.equal(found, plain.get_buffer(f"0.live_taps.{name}"))
    assert twice.get_buffer("0.live_taps.step") == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"taps": "all"}, r"taps='all'\): expected one of \['spre', 'same', 'inverse', 'random'\]"),
        ({"hysteresis": -1.0}, "hysteresis=-1.0"),
        ({"narrow": 100}, r"narrow=100\): expected a CubicRamp"),
        ({"taps": "same", "hysteresis": 0.1}, "no taps to choose"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(spre_fx.OptionError, match=words):
        SpRe(**options)


def test_a_criterion_of_gradients_goes_with_no_memory():
    with pytest.raises(spre_fx.OptionError, match="expected neither hysteresis, nor narrow"):
        spre_fx.prepare(net(), "1:4", criterion="taylor", branch=SpRe(hysteresis=0.1))
    with pytest.raises(spre_fx.OptionError, match="'same', which has no taps to choose"):
        spre_fx.prepare(net(), "1:4", criterion="change", branch="same")
