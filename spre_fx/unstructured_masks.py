"""What the unstructured baselines need in a graph: one node for all masks, and dense gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, distributed, nn
from torch._compile import _disable_dynamo

from spre_fx.errors import ModelError
from spre_fx.modules import MaskSchedule, NMLayer, inside_backward
from spre_fx.ranks import is_shard
from spre_fx.scheduled_mask import KeptMask
from spre_fx.schedules import Schedule
from spre_fx.unstructured import LayerState, UnstructuredMethod

if TYPE_CHECKING:
    from typing_extensions import Self


class UnstructuredMasks(MaskSchedule):
    """Updates the masks of all layers where an update is due, and gives them to the graph.

    The layers own their masks; this module holds a plain reference to each. It reads all weights
    at once, so it takes FSDP2 applied at the root, not to submodules, and RigL and GraNet, which
    write weights, not at all. The step is read on the host, once a forward; under `torch.compile`
    that is one graph break.

    Args:
        layers: The layers, whose `nm_mask` is a `KeptMask`.
        method: The method.
        schedule: When it updates.
    """

    method: UnstructuredMethod

    def __init__(
        self, layers: Sequence[NMLayer], method: UnstructuredMethod, schedule: Schedule
    ) -> None:
        super().__init__(schedule, method)
        self.layers = list(layers)  # a plain list: submodules of the model, not of this
        for layer in layers if method.needs_gradient else ():
            layer.dense_gradient = DenseGradient(layer.weight).train(layer.training)
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        states = self._states()
        for state in states:
            state.mask.fill_(True)
        self.method.start(states)

    def train(self, mode: bool = True) -> Self:
        """As of any module; the moment to see whether weights are shards between two steps."""
        if self.method.needs_gradient and any(is_shard(layer.weight) for layer in self.layers):
            raise ModelError(
                f"{type(self.method).__name__}: expected whole weights, found shards: weights that "
                "come back are set to 0, which fully_shard would lose. Use DistributedDataParallel."
            )
        return super().train(mode)

    def forward(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        """The mask of each layer."""
        if self.training and not inside_backward():
            self._advance()
        # The next update writes into the masks while autograd may still hold what is returned.
        return tuple(_mask(layer).mask.clone() for layer in self.layers)

    # torch.compiler.disable imports the compiler at once; this, as in torch.optim, when called.
    @_disable_dynamo
    @torch.no_grad()
    def _advance(self) -> None:
        self._check_rank()
        ask = self.method.is_update
        asked = [ask(self.schedule, self.step), ask(self.schedule, self.step + 1), self.step == 0]
        due, next_due, first = torch.stack(asked).tolist()
        if first:  # ranks may have been made equal, or weights loaded, since `prepare`
            self._start()
        if due:
            self.method.update(self._states(reduce=True), self.schedule, int(self.step))
        for layer in self.layers:
            if isinstance(layer.dense_gradient, DenseGradient):
                layer.dense_gradient.collect(next_due)
        self._count()

    def _states(self, *, reduce: bool = False) -> list[LayerState]:
        states = []
        for layer in self.layers:
            if is_shard(layer.weight):
                raise ModelError(
                    f"{type(self.method).__name__}: expected whole weights, found shards: it looks "
                    "at all layers at once. Apply fully_shard to the whole model only, or use "
                    "DistributedDataParallel."
                )
            gradient = getattr(layer.dense_gradient, "sum", None)
            if gradient is not None and reduce and _is_distributed():
                distributed.all_reduce(gradient)
            density = self.method.density(layer.pattern)
            states.append(LayerState(layer.weight, _mask(layer).mask, gradient, density))
        return states


def _mask(layer: NMLayer) -> KeptMask:
    assert isinstance(layer.nm_mask, KeptMask)
    return layer.nm_mask


class DenseGradient(nn.Module):
    """Takes note of the gradient of B * W, removed weights included, on its way back.

    Kept only in the backward before an update. Each rank has its own, and they are summed over the
    ranks when they are used: a checkpoint of one rank holds that rank's.

    Args:
        weight: `(C_out, C_in/groups, *kernel)`.

    Attributes:
        sum: The gradient, of the shape of the weight; in the `state_dict`.
    """

    per_rank: ClassVar[tuple[str, ...]] = ("sum",)
    sum: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.collects = False
        self.register_buffer("sum", torch.zeros_like(weight, requires_grad=False))

    def collect(self, on: bool) -> None:
        """Begin anew with the next backward, or stop."""
        if on:
            self.sum.zero_()
        self.collects = on

    def forward(self, masked: Tensor) -> Tensor:
        """What it is given."""
        if not (self.training and self.collects):
            return masked
        noted: Tensor = _Note.apply(masked, self.sum)
        return noted


class _Note(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, masked: Tensor, total: Tensor) -> Tensor:
        ctx.total = total
        return masked.view_as(masked)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        ctx.total.add_(gradient)
        return gradient, None


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
