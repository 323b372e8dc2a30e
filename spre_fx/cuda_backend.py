"""The CUDA backend: 2:4 weights on sparse tensor cores, by cuSPARSELt or CUTLASS.

It offers ways to run a layer, and does not say that they are faster: on which GPU, layer and batch
they are is for measurements to say, and none have been made yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spre_fx.backends import Lowered, dense
from spre_fx.cuda_layers import (
    CONV_METHODS,
    SemiStructuredConv2d,
    SemiStructuredLinear,
    why_no_gemm,
)
from spre_fx.patterns import Pattern
from spre_fx.semi_structured import SHAPE_RULES, filter_matrix, is_two_four, padded_shape
from spre_fx.semi_structured_ops import why_not


@dataclass(frozen=True)
class CUDABackend:
    """Takes Linear, and Conv2d without groups, in float16 and bfloat16."""

    name: str = "cuda"

    @property
    def machine(self) -> str:
        """The current GPU and the versions of the libraries."""
        version = torch.backends.cusparselt.version()
        cudnn = torch.backends.cudnn.version()
        name = torch.cuda.get_device_name()
        return f"{name}, CUDA {torch.version.cuda}, cuDNN {cudnn}, cuSPARSELt {version}"

    def candidates(self, layer: nn.Module, pattern: Pattern) -> list[Lowered] | str:
        """One way for each library that runs here, and of a conv for each of its methods."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if not weight.is_cuda:
            return f"expected its weight on a CUDA device, found it on {weight.device}"
        capability = torch.cuda.get_device_capability(weight.device)
        found = libraries(layer, pattern, capability)
        if isinstance(found, str):
            return found
        return [way for library in found for way in ways(layer, library)]

    def rule(
        self,
        layer: nn.Module,
        pattern: Pattern,  # noqa: ARG002
        candidates: Sequence[Lowered],
        input_shape: tuple[int, ...] | None,  # noqa: ARG002
    ) -> Lowered:
        """Dense: unlike a measurement, no rule can promise that a sparse way is not slower."""
        kinds = " or ".join(dict.fromkeys(way.kind for way in candidates))
        return dense(
            layer, f"dense: whether {kinds} is faster is only measured, with example_inputs"
        )


def libraries(
    layer: nn.Module, pattern: Pattern, capability: tuple[int, int]
) -> tuple[str, ...] | str:
    """The libraries that can run a layer on a device, or why none can. Looks at no device.

    Args:
        layer: A conv or linear.
        pattern: Its N:M pattern.
        capability: Of the device, such as (9, 0).
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if not isinstance(layer, nn.Linear) and (reason := why_no_gemm(layer)) is not None:
        return reason
    if weight.dtype == torch.float32:
        return (
            "sparse tensor cores take float16 and bfloat16, found torch.float32: pass "
            "dtype=torch.float16 or torch.bfloat16"
        )
    matrix = filter_matrix(weight)
    if not is_two_four(matrix):
        return f"{pattern} is not 2:4: more than two of four consecutive channels are not zero"
    refusals = {}
    for library in SHAPE_RULES:
        shape = padded_shape(library, weight.dtype, (matrix.shape[0], matrix.shape[1]))
        reason = shape if isinstance(shape, str) else why_not(library, capability)
        if reason is not None:
            refusals[library] = reason
    usable = tuple(library for library in SHAPE_RULES if library not in refusals)
    return usable or "; ".join(dict.fromkeys(refusals.values()))


def ways(layer: nn.Module, library: str) -> list[Lowered]:
    """A layer by a library: a linear in one way, a conv in those of `CONV_METHODS`."""
    why = f"2:4 by {library}"
    if isinstance(layer, nn.Linear):
        return [Lowered(SemiStructuredLinear.from_dense(layer, library), library, why)]
    assert isinstance(layer, nn.Conv2d)
    return [
        Lowered(
            SemiStructuredConv2d.from_dense(layer, library, method),
            library,
            f"{why} on its {method}",
        )
        for method in CONV_METHODS
    ]
