"""`export_onnx` and `check_onnx`: a deployed model for ONNX Runtime, TensorRT and OpenVINO."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spre_fx.atomic_write import write_atomically
from spre_fx.checks import is_prepared
from spre_fx.dense_form import dense_view
from spre_fx.errors import FileError, ModelError, OptionError, VerificationError
from spre_fx.sparse_rules import Verdict, WeightedNode, judge, verdict_table

_OLDEST_OPSET = 18
_LARGEST = 2**31 - 1  # bytes of a protobuf
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BATCHES = (1, 8, 32)


@dataclass(frozen=True)
class OnnxReport:
    """What is in an ONNX file, and what TensorRT and OpenVINO will make of it. Print it.

    Attributes:
        path: The file.
        opset: The version of the operator set.
        operators: How many nodes there are of each operator.
        verdicts: Every node with a weight, in their order.
        trtexec: The command that builds and times a TensorRT engine.
        difference: Largest difference to the model over its largest output, as ONNX Runtime
            computes it; None if it was not checked.
    """

    path: Path
    opset: int
    operators: Mapping[str, int]
    verdicts: tuple[Verdict, ...]
    trtexec: str
    difference: float | None = None

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """A plain text table, and the command to run."""
        taken = sum(verdict.tensorrt is None for verdict in self.verdicts)
        in_half = sum(verdict.in_half for verdict in self.verdicts)
        summary = (
            f"{taken} of {len(self.verdicts)} nodes meet TensorRT's rules for a sparse kernel"
            f"{f', {in_half} would in float16' * (in_half > taken)}. It takes one where it is "
            "faster than the dense one; compare with --sparsity=disable:"
        )
        parts = [verdict_table(list(self.verdicts)), summary, self.trtexec]
        if in_half > taken:
            parts.append(
                "TensorRT 10 and older make float32 weights float16 with --fp16. Since 11 the file "
                "itself has to be float16: export spre_fx.to_dense(deployed).half()."
            )
        return "\n\n".join(parts)


def export_onnx(
    deployed: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Tensor | tuple[Any, ...],
    *,
    opset: int = _OLDEST_OPSET,
    dynamic_batch: bool = True,
) -> OnnxReport:
    """Write a deployed model as ONNX: ordinary convs that hold N:M zeros, and no masks.

    What torch's exporter makes is run by ONNX Runtime, where that is installed, and compared with
    the model before the file is written: to 1e-5 of the largest output in float32. The file is
    written whole or not at all.

    Args:
        deployed: What `finalize`, `adopt` or `load` returned, or any other model in evaluation.
        path: The file.
        example_inputs: What the model is called with, or a tuple of its positional arguments.
        opset: The version of ONNX's operator set, 18 or newer.
        dynamic_batch: Whether the first axis of every input may have any length.

    Returns:
        What TensorRT and OpenVINO will make of it, node by node: print it.

    Raises:
        OptionError: If the opset is too old, or a package is missing.
        ModelError: If the model is in training, or torch cannot export it.
        VerificationError: If ONNX Runtime computes something else. No file is written.
    """
    if opset < _OLDEST_OPSET:
        raise OptionError(f"opset={opset}: expected {_OLDEST_OPSET} or newer.")
    for package in ("onnx", "onnxscript"):
        _need(package)
    if is_prepared(deployed) or deployed.training:
        raise ModelError(
            "expected a deployed model in evaluation, found one in training. Export what finalize "
            "makes of it."
        )
    deployed = dense_view(deployed)
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if dynamic_batch:  # from one image torch concludes that there is always one
        inputs = tuple(_at_least_two(value) for value in inputs)
    proto = _export(deployed, inputs, opset, dynamic_batch=dynamic_batch)
    if proto.ByteSize() > _LARGEST:
        raise ModelError(
            f"expected a model of at most 2 GiB, which is what one ONNX file holds, found "
            f"{proto.ByteSize():,} bytes. Export it in half precision."
        )
    content = proto.SerializeToString()
    difference = _difference(deployed, content, inputs)
    write_atomically(path, content)
    return _report(proto, Path(path), difference)


def check_onnx(path: str | os.PathLike[str]) -> OnnxReport:
    """Say node by node whether TensorRT and OpenVINO will consider a sparse kernel, and why not.

    Args:
        path: Any ONNX file; float weights, or quantised ones behind DequantizeLinear.

    Raises:
        OptionError: If onnx is not installed.
        FileError: If there is no ONNX model there.
    """
    onnx = _need("onnx")
    try:
        proto = onnx.load(os.fspath(path))
        onnx.checker.check_model(proto)
    except Exception as error:  # protobuf, onnx and the operating system each raise their own
        raise FileError(
            f"{path}: expected an ONNX model, found: {type(error).__name__}: {error}"
        ) from error
    return _report(proto, Path(path), None)


def _need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise OptionError(
            f"expected {package}, found it missing. Run: pip install 'spre_fx[onnx]'"
        ) from error


def _at_least_two(value: Any) -> Any:
    one = isinstance(value, Tensor) and value.ndim > 0 and len(value) == 1
    return torch.cat([value, value]) if one else value


def _export(model: nn.Module, inputs: tuple[Any, ...], opset: int, *, dynamic_batch: bool) -> Any:
    batch = torch.export.Dim("batch")
    shapes = tuple(
        {0: batch} if isinstance(value, Tensor) and value.ndim else None for value in inputs
    )
    try:
        graph = torch.export.export(
            model, inputs, dynamic_shapes=shapes if dynamic_batch else None, strict=False
        )
        program = torch.onnx.export(graph, dynamo=True, opset_version=opset, verbose=False)
    except Exception as error:  # whatever torch's exporter and the model's own forward raise
        what = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        way_out = " If its forward fixes the batch, pass dynamic_batch=False." * dynamic_batch
        raise ModelError(
            f"{type(model).__name__}: expected a model that torch.export and torch.onnx can export "
            f"for the example inputs, found {what}{way_out}"
        ) from error
    assert program is not None
    return program.model_proto


@torch.no_grad()
def _difference(model: nn.Module, content: bytes, inputs: tuple[Any, ...]) -> float | None:
    """Largest difference over the largest output; None where ONNX Runtime is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    names = [given.name for given in session.get_inputs()]
    fed = {name: value.cpu().numpy() for name, value in zip(names, tensors, strict=True)}
    ours = [value for value in tree_leaves(model(*inputs)) if isinstance(value, Tensor)]
    largest = 0.0
    for output, found in zip(ours, session.run(None, fed), strict=True):
        expected = output.cpu().double().numpy()
        scale = max(float(np.abs(expected).max(initial=0)), np.finfo(np.float64).tiny)
        difference = float(np.abs(found.astype(np.float64) - expected).max(initial=0)) / scale
        tolerance = _TOLERANCE.get(output.dtype, 16 * torch.finfo(torch.float16).eps)
        if not difference <= tolerance:
            raise VerificationError(
                f"expected ONNX Runtime to agree with the model in {output.dtype} to "
                f"{tolerance:.0e} of the largest output, found {difference:.1e}. No file was "
                "written."
            )
        largest = max(largest, difference)
    return largest


