"""export_onnx: plain layers with N:M zeros that ONNX Runtime and OpenVINO run; and the checker."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import DropPath, Residual, TwoHeads, chain
from torch import Tensor, nn
from torch.fx import GraphModule

import spre_fx
from spre_fx import (
    FileError,
    ModelError,
    OptionError,
    Pattern,
    VerificationError,
    masks,
    onnx_export,
)

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")


def deploy(model: nn.Module, pattern: str = "2:4") -> GraphModule:
    return spre_fx.finalize(spre_fx.prepare(model, pattern))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    deployed = deploy(Residual())
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return deployed, path, spre_fx.export_onnx(deployed, path, torch.randn(1, 8, 6, 6))


def run(path: object, x: Tensor) -> list[np.ndarray]:
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


def test_what_is_written_is_plain_layers_with_zeros(exported):
    deployed, path, report = exported
    assert report.opset == 18
    assert report.operators["Conv"] == 3
    assert report.operators["Gemm"] == 1
    # Nothing is multiplied, compared or selected: there is no mask.
    assert set(report.operators) <= {
        *("Conv", "Relu", "Add", "Gemm", "ReduceMean", "GlobalAveragePool", "Reshape", "Flatten")
    }
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    for site in spre_fx.sites(deployed):
        weight = torch.tensor(weights[f"{site.name}.weight"])
        assert torch.equal(weight, deployed.get_parameter(f"{site.name}.weight"))
        assert masks.obeys(weight, Pattern(2, 4))


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_any_batch_agrees(exported, batch):
    deployed, path, report = exported
    assert report.difference < 1e-5
    x = torch.randn(batch, 8, 6, 6)
    (y,) = run(path, x)
    expected = deployed(x).detach()
    assert (torch.from_numpy(y) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_fresh_process_agrees(exported, tmp_path):
    deployed, path, _ = exported
    x = torch.randn(3, 8, 6, 6)
    np.savez(tmp_path / "io.npz", x=x.numpy(), y=deployed(x).detach().numpy())
    code = f"""
import sys, numpy, onnxruntime
io = numpy.load({str(tmp_path / "io.npz")!r})
session = onnxruntime.InferenceSession({str(path)!r}, providers=["CPUExecutionProvider"])
y, = session.run(None, {{session.get_inputs()[0].name: io["x"]}})
assert abs(y - io["y"]).max() < 1e-5 * abs(io["y"]).max()
assert "torch" not in sys.modules and "spre_fx" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_openvino_converts_and_runs_it(exported):
    openvino = pytest.importorskip("openvino")
    deployed, path, _ = exported
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # some processors would take bfloat16
    compiled = openvino.Core().compile_model(openvino.convert_model(str(path)), "CPU", exact)
    for batch in (1, 4):
        x = torch.randn(batch, 8, 6, 6)
        expected = deployed(x).detach()
        difference = torch.from_numpy(compiled(x.numpy())[0]) - expected
        assert difference.abs().max() < 1e-5 * expected.abs().max()


def test_several_outputs_functional_calls_and_what_training_left(tmp_path):
    for model, opset in ((TwoHeads(), 18), (DropPath(), 20)):
        x, path = torch.randn(2, 8, 6, 6), tmp_path / "m.onnx"
        report = spre_fx.export_onnx(deploy(model), path, x, opset=opset)
        assert report.difference < 1e-5
        assert report.opset == opset


def test_the_report_and_the_checker_say_the_same(exported):
    _, path, report = exported
    again = spre_fx.check_onnx(path)
    assert replace(report, difference=None) == again
    text = str(report)
    assert "conv1" in text
    assert "no: float32, not float16 or int8" in text
    assert "0 of 4 nodes meet TensorRT's rules for a sparse kernel, 4 would in float16." in text
    assert "Since 11 the file itself has to be float16" in text
    shapes = [f"--{kind}Shapes=x:{n}x8x6x6" for kind, n in (("min", 1), ("opt", 8), ("max", 32))]
    assert report.trtexec.split() == [
        *("trtexec", f"--onnx={path}", "--sparsity=enable", "--fp16"),
        *shapes,
    ]


def test_half_precision_meets_the_rules(tmp_path):
    deployed = deploy(chain(conv=nn.Conv2d(32, 256, 3), bn=nn.BatchNorm2d(256), relu=nn.ReLU()))
    x = torch.randn(2, 32, 6, 6).half()
    half = spre_fx.to_dense(deployed).half()
    report = spre_fx.export_onnx(half, tmp_path / "a b.onnx", x, dynamic_batch=False)
    (verdict,) = report.verdicts
    assert (verdict.tensorrt, verdict.pays, verdict.dtype) == (None, True, "float16")
    assert report.difference < 1e-2
    assert "1 of 1 nodes meet TensorRT's rules for a sparse kernel. It takes" in str(report)
    line = f"trtexec '--onnx={tmp_path / 'a b.onnx'}' --sparsity=enable --stronglyTyped"
    assert report.trtexec == line


