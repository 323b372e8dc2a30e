"""How operators written in Python are made known to torch.

`torch.library.custom_op` does the same with more of its own Python around each call. A training
step calls hundreds of these, each when the caches hold the data of a conv, so that all Python costs
several times what it does in a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_LIBRARY = torch.library.Library("spre_fx", "FRAGMENT")

Operator = Callable[..., Any]


def operator(
    name: str,
    *,
    fake: Callable[..., Any],
    schema: str | None = None,
    changes: Sequence[str] = (),
) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator: make a function the operator `torch.ops.spre_fx.<name>` of all devices.

    The function returns none of its arguments and no view of one.

    Args:
        name: Of the operator.
        fake: Makes empty results of the shapes, types and memory formats of the function's.
        schema: `(arguments) -> results`, if not what the function's annotations say.
        changes: The arguments that it changes.
    """

    def register(function: Callable[..., Any]) -> Operator:
        inferred = schema or torch.library.infer_schema(function, mutates_args=changes)
        _LIBRARY.define(name + inferred, tags=torch.Tag.pt2_compliant_tag)
        # In a frame that torch.compile left to Python it is not to be compiled on its own.
        hidden = torch._disable_dynamo(function)  # type: ignore[attr-defined]
        _LIBRARY.impl(name, hidden, "CompositeExplicitAutograd")
        torch.library.register_fake(f"spre_fx::{name}", fake, lib=_LIBRARY)
        found: Operator = getattr(torch.ops.spre_fx, name).default
        return found

    return register


def register_product(name: str) -> None:
    """Give an operator that multiplies two tensors its gradient in the first, none in the other.

    That of f(x, m) = x * m, where f lays m out as x, is f(gradient, m).
    """
    product: Operator = getattr(torch.ops.spre_fx, name).default

    def keep(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:  # noqa: ARG001
        ctx.save_for_backward(inputs[1])

    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return product(gradient, *ctx.saved_tensors), None

    register_gradient(name, backward, keep)


def register_gradient(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Give an operator a gradient, as `torch.library.register_autograd` does."""
    torch.library.register_autograd(
        f"spre_fx::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )
