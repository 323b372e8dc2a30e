"""ResNet-50 by TensorRT, with sparse kernels allowed or not."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spre_fx

PACKAGES = ("tensorrt", "onnx", "onnxscript")


def why_not() -> str | None:
    """Why TensorRT cannot be measured here, or None."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"TensorRT: {', '.join(missing)} not installed" if missing else None


def onnx_file(deployed: nn.Module, x: Tensor) -> bytes:
    """The model as ONNX, for the batch of x, in its type."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        spre_fx.export_onnx(deployed, path, x, dynamic_batch=False)
        return path.read_bytes()


def build(content: bytes, x: Tensor, *, sparse: bool) -> Engine:
    """What runs a model on x, on the current stream.

    Args:
        content: Of an ONNX file, whose types the engine keeps.
        x: The input, which stays where it is.
        sparse: Whether TensorRT may take sparse kernels where it times them as faster.

    Raises:
        RuntimeError: If TensorRT cannot read the file or build the engine.
    """
    trt = importlib.import_module("tensorrt")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(content):
        raise RuntimeError(f"TensorRT cannot read the model: {parser.get_error(0)}")
    config = builder.create_builder_config()
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise RuntimeError("TensorRT built no engine")
    return Engine(trt.Runtime(logger), serialized, x)


class Engine:
    """An engine with its tensors. Called, it runs on the current stream."""

    def __init__(self, runtime: Any, serialized: Any, x: Tensor) -> None:
        self.runtime = runtime  # has to live as long as the engine
        self.engine = runtime.deserialize_cuda_engine(serialized)
        self.context = self.engine.create_execution_context()
        source, *outputs = map(self.engine.get_tensor_name, range(self.engine.num_io_tensors))
        self.tensors = {source: x.contiguous()}
        self.tensors |= {
            name: x.new_empty(tuple(self.engine.get_tensor_shape(name))) for name in outputs
        }
        for name, tensor in self.tensors.items():
            self.context.set_tensor_address(name, tensor.data_ptr())

    def __call__(self) -> None:
        """Run it once.

        Raises:
            RuntimeError: If TensorRT refuses to.
        """
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT did not run the engine")