def _report(proto: Any, path: Path, difference: float | None) -> OnnxReport:
    nodes = list(_weighted_nodes(proto.graph))
    typed = all(node.dtype in ("float16", "int8") for node in nodes if node.weight is not None)
    return OnnxReport(
        path=path,
        opset=next(each.version for each in proto.opset_import if not each.domain),
        operators=dict(Counter(node.op_type for node in proto.graph.node)),
        verdicts=tuple(judge(node) for node in nodes),
        trtexec=_trtexec(proto.graph, path, typed=typed),
        difference=difference,
    )


def _weighted_nodes(graph: Any) -> Iterator[WeightedNode]:
    constants = _Constants(graph)
    for node in graph.node:
        if node.op_type in _WEIGHTED:
            weight, dtype = constants.weight(node.input[1])
            if weight is not None:
                weight = _output_channels_first(node, weight)
            layer, _, leaf = node.input[1].rpartition(".")
            name = layer if leaf == "weight" else node.name or node.output[0]
            yield WeightedNode(name, node.op_type, weight, dtype)


def _output_channels_first(node: Any, weight: np.ndarray) -> np.ndarray | None:
    """`(C_out, C_in/groups, *kernel)`; None for a batch of matrices."""
    if node.op_type in ("Conv", "ConvTranspose"):
        return weight
    if weight.ndim != 2:
        return None
    transposed = any(each.name == "transB" and each.i for each in node.attribute)
    return weight if transposed else weight.T


class _Constants:
    """Weights of a graph by the name of the value, followed through what only re-labels them."""

    def __init__(self, graph: Any) -> None:
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output}

    def weight(self, name: str) -> tuple[np.ndarray | None, str]:
        """The values, zero where the weight is, and the type it is computed in."""
        if name in self.initializers:
            constant = self._values(name)
            return constant, str(constant.dtype)
        node = self.producers.get(name)
        if node is None or node.op_type not in ("DequantizeLinear", "Transpose"):
            return None, ""
        values, dtype = self.weight(node.input[0])
        if values is None or node.op_type == "DequantizeLinear":
            return self._dequantised(node, values), dtype
        axes = next((list(each.ints) for each in node.attribute if each.name == "perm"), None)
        return values.transpose(axes), dtype

    def _dequantised(self, node: Any, values: np.ndarray | None) -> np.ndarray | None:
        if values is None or len(node.input) < 3:
            return values
        if node.input[2] not in self.initializers:
            return None
        zero = self._values(node.input[2]).astype(np.int32)
        axis = next((each.i for each in node.attribute if each.name == "axis"), 1)
        if zero.ndim:
            zero = zero.reshape([-1 if a == axis else 1 for a in range(values.ndim)])
        return values.astype(np.int32) - zero

    def _values(self, name: str) -> np.ndarray:
        values: np.ndarray = _need("onnx").numpy_helper.to_array(self.initializers[name])
        return values


def _trtexec(graph: Any, path: Path, *, typed: bool) -> str:
    line = ["trtexec", f"--onnx={path}", "--sparsity=enable"]
    line.append("--stronglyTyped" if typed else "--fp16")
    shapes = {given.name: given.type.tensor_type.shape.dim for given in _inputs(graph)}
    if any(not dim.HasField("dim_value") for dims in shapes.values() for dim in dims):
        for option, batch in zip(("min", "opt", "max"), _BATCHES, strict=True):
            sized = [
                f"{name}:{'x'.join(str(dim.dim_value or batch) for dim in dims)}"
                for name, dims in shapes.items()
            ]
            line.append(f"--{option}Shapes={','.join(sized)}")
    return shlex.join(line)


def _inputs(graph: Any) -> list[Any]:
    constants = {tensor.name for tensor in graph.initializer}
    return [given for given in graph.input if given.name not in constants]
