"""The modules a training graph is made of.

Each owns the weight it masks and makes the mask while it runs, so that sharded weights (FSDP2) are
whole at that moment. The masks leave as values of the graph, where the SpRe branch takes them up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from spre_fx import masks
from spre_fx.errors import ModelError
from spre_fx.masked_conv import SparseCompute, masked_conv2d
from spre_fx.masked_weight import Product
from spre_fx.methods import MaskMethod
from spre_fx.operators import operator
from spre_fx.patterns import Pattern
from spre_fx.scheduled_mask import ScheduledMask
from spre_fx.schedules import Schedule
from spre_fx.subclasses import plain_base


class MaskSchedule(nn.Module):
    """Counts training forwards and says, once per forward, whether masks are recomputed in it.

    The count is kept twice. DDP makes `step` that of rank 0, where a checkpoint may have been
    loaded; it leaves `own_step` and the masks alone. If the two differ, so do the masks: there was
    a load, or a training forward, that other ranks did not have.

    Under activation checkpointing the forward that is run again in the backward pass is the last
    one, so each forward must be followed by its backward; a compiled model inside an eager
    checkpoint counts both runs.

    Args:
        schedule: When to recompute.
        method: The mask method, which may tell its masks more than that.

    Attributes:
        step: Training forwards so far.
        due: What it said last, for layers that no edge of a graph leads to; None if there are none.

    Raises:
        ModelError: In training, if the masks of this rank are not those of `step`. Compiled it is a
            RuntimeError with the same words, on CUDA an assertion of the device.
    """

    per_rank: ClassVar[tuple[str, ...]] = ("own_step",)
    step: Tensor
    due: Tensor | None
    own_step: Tensor

    def __init__(self, schedule: Schedule, method: MaskMethod) -> None:
        super().__init__()
        self.schedule = schedule
        self.method = method
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("due", None, persistent=False)
        self.register_buffer("own_step", torch.zeros((), dtype=torch.int64))

    def remember(self) -> MaskSchedule:
        """Keep what is said in each forward in `due`."""
        self.due = self.method.signal(self.schedule, self.step)
        return self

    def tick(self, *_: Any) -> None:
        """A forward begins. The pre-hook of a model that has no graph in which to call this."""
        self()

    def forward(self) -> Tensor:
        """A tensor of shape (): whether this is an update step. Never in evaluation."""
        update: Tensor = _signal_of_step(self._signal())
        if self.due is not None:
            self.due.copy_(update)
        return update

    def _signal(self) -> Tensor:
        if not self.training:
            return self.step < 0
        if inside_backward():  # activation checkpointing runs this step's forward once more
            return self.method.signal(self.schedule, self.step - 1)
        self._check_rank()
        update = self.method.signal(self.schedule, self.step)
        self._count()
        return update

    def _count(self) -> None:
        self.step.add_(1)
        self.own_step.add_(1)

    def _check_rank(self) -> None:
        same = self.step == self.own_step
        device = same.device.type
        if device == "cuda" or (device == "cpu" and torch.compiler.is_compiling()):
            torch._assert_async(same, _STRAY_RANK)  # no waiting for the device
        elif not torch.compiler.is_compiling() and not same:
            found = f"found step {int(self.step)} and masks of step {int(self.own_step)}"
            raise ModelError(f"{_STRAY_RANK} ({found})")

    def extra_repr(self) -> str:
        """The schedule."""
        return repr(self.schedule)


_STRAY_RANK = (  # at most 254 characters, for an assertion on CUDA
    "mask_schedule: expected masks of the same step on every rank, found others than those of rank "
    "0. Load the checkpoint on every rank before DistributedDataParallel, which broadcasts no "
    "masks, and run no training forward on one rank alone"
)


@operator("signal_of_step", fake=torch.empty_like)
def _signal_of_step(update: Tensor) -> Tensor:
    """The same. Compilers would work out the schedule again for each weight if they saw it."""
    return update.clone()


def inside_backward() -> bool:
    """Whether autograd is at work: a forward within it is that of activation checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class NMLayer(nn.Module):
    """Mixin of a conv or linear whose weight is N:M sparse: y = layer(x; B * W).

    Its parameters keep the names they had, so a dense checkpoint loads into it. A checkpoint of
    another pattern or another method does not, strict or not: a `state_dict` says what it is of in
    its metadata, which torch.save keeps. Formats that keep tensors only (safetensors), and new
    dicts made of its items, cannot be checked. Options of a method, such as decay, may differ.
    """

    weight: Tensor
    pattern: Pattern
    method: MaskMethod
    nm_mask: nn.Module
    live_taps: nn.Module | None
    dense_gradient: nn.Module | None
    sparse: SparseCompute | None = None  # how a conv leaves out what its mask does
    clock: tuple[MaskSchedule] | None = None  # in a tuple, for it is no submodule of the layer

    def signal(self, update: Tensor | None) -> Tensor | None:
        """What the masks are told: what comes along the edge of the graph, or by the clock."""
        return update if self.clock is None else self.clock[0].due

    def masked_weight(self, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """B * W with the gradient of the mask method, and B."""
        mask: Tensor = self.nm_mask(self.weight, update)
        return self._masked(mask), mask

    def _masked(self, mask: Tensor) -> Tensor:
        weight = self.method.masked(self.weight, mask)
        return weight if self.dense_gradient is None else self.dense_gradient(weight)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {})
        metadata.setdefault(prefix[:-1], {})["spre_fx"] = self._identity()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *others: Any,
    ) -> None:
        own = self._identity()
        found = local_metadata.get("spre_fx", own)
        wrong = {key: value for key, value in own.items() if found.get(key) != value}
        if not wrong:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)
            return
        *_, errors = others
        message = (
            f"expected a checkpoint of {_words(wrong)}, found one of "
            f"{_words({key: found.get(key) for key in wrong})}. Prepare the model as the one that "
            "was saved."
        )
        if not any(message in error for error in errors):  # once for all layers
            errors.append(f"{prefix[:-1]}: {message}")

    def _identity(self) -> dict[str, str]:
        return {"pattern": str(self.pattern), "method": type(self.method).__name__}

    def extra_repr(self) -> str:
        """The layer's own, the pattern and the method."""
        return f"{super().extra_repr()}, pattern={self.pattern}, method={self.method}"


