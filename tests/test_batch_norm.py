"""Batch norms: which kinds are known, what is read from them, and the one of a SpRe branch."""

from typing import Any

import pytest
import torch
from layers import Make
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from spre_fx.batch_norm import (
    affine,
    is_batch_norm,
    is_frozen_batch_norm,
    new_spre_batch_norm,
    statistics,
)

KINDS: dict[str, Make] = {
    "1d": nn.BatchNorm1d,
    "2d": nn.BatchNorm2d,
    "3d": nn.BatchNorm3d,
    "sync": nn.SyncBatchNorm,
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def randomise(bn: Any) -> Any:
    """Draw every tensor of a batch norm at random."""
    with torch.no_grad():
        for tensor in (bn.weight, bn.bias, bn.running_mean):
            if tensor is not None:
                tensor.normal_()
        bn.running_var.uniform_(0.3, 3)
    return bn


class Standardised(nn.BatchNorm2d):
    """A batch norm that does something more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def frozen_batch_norm_written_alike(features: int) -> nn.Module:
    """As detectron2 has it: the name, the buffers and eps, another class."""
    module: Any = type("FrozenBatchNorm2d", (nn.Module,), {})()
    for name in ("weight", "bias", "running_mean", "running_var"):
        module.register_buffer(name, torch.rand(features))
    module.eps = 1e-3
    return module


@every_kind
def test_every_kind_of_torch_is_a_batch_norm_and_not_frozen(kind: Make) -> None:
    assert is_batch_norm(kind(4))
    assert not is_frozen_batch_norm(kind(4))


@pytest.mark.parametrize("make", [FrozenBatchNorm2d, frozen_batch_norm_written_alike])
def test_a_frozen_batch_norm_is_known_by_its_name_and_buffers(make: Make) -> None:
    assert is_batch_norm(make(4))
    assert is_frozen_batch_norm(make(4))


@pytest.mark.parametrize(
    "module",
    [
        Standardised(4),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.Identity(),
        nn.Conv2d(4, 4, 1),
        type("FrozenBatchNorm2d", (nn.Identity,), {})(),
        type("OtherBatchNorm2d", (FrozenBatchNorm2d,), {})(4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_computes_something_else_is_no_batch_norm(module: nn.Module) -> None:
    assert not is_batch_norm(module)
    assert not is_frozen_batch_norm(module)


def evaluated(bn: Any, x: Tensor) -> Tensor:
    """What the statistics of `bn` say it computes of `x`."""
    found, at = statistics(bn), (-1, *[1] * (x.dim() - 2))
    y = (x - found.mean.view(at)) / (found.var + found.eps).sqrt().view(at)
    if found.gamma is not None:
        y = y * found.gamma.view(at)
    return y if found.beta is None else y + found.beta.view(at)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm1d, (3, 4)),
        (nn.BatchNorm1d, (3, 4, 5)),
        (nn.BatchNorm2d, (3, 4, 5, 2)),
        (nn.BatchNorm3d, (3, 4, 5, 2, 3)),
        (nn.SyncBatchNorm, (3, 4, 5, 2)),
    ],
)
def test_statistics_are_what_it_computes_in_evaluation(
    kind: Make, shape: tuple[int, ...], affine: bool
) -> None:
    bn = randomise(kind(4, eps=0.02, affine=affine, dtype=torch.float64)).eval()
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(evaluated(bn, x), bn(x), rtol=1e-12, atol=1e-12)
    assert (statistics(bn).gamma is None) == (not affine)


def test_statistics_of_a_frozen_batch_norm_are_what_it_computes() -> None:
    bn = randomise(FrozenBatchNorm2d(4, eps=0.02)).double()
    x = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    torch.testing.assert_close(evaluated(bn, x), bn(x), rtol=1e-12, atol=1e-12)


@every_kind
@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0])
def test_the_new_one_is_configured_as_the_main_one_and_new(kind: Make, gamma: float) -> None:
    main = randomise(kind(4, eps=0.02, momentum=0.7, dtype=torch.float64))
    main.num_batches_tracked.fill_(9)
    new: Any = new_spre_batch_norm(main, gamma)
    assert type(new) is kind
    assert (new.num_features, new.eps, new.momentum) == (4, 0.02, 0.7)
    assert new.track_running_stats
    fresh = {"weight": gamma, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
    for name, value in fresh.items():
        assert torch.equal(getattr(new, name), torch.full((4,), value, dtype=torch.float64)), name
    assert new.num_batches_tracked == 0
    assert all(parameter.requires_grad for parameter in new.parameters())


def test_a_cumulative_average_stays_one() -> None:
    assert new_spre_batch_norm(nn.BatchNorm2d(4, momentum=None), 1.0).momentum is None


@every_kind
def test_type_and_device_are_those_of_the_main_one(kind: Make) -> None:
    new = new_spre_batch_norm(kind(4, dtype=torch.bfloat16, device="meta"), 1.0)
    assert {t.dtype for t in new.state_dict().values()} == {torch.bfloat16, torch.int64}
    assert {t.device.type for t in new.state_dict().values()} == {"meta"}


def test_the_process_group_of_a_sync_batch_norm_is_shared() -> None:
    group: Any = object()
    assert new_spre_batch_norm(nn.SyncBatchNorm(4, process_group=group), 1.0).process_group is group


@every_kind
@pytest.mark.parametrize(("gamma", "affine"), [(1.0, False), (0.0, True), (0.5, True)])
def test_without_affine_parameters_the_new_one_has_them_only_to_hold_gamma(
    kind: Make, gamma: float, affine: bool
) -> None:
    new: Any = new_spre_batch_norm(kind(4, affine=False), gamma)
    assert new.affine is affine
    if affine:
        assert new.weight.tolist() == [gamma] * 4
    else:
        assert new.weight is None


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_the_new_one_is_in_the_mode_of_the_main_one(kind: Make, training: bool) -> None:
    assert new_spre_batch_norm(kind(4).train(training), 1.0).training is training


@pytest.mark.parametrize("make", [FrozenBatchNorm2d, frozen_batch_norm_written_alike])
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_a_frozen_one_gets_a_trainable_batch_norm(make: Make, gamma: float) -> None:
    main = make(4)
    main.eps = 0.02
    new: Any = new_spre_batch_norm(main.double(), gamma)
    assert type(new) is nn.BatchNorm2d
    assert (new.num_features, new.eps, new.momentum) == (4, 0.02, nn.BatchNorm2d(1).momentum)
    assert new.weight.tolist() == [gamma] * 4
    assert {t.dtype for t in new.state_dict().values()} == {torch.float64, torch.int64}
    assert all(parameter.requires_grad for parameter in new.parameters())
    x = torch.randn(8, 4, 3, 3, dtype=torch.float64)
    new(x)
    assert not torch.equal(new.running_mean, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("training", [True, False])
def test_a_new_one_beside_a_frozen_one_learns_nothing_in_evaluation(training: bool) -> None:
    assert new_spre_batch_norm(FrozenBatchNorm2d(4).train(training), 1.0).training is training


@pytest.mark.parametrize("learnt", [True, False])
def test_a_batch_norm_is_a_scale_and_a_shift(learnt: bool) -> None:
    bn = randomise(nn.BatchNorm2d(20, affine=learnt)).double().eval()
    scale, shift = affine(bn)
    assert (scale.dtype, scale.shape, shift.shape) == (torch.float64, (20,), (20,))
    x = torch.randn(2, 20, 3, 3).double()
    found = x * scale[:, None, None] + shift[:, None, None]
    torch.testing.assert_close(found, bn(x).detach(), rtol=1e-12, atol=1e-12)
