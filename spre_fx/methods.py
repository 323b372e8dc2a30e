"""Mask methods: how the N:M mask B is chosen, and what gradient the weights receive.

A method is a small frozen dataclass. It answers which weights to keep (`nm_mask`) and how a weight
is masked in the forward pass (`masked`), and names its default schedule and the starting value of
gamma of the SpRe branch's batch norm. A method whose mask is more than a function of the weight
(LBC's has parameters) says so in `mask_module`.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from spre_fx import masks
from spre_fx.errors import OptionError
from spre_fx.masked_weight import Product, StraightThroughDecay, masked_weight
from spre_fx.patterns import Pattern
from spre_fx.permutation import ChannelPermutation
from spre_fx.scheduled_mask import ScheduledMask
from spre_fx.schedules import EveryStep, Freeze, Schedule


class MaskMethod(ABC):
    """One way of training N:M weights. Subclass it, as a frozen dataclass, to add another.

    Attributes:
        schedule: The schedule followed when `prepare` is given none.
        spre_gamma: Starting value of gamma of `bn_spre` when `prepare` is given none. 1 trains the
            SpRe branch from the first step, as the paper does from scratch. 0 starts with the
            function of the main branch alone, which keeps what pre-trained weights compute; that
            is our deviation from the paper, which starts at random there too.
        kept_gradient: Whether `masked` gives removed weights no gradient, so that none need be
            computed for them.
    """

    schedule: ClassVar[Schedule] = EveryStep()
    spre_gamma: ClassVar[float] = 1.0
    kept_gradient: ClassVar[bool] = False

    @property
    def permutation(self) -> ChannelPermutation | None:
        """How `prepare` looks for a better order of channels first. None: it does not."""
        return None

    def nm_mask(self, weight: Tensor, pattern: Pattern) -> Tensor:
        """The N:M mask B (Algorithm 1, line 3). By default the N largest magnitudes of each M.

        Args:
            weight: `(C_out, C_in/groups, *kernel)`, detached.
            pattern: The N:M pattern.

        Returns:
            A bool tensor of the shape of `weight`.
        """
        return masks.nm_mask(weight, pattern)

    def check(self, patterns: Collection[Pattern], schedule: Schedule) -> None:  # noqa: B027
        """Raise OptionError for a pattern or a schedule this method cannot work with."""

    def mask_module(self, weight: Tensor, pattern: Pattern, *, keep: bool) -> nn.Module:
        """The module `<site>.nm_mask`, called with the weight and the value of `signal`.

        Args:
            weight: `(C_out, C_in/groups, *kernel)`, detached.
            pattern: The N:M pattern.
            keep: Whether the mask outlives a step; if so it is taken from the weight now.
        """
        module = ScheduledMask(self.nm_mask, pattern)
        if keep:
            module.keep(weight)
        return module

    def signal(self, schedule: Schedule, step: Tensor) -> Tensor:
        """What the mask modules are told at `step`, a tensor of shape (). By default: is_update.

        And True at step 0: `prepare` took masks of weights that DDP or FSDP may since have made
        equal on all ranks, or a checkpoint replaced.
        """
        return schedule.is_update(step) | (step == 0)

    @abstractmethod
    def masked(self, weight: Tensor, mask: Tensor) -> Tensor:
        """B * W, with the gradient this method gives to W.

        Args:
            weight: `(C_out, C_in/groups, *kernel)`, requiring a gradient or not.
            mask: B, of the same shape.
        """

    def product(self) -> Product | None:
        """What `masked` computes, if a conv can do so itself and spare the memory of B * W."""
        return None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """What a base class says of its `masked` is not said of one that overrides it."""
        super().__init_subclass__(**kwargs)
        if "masked" in vars(cls) and "product" not in vars(cls):
            cls.product = MaskMethod.product  # type: ignore[method-assign]


@dataclass(frozen=True)
class SRSTE(MaskMethod):
    """SR-STE (Zhou et al., ICLR 2021): magnitude masks, straight-through gradient, sparse decay.

    All weights are updated: `dL/dW = dL/d(B * W) + decay * (1 - B) * W`. The term is added in the
    backward pass of each forward, whatever the loss is multiplied with:

    - A GradScaler multiplies the loss, and divides gradients later: hand it over as `scaler`, and
      the term is multiplied too. Without it a scale of 65,536 would undo the decay, so training
      under float16 autocast without it warns, once a process. bfloat16 needs none.
    - With k backward passes for one step of the optimizer it is added k times: divide decay by k.

    Attributes:
        decay: lambda, the pull of removed weights towards zero.
        scaler: The `torch.amp.GradScaler` of the training loop. Copies of the model mean the same
            one. It is not pickled with the model: into a model that torch.load made, prepared anew
            with the scaler, load the `state_dict`.

    Raises:
        OptionError: If decay is negative, or scaler is no GradScaler.
    """

    decay: float = 2e-4
    scaler: GradScaler | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.decay < math.inf:
            raise OptionError(f"SRSTE(decay={self.decay}): expected decay >= 0.")
        if not isinstance(self.scaler, GradScaler | None):
            raise OptionError(
                f"SRSTE(scaler={self.scaler!r:.80}): expected the torch.amp.GradScaler of the "
                "training loop, or None."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> SRSTE:
        return self  # it is frozen, and a copy of the scaler would never be updated

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"scaler": None}

    def masked(self, weight: Tensor, mask: Tensor) -> Tensor:
        """B * W; the gradient passes straight through, plus decay on removed weights."""
        if self.decay and self.scaler is None and weight.requires_grad and _in_float16(weight):
            _warn_of_unscaled_decay()
        decay = self._scaled_decay(weight.device)
        masked: Tensor = StraightThroughDecay.apply(weight, mask, decay)
        return masked

    def product(self) -> Product | None:
        """B * W with that gradient, unless a scaler's tensor is part of it."""
        return Product(self.decay) if self.scaler is None else None

    def _scaled_decay(self, device: torch.device) -> float | Tensor:
        """The decay times the scale of the loss, read as a tensor: no waiting for the device.

        `GradScaler.scale` does the same in eager mode, but the compiler refuses to follow it.
        """
        if self.scaler is None or not self.scaler._enabled:
            return self.decay
        scale = self.scaler._scale
        if scale is None:  # it is made with the first loss
            return self.decay * self.scaler._init_scale
        return self.decay * scale.to(device, non_blocking=True)