def _words(identity: dict[str, str]) -> str:
    return " and ".join(f"{key} {value}" for key, value in identity.items())


class _ConvForward:
    """A conv whose weight is masked: what the mixins below share.

    Attributes:
        sparse: How it leaves out what its mask does; None: it computes as a dense conv.
    """

    sparse: SparseCompute | None = None
    weight: Tensor
    bias: Tensor | None

    if TYPE_CHECKING:

        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

        def _masked(self, mask: Tensor) -> Tensor:
            """B * W, with the gradient that W is given."""

    def _masked_forward(self, input: Tensor, mask: Tensor, product: Product | None) -> Tensor:
        """conv(input; B * W).

        Args:
            input: Of the conv.
            mask: B.
            product: B * W with its gradient, if that is one which the conv can make itself.
        """
        if self.sparse is not None:
            most_kept = self.sparse.most_kept(input, self.weight)
            if most_kept is not None:
                weight = self._masked(mask) if product is None else self.weight
                return masked_conv2d(
                    *(input, weight, mask.detach(), self.bias),
                    geometry=self.sparse.geometry,
                    most_kept=most_kept,
                    product=product,
                )
        return self._conv_forward(input, self._masked(mask), self.bias)


class _NMConv(NMLayer, _ConvForward):
    def forward(self, input: Tensor, update: Tensor | None = None) -> Any:
        """`y`, or `(y, B, live taps)` where a SpRe branch takes the masks up."""
        update = self.signal(update)
        mask = self.nm_mask(self.weight, update)
        # Before the conv, while the weight that the mask was made of is in the cache.
        taps = None if self.live_taps is None else self.live_taps(self.weight, update)
        product = self.method.product() if self.dense_gradient is None else None
        y = self._masked_forward(input, mask, product)
        return y if self.live_taps is None else (y, mask, taps)

    def extra_repr(self) -> str:
        """That of an N:M layer, and whether it may compute with its kept weights alone."""
        return super().extra_repr() + (", compute=sparse" if self.sparse is not None else "")


class NMConv1d(_NMConv, nn.Conv1d):
    """N:M sparse `nn.Conv1d`."""


class NMConv2d(_NMConv, nn.Conv2d):
    """N:M sparse `nn.Conv2d`."""


class NMConv3d(_NMConv, nn.Conv3d):
    """N:M sparse `nn.Conv3d`."""


class NMLinear(NMLayer, nn.Linear):
    """N:M sparse `nn.Linear`."""

    def forward(self, input: Tensor, update: Tensor | None = None) -> Tensor:
        """Y = x (B * W)^T + b."""
        weight, _ = self.masked_weight(self.signal(update))
        return nn.functional.linear(input, weight, self.bias)


