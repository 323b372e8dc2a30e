"""The unstructured baselines on hand-computed cases: GMP, RigL, GraNet, Eq. 6 and Eq. 7."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spre_fx.errors import OptionError
from spre_fx.granet import GraNet
from spre_fx.patterns import Pattern
from spre_fx.schedules import CubicRamp, EveryK, EveryStep, Freeze
from spre_fx.unstructured import GMP, LayerState, RigL, erdos_renyi_kernel

RAMP = CubicRamp(0, 10, every=5)
HALFWAY = 1 - 0.5**3  # of the way to the final sparsity, at step 5 of RAMP


def layer(weights: list[float], density: float, gradient: list[float] | None = None) -> LayerState:
    """A linear layer with one output."""
    weight = torch.tensor([weights])
    noted = None if gradient is None else torch.tensor([gradient])
    return LayerState(weight, torch.ones_like(weight, dtype=torch.bool), noted, density)


def random_layer(shape: tuple[int, ...], density: float) -> LayerState:
    weight = torch.randn(shape)
    mask = torch.ones(shape, dtype=torch.bool)
    return LayerState(weight, mask, torch.randn(shape), density)


def kept(state: LayerState) -> list[int]:
    return state.mask.flatten().nonzero()[:, 0].tolist()


def test_gmp_prunes_each_layer_along_the_cubic():
    first, second = layer([1.0, -8, 3, 4, -5, 6, 7, 2], 0.25), layer([0.1, 0.2, 0.3, 0.4], 0.25)
    method, layers = GMP(), [first, second]
    method.start(layers)
    assert kept(first) == list(range(8))
    method.update(
        layers, RAMP, 5
    )  # density 1 - 0.75 * HALFWAY = 0.34375: round(2.75), round(1.375)
    assert (kept(first), kept(second)) == ([1, 5, 6], [3])
    first.weight[0, 0] = 9.0  # GMP looks at all weights: one may come back
    method.update(layers, RAMP, 10)
    assert kept(first) == [0, 1]
    assert first.weight[0, 2] == 3.0


def test_rigl_drops_by_magnitude_and_grows_by_gradient():
    state = layer([6.0, 5, 4, 3, 2, 1, 0.5, 0.25], 0.5, [0.0, 0, 0, 9, 1, 7, 8, 2])
    method, schedule = RigL(drop=0.5, distribution="uniform"), Freeze(100, EveryK(10))
    method.start([state])
    assert kept(state) == [0, 1, 2, 3]
    method.update([state], schedule, 0)  # drops int(0.5 * 4) = 2: those of 4 and 3
    # The largest gradients of what is not kept: 9 (just dropped, so it keeps its value) and 8.
    assert kept(state) == [0, 1, 3, 6]
    assert state.weight.tolist() == [[6, 5, 0, 3, 0, 0, 0, 0]]


@pytest.mark.parametrize(("step", "dropped"), [(0, 30), (25, 25), (50, 15), (75, 4), (99, 0)])
def test_the_fraction_of_rigl_decays_as_a_cosine(step, dropped):
    state = layer([float(200 - i) for i in range(200)], 0.5, [float(i) for i in range(200)])
    method = RigL(distribution="uniform")
    method.start([state])
    method.update([state], Freeze(100, EveryK(1)), step)
    assert dropped == int(0.3 / 2 * (1 + math.cos(math.pi * step / 100)) * 100)
    assert kept(state) == [*range(100 - dropped), *range(200 - dropped, 200)]


def test_erdos_renyi_kernel_by_hand():
    # Weights 72, 64, 16 of 2x4x3x3, 8x8, 4x4; sums of sizes 12, 16, 8; half of 152 are kept.
    shapes = [(2, 4, 3, 3), (8, 8), (4, 4)]
    scale = 76 / (12 + 16 + 8)
    wanted = [scale * 12 / 72, scale * 16 / 64, 1.0]
    assert wanted[2] < scale * 8 / 16  # more than 1: this layer is dense
    scale = (76 - 16) / (12 + 16)
    found = erdos_renyi_kernel(shapes, [0.5] * 3)
    assert found == pytest.approx([scale * 12 / 72, scale * 16 / 64, 1.0])
    assert found[0] * 72 + found[1] * 64 + 16 == pytest.approx(76)


def test_granet_prunes_globally_then_regenerates():
    first = layer([9.0, 8, 7, 6], 0.5, [0.0, 0, 0, 0])
    second = layer([5.0, 4, 3, 2], 0.5, [0.0, 0, 1, 2])
    method = GraNet(regenerate=0.5, until=20)
    method.start([first, second])
    # Density 1 - 0.5 * HALFWAY = 0.5625: round(4.5) = 4 of the 8 stay, all in the first layer, of
    # which ceil(4 * 0.25 * (1 + cos(pi / 4))) = 2 are dropped; none has a gradient: 7 and 6 return.
    method.update([first, second], RAMP, 5)
    assert (kept(first), kept(second)) == ([0, 1, 2, 3], [])


def test_granet_regenerates_where_the_gradient_is():
    state = layer([9.0, 8, 7, 6, 5, 4, 3, 2], 0.5, [0.0, 0, 1, 2, 3, 4, 9, 8])
    method = GraNet(regenerate=0.5, until=20)
    method.update([state], RAMP, 10)  # 4 stay; ceil(4 * 0.25 * (1 + cos(pi / 2))) = 1 is replaced
    assert kept(state) == [0, 1, 2, 6]
    assert state.weight.tolist() == [[9, 8, 7, 0, 0, 0, 0, 0]]


def test_granet_without_gradients_to_follow_is_global_magnitude_pruning():
    layers = [random_layer((6, 4, 3, 3), 0.1), random_layer((8, 8), 0.1)]
    GraNet().update(layers, CubicRamp(0, 10), 10)  # regeneration has come to its end
    magnitudes = torch.cat([state.weight.abs().flatten() for state in layers])
    masks = torch.cat([state.mask.flatten() for state in layers])
    assert masks.sum() == round(0.1 * 280)
    # Weights outside the masks are zero now; the kept ones are what they were.
    assert magnitudes[~masks].eq(0).all()
    assert magnitudes[masks].gt(0).all()


def rows(mask: Tensor, constraint: str) -> Tensor:
    """Eq. 6 counts over taps; Eq. 7 over W' of shape (K, K, C_out, C_in), a reshape of W."""
    out, inner, *kernel = mask.shape
    if constraint == "spatial":
        return mask.sum((0, 1)).flatten()
    return mask.reshape(*kernel, out, inner).sum((-1, -2)).flatten()


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from(["spatial", "equal"]), st.integers(1, 30))
def test_constraints_keep_the_same_number_in_each_row(seed, constraint, step):
    torch.manual_seed(seed)
    layers = [random_layer((4, 6, 3, 3), 0.3), random_layer((5, 7), 0.3)]
    method, ramp = GraNet(constraint=constraint, until=30), CubicRamp(0, 20)
    for now in range(1, step + 1):
        for state in layers:
            state.gradient = torch.randn_like(state.weight)
        method.update(layers, ramp, now)
    density = 1 - ramp.sparsity(torch.tensor(step), 0.7).item()
    assert rows(layers[0].mask, constraint).eq(math.floor(round(density * 24, 6))).all()
    assert layers[1].mask.sum() == math.floor(round(density * 35, 6))
    assert layers[0].weight[~layers[0].mask].eq(0).all()


