"""`spre_fx::semi_structured_linear`: y = x W^T + b with a 2:4 W, by cuSPARSELt or by CUTLASS.

These are the operators behind `torch.sparse`'s semi-structured tensors, called on plain tensors:
those are a prototype that warns, and cannot be kept in a `state_dict`. One operator of our own
around them, opaque to `torch.compile`, pads sizes and fixes strides: both libraries want `x^T` as a
transposed view of a contiguous x, and the strides a compiler chooses are its own.

Bias is added by the libraries' epilogues. An activation is not: `torch._cslt_sparse_mm` takes none,
and the one operator that does (`_sparse_semi_structured_linear`) is deprecated by torch. Under
`torch.compile` what follows is fused into one kernel of its own.

On the CPU the operator multiplies with the decompressed matrix, as a reference.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from spre_fx.errors import ModelError
from spre_fx.semi_structured import SHAPE_RULES, TwoFour, decompress

Algorithm = tuple[int, int, int]
"""Of cuSPARSELt: its number, in how many parts it splits the columns, and how these are added."""

DEFAULT_ALGORITHM: Algorithm = (0, 1, -1)

_SEARCHED: dict[Hashable, Algorithm] = {}

_NEEDS = {
    "cusparselt": ("_cslt_compress", "_cslt_sparse_mm"),
    "cutlass": ("_sparse_semi_structured_mm", "_sparse_semi_structured_addmm"),
}


def why_not(library: str, capability: tuple[int, int]) -> str | None:
    """Why a library cannot run on a device here, or None.

    Args:
        library: "cusparselt" or "cutlass".
        capability: The device's compute capability, such as (9, 0).
    """
    version = ".".join(map(str, capability))
    if torch.version.hip is not None:
        return f"{library} is used on NVIDIA devices only, found a ROCm build of torch"
    if capability < (8, 0):
        return f"sparse tensor cores came with compute capability 8.0, found {version}"
    missing = [name for name in _NEEDS[library] if not hasattr(torch, name)]
    if missing:
        return f"{library} needs torch.{missing[0]}, which torch {torch.__version__} lacks"
    if library == "cutlass" and capability[0] != 8:  # the operator checks, as of torch 2.15
        return f"torch's CUTLASS operator is for compute capability 8.x only, found {version}"
    return _why_no_cusparselt() if library == "cusparselt" else None


def compress_for_cusparselt(two_four: TwoFour) -> Tensor:
    """The opaque tensor that cuSPARSELt multiplies with, which only this kind of device can read.

    Args:
        two_four: On a CUDA device, of `padded_shape`.
    """
    compressed: Tensor = torch._cslt_compress(decompress(two_four))
    return compressed


def search_algorithm(x: Tensor, compressed: Tensor, bias: Tensor | None) -> Algorithm:
    """The algorithm cuSPARSELt finds fastest for these sizes, searched for once in a process.

    A search waits for the device, and takes many times as long as the product.

    Args:
        x: `(rows, columns)`.
        compressed: Of `compress_for_cusparselt`.
        bias: As long as the matrix has rows, or None.
    """
    key = (x.device, x.dtype, x.shape, compressed.shape, bias is not None)
    if key not in _SEARCHED:
        search = torch._C._cusparselt.mm_search  # type: ignore[attr-defined] # not in the stubs
        number, parts, mode, _ = search(compressed, x.t(), bias, None, None, True)
        _SEARCHED[key] = (number, parts, mode)
    return _SEARCHED[key]


def pad_dense(x: Tensor, columns: int) -> Tensor:
    """The dense operand, contiguous, with zeros added up to sizes that the libraries take.

    Args:
        x: `(rows, fewer or equal columns)`.
        columns: Of the sparse matrix.
    """
    rows, multiple = x.shape[0], SHAPE_RULES["cusparselt"][torch.float16].dense  # the same for all
    missing = (columns - x.shape[1], -rows % multiple)
    return F.pad(x, (0, missing[0], 0, missing[1])) if any(missing) else x.contiguous()


@torch.library.custom_op("spre_fx::semi_structured_linear", mutates_args=(), device_types="cuda")
def semi_structured_linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    compressed: Tensor | None,
    bias: Tensor | None,
    *,
    out_features: int,
    algorithm: Sequence[int],
) -> Tensor:
    """`x W^T + b`, contiguous.

    Args:
        x: `(rows, columns)`; fewer columns than W are as if padded with zeros.
        values: Of the `TwoFour` of W, which is `(padded out_features, padded columns)`.
        metadata: Likewise.
        compressed: W for cuSPARSELt; None to multiply by CUTLASS.
        bias: `(padded out_features,)` or None.
        out_features: Columns of the result.
        algorithm: Of cuSPARSELt.
    """
    rows = x.shape[0]
    if rows == 0:
        return x.new_empty(0, out_features)
    transposed = pad_dense(x, 2 * values.shape[1]).t()
    if compressed is not None:
        number, parts, mode = algorithm
        y = torch._cslt_sparse_mm(
            compressed,
            transposed,
            bias=bias,
            transpose_result=True,
            alg_id=number,
            split_k=parts,
            split_k_mode=mode,
        )
    elif bias is not None:
        y = torch._sparse_semi_structured_addmm(bias, values, metadata, transposed).t()
    else:
        y = torch._sparse_semi_structured_mm(values, metadata, transposed).t()
    return y[:rows, :out_features].contiguous()


@semi_structured_linear.register_kernel("cpu")
def _reference(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    compressed: Tensor | None,  # noqa: ARG001
    bias: Tensor | None,
    *,
    out_features: int,
    algorithm: Sequence[int],  # noqa: ARG001
) -> Tensor:
    weight = decompress(TwoFour(values, metadata))[:out_features, : x.shape[1]]
    return F.linear(x, weight, None if bias is None else bias[:out_features])


@semi_structured_linear.register_fake
def _fake(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,  # noqa: ARG001
    compressed: Tensor | None,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    *,
    out_features: int,
    algorithm: Sequence[int],  # noqa: ARG001
) -> Tensor:
    if x.ndim != 2 or x.shape[1] > 2 * values.shape[1] or x.dtype != values.dtype:
        raise ModelError(
            f"expected (rows, at most {2 * values.shape[1]}) inputs of {values.dtype}, found "
            f"{x.dtype} of shape {tuple(x.shape)}."
        )
    return x.new_empty(x.shape[0], out_features)


def _why_no_cusparselt() -> str | None:
    if not torch.backends.cusparselt.is_available():
        return f"torch {torch.__version__} was built without cuSPARSELt"
    arguments = torch.ops.aten._cslt_sparse_mm.default._schema.arguments
    if "split_k_mode" not in {argument.name for argument in arguments}:
        return f"cusparselt needs torch 2.11 or later, found {torch.__version__}"
    return None