class SpReConv(nn.Module, _ConvForward):
    """Mixin of the SpRe branch's conv: y = conv(x; B^S * W^S), the second term of Eq. 9.

    W^S takes the ordinary gradient, none outside the mask, unless it is passed straight through.
    """

    weight: Tensor
    straight_through: bool = False

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Without a mask (before the masks are wired) the branch is dense."""
        if mask is None:
            return self._conv_forward(input, self.weight, self.bias)
        # A mask of numbers such as LBC's is given a gradient too.
        product = self._product if mask.dtype == torch.bool else None
        return self._masked_forward(input, mask, product)

    @property
    def _product(self) -> Product:
        return Product(decay=0.0 if self.straight_through else None)

    def _masked(self, mask: Tensor) -> Tensor:
        return self._product.of(self.weight, mask)


class SpReConv1d(SpReConv, nn.Conv1d):
    """SpRe branch of a `nn.Conv1d`."""


class SpReConv2d(SpReConv, nn.Conv2d):
    """SpRe branch of a `nn.Conv2d`."""


class SpReConv3d(SpReConv, nn.Conv3d):
    """SpRe branch of a `nn.Conv3d`."""


class TrainingFlag(nn.Module):
    """The `self.training` of the traced model, as a value of the graph."""

    def forward(self) -> bool:
        """Whether the graph is in training mode."""
        return self.training


class TrainingSwitch(nn.Module):
    """The output of a model that returns something else in training than in evaluation."""

    def forward(self, training: Any, evaluation: Any) -> Any:
        """The first in training mode, the second in evaluation."""
        return training if self.training else evaluation


_NM_TYPES: dict[type[nn.Module], type[NMLayer]] = {
    nn.Conv1d: NMConv1d,
    nn.Conv2d: NMConv2d,
    nn.Conv3d: NMConv3d,
    nn.Linear: NMLinear,
}
_SPRE_TYPES: dict[type[nn.Module], type[SpReConv]] = {
    nn.Conv1d: SpReConv1d,
    nn.Conv2d: SpReConv2d,
    nn.Conv3d: SpReConv3d,
}
SPARSIFIABLE = tuple(_NM_TYPES)

Layer: TypeAlias = _ConvNd | nn.Linear


def make_nm(layer: Layer, pattern: Pattern, method: MaskMethod, *, keep_masks: bool) -> NMLayer:
    """Turn a conv or linear into its N:M kind, in place: the very module, parameters and hooks.

    Args:
        layer: An `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` or `nn.Linear`, or of a subclass that
            computes the same; it is of our own class from now on.
        pattern: The N:M pattern.
        method: The mask method.
        keep_masks: Whether the mask outlives a step; if so it is taken from the weights now.
    """
    plain = plain_base(layer, SPARSIFIABLE, state=True)
    assert plain is not None
    layer.__class__ = _NM_TYPES[plain]  # type: ignore[assignment]  # it is a subclass
    sparse: Any = layer
    sparse.pattern = pattern
    sparse.method = method
    mask = method.mask_module(layer.weight.detach(), pattern, keep=keep_masks)
    sparse.nm_mask = mask.train(layer.training)
    sparse.live_taps = None
    sparse.dense_gradient = None  # of the unstructured methods: takes note of dL/d(B * W)
    nm_layer: NMLayer = sparse
    return nm_layer


def emit_masks(layer: NMLayer) -> None:
    """Make a conv return `(y, B, live taps)` instead of `y`, in place."""
    taps = ScheduledMask(masks.live_taps, layer.pattern).train(layer.training)
    if isinstance(layer.nm_mask, ScheduledMask) and layer.nm_mask.mask is not None:
        taps.keep(layer.weight)
    layer.live_taps = taps


def new_spre_conv(conv: _ConvNd) -> SpReConv:
    """A conv configured as `conv`, with fresh weights from its class's own initialiser."""
    plain = next(kind for kind in _SPRE_TYPES if isinstance(conv, kind))
    spre = _SPRE_TYPES[plain](**_options(conv))
    spre.weight.data = laid_out_as(conv.weight, spre.weight.detach())
    return spre.train(conv.training).requires_grad_(conv.weight.requires_grad)


def new_plain(layer: Layer | SpReConv, weight: Tensor, bias: Tensor | None) -> Layer:
    """The ordinary torch layer configured as `layer`, holding `weight` and `bias`."""
    plain: Any = next(kind for kind in SPARSIFIABLE if isinstance(layer, kind))
    new: Layer = nn.utils.skip_init(plain, **_options(layer) | {"bias": bias is not None})
    trainable = layer.weight.requires_grad
    new.weight = nn.Parameter(laid_out_as(layer.weight, weight), requires_grad=trainable)
    new.bias = None if bias is None else nn.Parameter(bias, requires_grad=trainable)
    return new.train(layer.training)


def laid_out_as(model: Tensor, values: Tensor) -> Tensor:
    """The values in the memory format (channels_last, or not) of a tensor of their shape."""
    if values.stride() == model.stride():
        return values
    return torch.empty_like(model, dtype=values.dtype, requires_grad=False).copy_(values)


_LINEAR_OPTIONS = ("in_features", "out_features")
_CONV_OPTIONS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)


def _options(layer: nn.Module) -> dict[str, Any]:
    names = _LINEAR_OPTIONS if isinstance(layer, nn.Linear) else _CONV_OPTIONS
    weight = layer.weight
    assert isinstance(weight, Tensor)
    tensors = {"bias": layer.bias is not None, "device": weight.device, "dtype": weight.dtype}
    return {name: getattr(layer, name) for name in names} | tensors
