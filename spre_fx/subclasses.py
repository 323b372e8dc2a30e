"""Whether a subclass of a torch layer computes what its base does, and who listens to a module."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

_RUN = ("forward", "_conv_forward", "__call__", "_call_impl")
_KEPT = ("_apply", "train", "_save_to_state_dict", "_load_from_state_dict")


def own_method(module: nn.Module, base: type[nn.Module], *, state: bool = False) -> str | None:
    """The first method with which `module` computes something else than `base` may; None if none.

    Args:
        module: An instance of `base` or of a subclass.
        base: A class of torch.
        state: Whether methods that keep its state count as well, for a module that becomes `base`.
    """
    for name in _RUN + (_KEPT if state else ()):
        ours, theirs = getattr(type(module), name, None), getattr(base, name, None)
        if name in vars(module) or ours is not theirs:
            return name
    return None


def plain_base(
    module: nn.Module, bases: Sequence[type[nn.Module]], *, state: bool = False
) -> type[nn.Module] | None:
    """The one of `bases` that computes what `module` does, None if there is none."""
    base = next((each for each in bases if isinstance(module, each)), None)
    return None if base is None or own_method(module, base, state=state) else base


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_OPTIONS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)


def has_hooks(module: nn.Module) -> bool:
    """Whether something of the user's runs whenever `module` does, forward or backward."""
    return any(getattr(module, name) for name in _HOOKS)


def carry_hooks(source: nn.Module, target: nn.Module) -> None:
    """Have the hooks that run when `source` is called run for `target` too."""
    for name in _HOOKS + _HOOK_OPTIONS:
        setattr(target, name, copy.copy(getattr(source, name)))