def test_the_two_constraints_differ_in_space():
    torch.manual_seed(0)
    spread = {}
    for constraint in ("spatial", "equal", None):
        state = random_layer((8, 8, 3, 3), 0.25)
        GraNet(constraint=constraint).update([state], CubicRamp(0, 1), 1)
        spread[constraint] = rows(state.mask, "spatial").float().std().item()
    assert spread["spatial"] == 0
    assert spread["equal"] > 0
    assert spread[None] > 0


def test_sparse_starts():
    layers = [random_layer((6, 4, 3, 3), 0.1), random_layer((20, 20), 0.1)]
    GraNet(initial_sparsity=0.5).start(layers)
    counts = [int(state.mask.sum()) for state in layers]
    expected = erdos_renyi_kernel([(6, 4, 3, 3), (20, 20)], [0.5, 0.5])
    assert counts == [round(expected[0] * 216), round(expected[1] * 400)]
    assert counts[0] != 108
    layers = [random_layer((6, 4, 3, 3), 0.1)]
    GraNet(initial_sparsity=0.5, constraint="spatial").start(layers)
    assert rows(layers[0].mask, "spatial").eq(12).all()


def test_the_density_is_that_of_the_pattern_unless_given():
    assert GMP().density(Pattern(1, 16)) == 1 / 16
    assert GMP(sparsity=0.95).density(Pattern(1, 16)) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("method", "schedule", "expected"),
    [
        (GMP(), CubicRamp(0, 6, 2), [2, 4, 6]),
        (RigL(), Freeze(7, EveryK(3)), [3, 6]),
        (GraNet(), CubicRamp(1, 6, 2), [1, 3, 5, 6]),
        (GraNet(until=10), CubicRamp(1, 6, 2), [1, 3, 5, 6, 7, 9]),
    ],
    ids=repr,
)
def test_update_steps(method, schedule, expected):
    assert [t for t in range(20) if method.is_update(schedule, torch.tensor(t))] == expected


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GMP(sparsity=1.0), r"GMP\(sparsity=1.0\): expected 0 < sparsity < 1"),
        (lambda: RigL(drop=0.0), r"RigL\(drop=0.0\): expected 0 < drop < 1"),
        (lambda: RigL(distribution="er"), r"RigL\(distribution='er'\): expected 'erk' or"),
        (lambda: GraNet(regenerate=1.0), r"GraNet\(regenerate=1.0\): expected 0 <= reg"),
        (lambda: GraNet(constraint="tap"), r"GraNet\(constraint='tap'\): expected None, 'sp"),
        (lambda: GMP().check([], EveryStep()), r"GMP: expected schedule=CubicRamp"),
        (lambda: GraNet().check([], EveryK(2)), r"GraNet: expected schedule=CubicRamp"),
        (lambda: RigL().check([], EveryK(2)), r"RigL: expected schedule=Freeze\(at=T_end"),
        (lambda: RigL().check([], Freeze(0)), r"RigL: expected schedule=Freeze\(at=T_end"),
        (lambda: GraNet(until=5).check([], RAMP), r"GraNet\(until=5\): .* end of the ramp on, 10"),
        (
            lambda: GraNet(initial_sparsity=0.8).check([Pattern(2, 4)], RAMP),
            r"GraNet\(initial_sparsity=0.8\): expected at most the final one, 0.5",
        ),
    ],
)
def test_refusals(make, words):
    with pytest.raises(OptionError, match=words):
        make()