def graph_with(nodes: list[object], weights: dict[str, np.ndarray], path: object) -> None:
    helper = onnx.helper
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    given = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 8])
    made = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", "m"])
    graph = helper.make_graph(nodes, "graph", [given], [made], tensors)
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)


def test_a_quantised_weight_is_read_behind_its_scale(tmp_path):
    """Zero is where the stored number is the zero point of its channel."""
    node = onnx.helper.make_node
    zero = np.array([0, 3, 0, -2], dtype=np.int8)
    stored = np.zeros((4, 8), dtype=np.int8) + zero[:, None]
    stored[:, ::4] = 7
    nodes = [
        node("DequantizeLinear", ["w", "s", "z"], ["d"], axis=0),
        node("Transpose", ["d"], ["t"], perm=[1, 0]),
        node("MatMul", ["x", "t"], ["y"], name="head"),
    ]
    weights = {"w": stored, "s": np.ones(4, np.float32), "z": zero}
    graph_with(nodes, weights, tmp_path / "q.onnx")
    (verdict,) = spre_fx.check_onnx(tmp_path / "q.onnx").verdicts
    assert (verdict.name, verdict.shape) == ("head", (4, 8))
    assert (verdict.zeros, verdict.dtype) == (0.75, "int8")
    assert verdict.tensorrt is None
    assert verdict.openvino == "4 is no multiple of 64"


def test_a_product_of_two_activations_has_no_weight(tmp_path):
    node = onnx.helper.make_node
    nodes = [node("Transpose", ["x"], ["t"]), node("MatMul", ["t", "x"], ["y"], name="attention")]
    graph_with(nodes, {}, tmp_path / "a.onnx")
    (verdict,) = spre_fx.check_onnx(tmp_path / "a.onnx").verdicts
    assert verdict.name == "attention"
    assert verdict.tensorrt == verdict.openvino == "its weight is no constant"


def test_what_cannot_be_exported(tmp_path):
    x, path = torch.randn(2, 8, 6, 6), tmp_path / "model.onnx"
    prepared = spre_fx.prepare(Residual(), "2:4")
    with pytest.raises(
        ModelError, match=r"deployed model in evaluation, found one in training\. Ex"
    ):
        spre_fx.export_onnx(prepared, path, x)
    with pytest.raises(OptionError, match=r"opset=17: expected 18 or newer\."):
        spre_fx.export_onnx(deploy(Residual()), path, x, opset=17)
    with pytest.raises(ModelError, match=r"found RuntimeError: Given groups=1.*dynamic_batch=F"):
        spre_fx.export_onnx(deploy(Residual()), path, torch.randn(2, 9, 6, 6))
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        OptionError, match=r"expected onnxscript, found it missing\. Run: pip install"
    ):
        spre_fx.export_onnx(deploy(Residual()), tmp_path / "m", torch.randn(2, 8, 6, 6))


def test_a_difference_leaves_the_old_file(exported, monkeypatch, tmp_path):
    deployed, _, _ = exported
    path = tmp_path / "model.onnx"
    path.write_text("the old file")
    monkeypatch.setitem(onnx_export._TOLERANCE, torch.float32, 0.0)
    with pytest.raises(VerificationError, match=r"ONNX Runtime to agree .* found .*No file was"):
        spre_fx.export_onnx(deployed, path, torch.randn(2, 8, 6, 6))
    assert path.read_text() == "the old file"


def test_without_onnx_runtime_nothing_is_compared(exported, monkeypatch, tmp_path):
    deployed, _, _ = exported
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report = onnx_export._difference(deployed, b"", (torch.randn(2, 8, 6, 6),))
    assert report is None


def test_a_model_beyond_what_one_file_holds_is_refused(exported, monkeypatch, tmp_path):
    deployed, _, _ = exported
    monkeypatch.setattr(onnx_export, "_LARGEST", 1000)
    with pytest.raises(
        ModelError, match=r"at most 2 GiB, which is what one ONNX file holds, found"
    ):
        spre_fx.export_onnx(deployed, tmp_path / "m.onnx", torch.randn(2, 8, 6, 6))


@pytest.mark.parametrize("content", [None, b"", b"no model at all"])
def test_what_is_no_onnx_model(content, tmp_path):
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(FileError, match=r"expected an ONNX model, found: \w+"):
        spre_fx.check_onnx(tmp_path / "file")
