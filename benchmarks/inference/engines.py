"""The engines that are compared: each makes a callable of a dense, deployed network and an input.

All get the network after `finalize`, with batch norms folded and N:M zeros in its weights, so that
all compute the same; a dense engine takes as long for zeros as for anything else. What an engine
cannot do on this machine it says by raising `LeftOutError` or ImportError.
"""

from __future__ import annotations

import copy
import functools
import importlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import spre_fx

Runner = Callable[[], Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of the largest output. bfloat16 keeps 8 bits, and loses some of them in each of fifty layers.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}


class LeftOutError(Exception):
    """An engine that does not run a setting, with the reason."""


def eager(model: nn.Module, x: Tensor, threads: int, dtype: str) -> Runner:  # noqa: ARG001
    """Torch's own layers, channels_last."""
    network = copy.deepcopy(model).to(DTYPES[dtype], memory_format=torch.channels_last)
    typed = x.to(DTYPES[dtype])
    return lambda: network(typed)


def compiled(model: nn.Module, x: Tensor, threads: int, dtype: str) -> Runner:  # noqa: ARG001
    """torch.compile with freezing: oneDNN's convs with weights packed and epilogues fused.

    Freezing is set for the whole process' config while compiling: as an option of torch.compile it
    has no effect on the convs.
    """
    from torch._inductor import config  # noqa: PLC0415

    network = copy.deepcopy(model).to(DTYPES[dtype], memory_format=torch.channels_last)
    program = torch.compile(network)
    typed = x.to(DTYPES[dtype])
    with config.patch(freezing=True), torch.inference_mode():  # the mode of all calls to come
        program(typed)
    return lambda: program(typed)


def onnxruntime(model: nn.Module, x: Tensor, threads: int, dtype: str) -> Runner:
    """ONNX Runtime on the CPU, with all of its graph optimisations."""
    importlib.import_module("onnxruntime")  # before the export takes its time
    if dtype != "float32":
        raise LeftOutError(f"ONNX Runtime has no convs in {dtype} on a CPU")
    return run_in_onnxruntime(onnx(model, x), x, threads)


def run_in_onnxruntime(content: bytes, x: Tensor, threads: int) -> Runner:
    """The same, of a network in ONNX."""
    import onnxruntime as runtime  # noqa: PLC0415

    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = runtime.InferenceSession(content, options, ["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return lambda: torch.from_numpy(session.run(None, given)[0])


def openvino(model: nn.Module, x: Tensor, threads: int, dtype: str) -> Runner:
    """OpenVINO for latency, in the precision asked for: left alone it takes bfloat16 for float32.

    Raises:
        LeftOutError: If it runs in another precision all the same.
    """
    importlib.import_module("openvino")
    return run_in_openvino(onnx(model, x), x, threads, dtype)


def run_in_openvino(content: bytes, x: Tensor, threads: int, dtype: str = "float32") -> Runner:
    """The same, of a network in ONNX."""
    import openvino as runtime  # noqa: PLC0415

    precision = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
    }
    core = runtime.Core()
    program = core.compile_model(core.read_model(content), "CPU", options)
    found = program.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if found != precision:
        raise LeftOutError(f"OpenVINO computes in {found} on this CPU, though told {precision}")
    request, given = program.create_infer_request(), {0: x.contiguous().numpy()}

    def run() -> Tensor:
        return torch.from_numpy(request.infer(given, share_inputs=True, share_outputs=True)[0])

    return run


PEERS: dict[str, Callable[[nn.Module, Tensor, int, str], Runner]] = {
    "eager": eager,
    "compile": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def ours(prepared: nn.Module, x: Tensor, backend: str, dtype: str) -> Runner:
    """This library, as a user calls it."""
    network, typed = deployed(prepared, x, backend, dtype), x.to(DTYPES[dtype])
    return lambda: network(typed)


def deployed(prepared: nn.Module, x: Tensor, backend: str, dtype: str = "float32") -> nn.Module:
    """A prepared network finalized for an input: the dense backend has nothing to measure on it."""
    options = {} if backend == "dense" else {"example_inputs": (x.to(DTYPES[dtype]),)}
    if dtype != "float32":
        options["dtype"] = DTYPES[dtype]
    return spre_fx.finalize(prepared, backend=backend, **options)


def difference(found: Tensor, reference: Tensor) -> float:
    """The largest difference over the largest value of a reference in float64."""
    largest = reference.abs().max().item()
    if not 0 < largest < float("inf"):
        raise RuntimeError(f"nothing to compare: the largest output is {largest}")
    return (found.double() - reference).abs().max().item() / largest


def forget_exports() -> None:
    """Let go of the last network that was exported."""
    onnx.cache_clear()


@functools.lru_cache(maxsize=1)  # two engines read the same one
def onnx(model: nn.Module, x: Tensor) -> bytes:
    """The network for inputs of exactly that shape, in ONNX."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(model, (x.contiguous(),), dynamo=True, verbose=False)
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content