def _in_float16(weight: Tensor) -> bool:
    """Whether float16 autocast is on, for training, where `weight` is."""
    device = weight.device.type
    if not (torch.is_grad_enabled() and torch.is_autocast_enabled(device)):
        return False
    return torch.get_autocast_dtype(device) is torch.float16


def _warn_of_unscaled_decay() -> None:
    """Warn, once a process. Under torch.compile this runs when the model is compiled."""
    if not _warned:
        warnings.warn(
            "SRSTE(scaler=None): training under float16 autocast. A GradScaler would divide the "
            "decay of removed weights by its scale, to nothing: expected "
            "SRSTE(decay, scaler=your_grad_scaler). bfloat16 needs no scaler.",
            stacklevel=2,
        )
        _warned.append(True)


_warned: list[bool] = []
# What torch.compiler.assume_constant_result does, which imports the compiler at once.
_warn_of_unscaled_decay._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ASP(MaskMethod):
    """ASP (NVIDIA, 2020): magnitude masks taken once from pre-trained weights, then fine-tuning.

    Removed weights receive no gradient. The masks are those of the weights at the first training
    step, and until then of those `prepare` is given: load the pre-trained weights first.

    Attributes:
        permute: Search for the order of input channels that keeps the most magnitude under the
            masks (Pool & Yu, NeurIPS 2021) before taking them. The network computes what it did,
            and parameters keep their names and shapes, but not the order of their channels: a
            checkpoint of the dense model no longer belongs in the result.
    """

    permute: ChannelPermutation | None = None
    schedule: ClassVar[Schedule] = Freeze(at=0)
    spre_gamma: ClassVar[float] = 0.0
    kept_gradient: ClassVar[bool] = True

    @property
    def permutation(self) -> ChannelPermutation | None:
        """The search, if one is wanted."""
        return self.permute

    def masked(self, weight: Tensor, mask: Tensor) -> Tensor:
        """B * W, with the ordinary gradient B * g."""
        return masked_weight(weight, mask)

    def product(self) -> Product:
        """The same."""
        return Product()
