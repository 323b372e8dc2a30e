"""Criteria for the unstructured mask B^U of Eq. 8 that look at gradients, and `update_taps`.

Magnitude needs no gradient and works by itself. The others score each weight w of the main branch
of a site from gradients g of the loss; B^U keeps the `ceil(numel * N / M)` highest scores of the
layer, lower index first among equals:

    taylor    mean over batches of |w * g|    Molchanov et al., ICLR 2017, Eq. 7, here per weight
    snip      |w * mean of g|                 Lee et al., ICLR 2019; taken once
    grasp     w * Hg                          Wang et al., ICLR 2020; taken once. They remove the
                                              highest -w * Hg, so the highest w * Hg are kept

Gradients of Taylor are those of B * W in the network as it trains; those of SNIP and GraSP are of
dense main weights, as in their papers. The SpRe branches are in place for all three, which the
papers do not have. H couples the N:M layers of the model, and over several batches H_b g_b is
summed, where GraSP's code takes g over all batches first.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, distributed, nn

from spre_fx.errors import ModelError, OptionError
from spre_fx.methods import MaskMethod
from spre_fx.modules import MaskSchedule, NMLayer
from spre_fx.patterns import Pattern
from spre_fx.ranks import whole
from spre_fx.schedules import Schedule
from spre_fx.selection import top


class Criterion(ABC):
    """Scores weights by gradients of the loss. Subclass it, as a frozen dataclass, to add another.

    Attributes:
        once: Whether scores are taken at the first call of `update_taps` only.
        dense: Whether the gradient is taken with B = 1.
    """

    once: ClassVar[bool] = False
    dense: ClassVar[bool] = False

    def gradients(self, loss: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
        """What is multiplied with the weights. By default: dL/dW."""
        return torch.autograd.grad(loss, weights)

    @abstractmethod
    def batch(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """What one batch adds to the score of each weight."""

    def total(self, summed: Tensor) -> Tensor:
        """Scores from the sum over batches. By default: the sum."""
        return summed


@dataclass(frozen=True)
class Taylor(Criterion):
    """Mean of |w * g| (Molchanov et al., 2017)."""

    def batch(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """|w * g|."""
        return (weight * gradient).abs()


@dataclass(frozen=True)
class SNIP(Criterion):
    """|w * g| at the first call (Lee et al., 2019)."""

    once: ClassVar[bool] = True
    dense: ClassVar[bool] = True

    def batch(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """The product w * g."""
        return weight * gradient

    def total(self, summed: Tensor) -> Tensor:
        """The magnitude of the sum."""
        return summed.abs()


@dataclass(frozen=True)
class GraSP(Criterion):
    """The product w * Hg at the first call (Wang et al., 2020)."""

    once: ClassVar[bool] = True
    dense: ClassVar[bool] = True

    def gradients(self, loss: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
        """Hg, as the gradient of half of the squared norm of g."""
        first = torch.autograd.grad(loss, weights, create_graph=True)
        norm = torch.stack([g.square().sum() for g in first]).sum() / 2
        return torch.autograd.grad(norm, weights)

    def batch(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """The product w * Hg."""
        return weight * gradient


class CriterionTaps(nn.Module):
    """Live taps of Eq. 8 that `update_taps` sets; until then none but what magnitude gives.

    Args:
        taps: The live taps by magnitude.
        pattern: The N:M pattern.
        criterion: How weights are scored.
        schedule: When.

    Attributes:
        mask: The live taps in force, bool of the shape of the kernel.
        taken: Bool of shape (): whether the criterion has had its say.
    """

    mask: Tensor
    taken: Tensor

    def __init__(
        self, taps: Tensor, pattern: Pattern, criterion: Criterion, schedule: Schedule
    ) -> None:
        super().__init__()
        self.pattern, self.criterion, self.schedule = pattern, criterion, schedule
        self.register_buffer("mask", taps.clone())
        self.register_buffer("taken", torch.zeros_like(taps.flatten()[0]))

    def forward(self, weight: Tensor, update: Tensor | None) -> Tensor:  # noqa: ARG002
        """The taps in force."""
        return self.mask.clone()

    def is_due(self, step: Tensor) -> bool:
        """Whether scores are to be taken before `step`: the first time, or by the schedule."""
        if not self.taken:
            return True
        return not self.criterion.once and bool(self.schedule.is_update(step))

    def set(self, scores: Tensor) -> None:
        """Take the taps where B^U keeps more than N/M of the weights, counted in integers."""
        n, m = self.pattern.n, self.pattern.m
        unstructured = top(scores.reshape(1, -1), self.pattern.kept(scores.numel()))
        kept = unstructured.view(scores.shape).sum((0, 1))
        self.mask.copy_(kept * m > n * scores.shape[:2].numel())
        self.taken.fill_(True)


def update_taps(model: nn.Module, loss: Callable[[], Tensor], *, batches: int = 1) -> bool:
    """Choose the live taps anew by the criterion `prepare` was given, if the schedule says so.

    Call it before each training step; it costs nothing where no update is due. SNIP and GraSP are
    due at the first call only.

        for images, labels in loader:
            spre_fx.update_taps(gm, lambda: loss_fn(gm(images), labels))
            ...  # forward, backward, optimizer.step(), as ever

    Leaves parameters, their `.grad` and all other buffers (running statistics, the step) as they
    were. On several ranks, scores are summed over them: call it on all.

    Args:
        model: What `prepare(criterion=...)` returned.
        loss: Computes the loss of a batch, with `model`. Called `batches` times; draw another batch
            in each call to score over several.
        batches: How many.

    Returns:
        Whether taps were chosen anew.

    Raises:
        ModelError: If the model was not prepared with a criterion that needs gradients.
        OptionError: If batches < 1, or the loss is no scalar with a gradient.
    """
    layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, NMLayer)}
    taps = {n: x.live_taps for n, x in layers.items() if isinstance(x.live_taps, CriterionTaps)}
    if not taps:
        raise ModelError(
            "update_taps: expected a model prepared with criterion='taylor', 'snip' or 'grasp', "
            "found no SpRe branch whose taps wait for gradients. Taps by magnitude update "
            "themselves."
        )
    if batches < 1:
        raise OptionError(f"update_taps(batches={batches}): expected batches >= 1.")
    step = next((m.step for m in model.modules() if isinstance(m, MaskSchedule)), torch.tensor(0))
    first = next(iter(taps.values()))
    if not first.is_due(step):
        return False
    with _unchanged_buffers(model):
        scores = _scores(layers, first.criterion, loss, batches)
    with torch.no_grad():
        for name, site in taps.items():
            if distributed.is_available() and distributed.is_initialized():
                distributed.all_reduce(scores[name])
            site.set(first.criterion.total(scores[name]))
    return True


def _scores(
    layers: Mapping[str, NMLayer], criterion: Criterion, loss: Callable[[], Tensor], batches: int
) -> dict[str, Tensor]:
    """The scores of each layer, summed over batches."""
    weights = {name: whole(layer.weight.detach()) for name, layer in layers.items()}
    scores = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for _ in range(batches):
        with _probed(layers, dense=criterion.dense) as probes, torch.enable_grad():
            value = loss()
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                raise OptionError(
                    "update_taps: expected `loss` to return a scalar that depends on the model's "
                    f"weights, found {value!r:.80}."
                )
            found = {name: probe.leaf for name, probe in probes.items() if probe.leaf is not None}
            gradients = criterion.gradients(value, list(found.values()))
        with torch.no_grad():
            for name, gradient in zip(found, gradients, strict=True):
                scores[name] += criterion.batch(weights[name], gradient)
    return {name: score.detach() for name, score in scores.items()}


class _Probe(MaskMethod):
    """Puts a leaf in the place of B * W, by which to differentiate."""

    def __init__(self, *, dense: bool) -> None:
        self.dense = dense
        self.leaf: Tensor | None = None

    def masked(self, weight: Tensor, mask: Tensor) -> Tensor:
        if self.leaf is None:
            value = weight if self.dense else weight * mask
            self.leaf = value.detach().clone().requires_grad_()
        return self.leaf


@contextlib.contextmanager
def _probed(layers: Mapping[str, NMLayer], *, dense: bool) -> Iterator[dict[str, _Probe]]:
    before = {name: (layer.method, layer.sparse) for name, layer in layers.items()}
    probes = {name: _Probe(dense=dense) for name in layers}
    try:
        for name, layer in layers.items():  # sparse convs leave out what removed weights are due
            layer.method, layer.sparse = probes[name], None
        yield probes
    finally:
        for name, layer in layers.items():
            layer.method, layer.sparse = before[name]


@contextlib.contextmanager
def _unchanged_buffers(model: nn.Module) -> Iterator[None]:
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
