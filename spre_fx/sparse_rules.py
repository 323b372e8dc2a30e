"""What TensorRT and OpenVINO ask of a layer before they consider a sparse kernel for it.

TensorRT: in the weight [K, C, R, S] of a convolution or fully connected layer, C a multiple of 4,
and at least two zeros in every four input channels, for each output channel and spatial position;
FP16 or INT8 ("Sparsity" in NVIDIA's TensorRT Developer Guide, with kSPARSE_WEIGHTS). Since TensorRT
11 types are those of the network, so the file itself has to be FP16 or INT8. Then it times sparse
against dense kernels and takes the faster; by NVIDIA's experience a sparse one wins from about 256
channels on, where a 3 x 3 kernel counts as nine times the input channels (NVIDIA/TensorRT#3849,
#4065).

OpenVINO, on CPUs: matrix multiplications only, when CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE is set
below 1 and at most the fraction of zeros; the source of its fully connected node
(src/plugins/intel_cpu) also asks for AMX, a constant INT8 weight with both sizes multiples of 64,
and 8-bit activations. A conv runs dense there, whatever its zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from tabulate import tabulate

_PAYS_FROM = 256
_OPENVINO_MULTIPLE = 64
_CONV = ("Conv",)
_MATMUL = ("Gemm", "MatMul")


@dataclass(frozen=True, eq=False)
class WeightedNode:
    """A node of an ONNX graph that has a weight.

    Attributes:
        name: Its name.
        op: "Conv", "Gemm", "MatMul" or another operator.
        weight: `(C_out, C_in/groups, *kernel)`, zero where the weight is; None for no constant.
        dtype: The type it is computed in, such as "float16"; "int8" for a quantised weight.
    """

    name: str
    op: str
    weight: np.ndarray | None
    dtype: str


@dataclass(frozen=True)
class Verdict:
    """What becomes of a node.

    Attributes:
        name: The node.
        op: Its operator.
        shape: Of the weight, `(C_out, C_in/groups, *kernel)`; () if it is no constant.
        dtype: Its type.
        zeros: Fraction of zeros.
        tensorrt: The first of TensorRT's rules that it breaks, in words; None if it breaks none.
        in_half: Whether it would break none of them in float16.
        pays: Whether it is of a size for which a sparse kernel tends to win there.
        openvino: The first of OpenVINO's rules that it breaks; None if it breaks none.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    zeros: float
    tensorrt: str | None
    in_half: bool
    pays: bool
    openvino: str | None


def judge(node: WeightedNode) -> Verdict:
    """Apply the rules to one node."""
    weight = node.weight
    shape = () if weight is None else weight.shape
    return Verdict(
        name=node.name,
        op=node.op,
        shape=tuple(shape),
        dtype=node.dtype,
        zeros=0.0 if weight is None else float((weight == 0).mean()),
        tensorrt=_tensorrt(node, node.dtype),
        in_half=_tensorrt(node, "float16") is None,
        pays=bool(shape) and min(shape[0], prod(shape[1:])) >= _PAYS_FROM,
        openvino=_openvino(node),
    )


def _tensorrt(node: WeightedNode, dtype: str) -> str | None:
    if node.op not in _CONV + _MATMUL:
        return f"{node.op} is neither conv nor fully connected"
    if node.weight is None:
        return "its weight is no constant"
    channels = node.weight.shape[1]
    if channels % 4:
        return f"C={channels} is no multiple of 4"
    fullest = int(np.count_nonzero(_groups_of_four(node.weight), axis=2).max())
    if fullest > 2:
        return f"{fullest} non-zeros in 4 channels"
    if dtype not in ("float16", "int8"):
        return f"{dtype}, not float16 or int8"
    return None


def _groups_of_four(weight: np.ndarray) -> np.ndarray:
    return weight.reshape(weight.shape[0], weight.shape[1] // 4, 4, -1)


def _openvino(node: WeightedNode) -> str | None:
    if node.op not in _MATMUL:
        return f"{node.op} is no matrix multiplication"
    if node.weight is None:
        return "its weight is no constant"
    odd = [size for size in node.weight.shape if size % _OPENVINO_MULTIPLE]
    if odd:
        return f"{odd[0]} is no multiple of {_OPENVINO_MULTIPLE}"
    return None if node.dtype == "int8" else f"{node.dtype} is not int8"


def verdict_table(verdicts: list[Verdict]) -> str:
    """The verdicts as a plain text table, one row a node."""
    headers = ("node", "op", "weight", "type", "zeros", "TensorRT", "OpenVINO")
    rows = [
        (
            verdict.name,
            verdict.op,
            "x".join(map(str, verdict.shape)),
            verdict.dtype,
            f"{verdict.zeros:.1%}",
            _said(verdict.tensorrt, "sparse" if verdict.pays else "sparse, but small"),
            _said(verdict.openvino, "sparse"),
        )
        for verdict in verdicts
    ]
    return tabulate(rows, headers, disable_numparse=True)


def _said(reason: str | None, otherwise: str) -> str:
    return otherwise if reason is None else f"no: {reason}"
