"""Deployed models under torch.export and AOTInductor: any batch, and the same bits from a file."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from models import AuxiliaryHead, DropPath, Residual, TwoHeads
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

import spre_fx
from spre_fx import engine

SHAPE = (3, 8, 6, 6)


def deploy(kind: type) -> GraphModule:
    return spre_fx.finalize(spre_fx.prepare(kind(), "2:4"), "dense")


def export(deployed: GraphModule, shape: tuple[int, ...] = SHAPE) -> torch.export.ExportedProgram:
    batch = {0: torch.export.Dim("batch")}
    return torch.export.export(deployed, (torch.randn(shape),), dynamic_shapes=(batch,))


def deploy_packed() -> GraphModule:
    layers = (nn.Conv2d(64, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 1))
    deployed = spre_fx.finalize(spre_fx.prepare(nn.Sequential(*layers), "1:8"), "cpu")
    assert [site.backend for site in spre_fx.sites(deployed)] == ["cpu", "cpu"]
    return deployed


def results(module: object, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tree_leaves(module(x))


@pytest.mark.parametrize("strict", [False, True])
def test_both_ways_of_tracing_agree(strict):
    deployed, x = deploy(Residual), torch.randn(SHAPE)
    program = torch.export.export(deployed, (x,), strict=strict)
    assert torch.equal(program.module()(x), deployed(x))
    assert not [n for n in program.graph.nodes if "spre_fx" in str(n.target)]


@pytest.mark.parametrize("kind", [Residual, TwoHeads, AuxiliaryHead, DropPath])
def test_any_batch_from_a_file_has_the_same_bits(kind, tmp_path):
    deployed = deploy(kind)
    torch.export.save(export(deployed), tmp_path / "model.pt2")
    module = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 2, 9):
        x = torch.randn(batch, *SHAPE[1:])
        assert all(map(torch.equal, results(module, x), results(deployed, x)))


@pytest.mark.skipif(engine.load() is None, reason="the engine is not there")
def test_packed_layers_have_the_same_bits_from_a_file(tmp_path):
    deployed = deploy_packed()
    torch.export.save(export(deployed, (3, 64, 6, 6)), tmp_path / "model.pt2")
    module = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 2, 9):
        x = torch.randn(batch, 64, 6, 6)
        assert all(map(torch.equal, results(module, x), results(deployed, x)))


def write(deployed: GraphModule, shape: tuple[int, ...], folder: Path) -> None:
    """The exported program, and an input with its output, for another process."""
    folder.mkdir()
    x = torch.randn(shape)
    torch.export.save(export(deployed, shape), folder / "model.pt2")
    torch.save({"x": x, "y": deployed(x).detach()}, folder / "io.pt")


def test_a_fresh_process_needs_this_library_for_packed_layers_only(tmp_path):
    write(deploy(Residual), SHAPE, tmp_path / "dense")
    code = """
import sys, torch
torch.set_num_threads(1)

def program(folder):
    io = torch.load(f"{folder}/io.pt", weights_only=True)
    return torch.export.load(f"{folder}/model.pt2").module()(io["x"]), io["y"]

assert torch.equal(*program("dense"))
assert "spre_fx" not in sys.modules
"""
    if packed := engine.load() is not None:
        write(deploy_packed(), (3, 64, 6, 6), tmp_path / "packed")
        code += """
import spre_fx  # which has yet to import its operators
try:
    program("packed")
except RuntimeError:
    pass  # why is on stderr
else:
    raise AssertionError("expected operators to be missing")
import spre_fx.packed_ops
torch.testing.assert_close(*program("packed"))
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr
    for words in ("import the custom op", "torch.ops.spre_fx.packed_conv2d.default"):
        assert (words in run.stderr) is packed


@pytest.mark.slow  # compiles C++
@pytest.mark.parametrize("packed", [False, True])
def test_an_aot_inductor_package_agrees(packed, tmp_path):
    if packed and engine.load() is None:
        pytest.skip("the engine is not there")
    deployed, shape = (deploy_packed(), (3, 64, 6, 6)) if packed else (deploy(Residual), SHAPE)
    path = str(tmp_path / "model.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own code, compiling
        made = torch._inductor.aoti_compile_and_package(export(deployed, shape), package_path=path)
        package = torch._inductor.aoti_load_package(made)
    assert Path(made).stat().st_size > 0
    for batch in (1, 5):
        x = torch.randn(batch, *shape[1:])
        (y,), (expected,) = results(package, x), results(deployed, x)
        assert (y - expected).abs().max() < 1e-5 * expected.abs().max()
