"""benchmarks/inference: its statistics, its engines, its resuming, and what it says of gaps."""

import argparse
import importlib
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import spre_fx
from spre_fx import engine

INFERENCE = Path(__file__).parent.parent / "benchmarks" / "inference"
SETTING = {"model": "resnet18", "pixels": 32, "batch": 4, "threads": 1, "dtype": "float32"}
MACHINE = {"cpu": "Z80", "flags": [], "cores": 1, "versions": {"torch": "9"}}


@pytest.fixture(autouse=True)
def _path(import_benchmarks):
    import_benchmarks("inference")


@pytest.fixture(name="timing")
def _timing():
    return importlib.import_module("timing")


@pytest.fixture(name="engines")
def _engines():
    return importlib.import_module("engines")


@pytest.fixture(name="script")
def _script():
    return runpy.run_path(str(INFERENCE / "run.py"))


def test_percentiles(timing):
    assert timing.Spread.of(range(1, 102)) == (11, 26, 51, 76, 91)
    assert timing.Spread.of([3.0]) == (3, 3, 3, 3, 3)


def test_ratios_are_paired_so_that_a_slow_round_cancels_out(timing):
    peer, ours = [10.0, 40.0, 12.0], [5.0, 20.0, 6.0]
    assert timing.speedups(peer, ours) == [2, 2, 2]


def test_the_fastest_is_the_peer_with_the_least_median(timing):
    times = {"a": [1.0, 9.0, 9.0], "b": [8.0, 8.0, 8.0], "1:16": [1.0, 1.0, 1.0]}
    assert timing.fastest(times, ["a", "b", "c"]) == "b"
    assert timing.fastest(times, []) is None


def test_slow_peers_go_first_until_the_time_is_kept(timing):
    once = {"a": 9000.0, "b": 3000.0, "c": 1000.0, "1:16": 100.0}
    assert timing.too_slow(once, ["a", "b", "c"], rounds=5, limit=70) == {}
    reasons = timing.too_slow(once, ["a", "b", "c"], rounds=5, limit=30)
    assert list(reasons) == ["a"]
    assert "takes 9.0 s, of c 1.0 s; 5 rounds with both would take 66 s" in reasons["a"]
    assert list(timing.too_slow(once, ["a", "b", "c"], rounds=5, limit=0)) == ["a", "b"]
    assert timing.too_slow(once, [], rounds=5, limit=0) == {}


def test_every_round_visits_every_function_once(timing):
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.interleave(functions, seconds=0, rounds=3, visit_seconds=0)
    assert [len(taken) for taken in times.values()] == [3, 3]
    assert calls.count("a") == calls.count("b") == 6  # one untimed and one timed call a visit
    assert all(calls[i] == calls[i + 1] for i in range(0, 12, 2))
    assert {calls[i] for i in (0, 4, 8)} == {"a", "b"}  # neither is always first


def row(**changes):
    """A made-up row: the engine "1:4" takes half as long as the fastest peer."""
    made = {
        "setting": SETTING,
        "machine": MACHINE,
        "backend": "auto",
        "engines": ["eager", "openvino", "1:4"],
        "fastest": "openvino",
        "milliseconds": {"eager": [9.0, 9.0], "openvino": [4.0, 8.0], "1:4": [2.0, 4.0]},
        "left_out": {"compile": "there was no time"},
        "failed": {},
    }
    return made | changes


def test_summary_and_table(script):
    made = row()
    made["summary"] = script["summary"](made)
    assert made["summary"]["1:4"] == {"ms": [2.2, 2.5, 3, 3.5, 3.8], "speedup": [2] * 5}
    assert made["summary"]["eager"] == {"ms": [9] * 5}
    assert script["tables"].result_line(made).endswith("over openvino: 1:4 2.00x (2.00-2.00)")
    half = row(setting=SETTING | {"dtype": "bfloat16"}, failed={"1:8": "RuntimeError: why"})
    half["milliseconds"] = half["milliseconds"] | {"1:4": [6.0, 6.0]}
    half["summary"] = script["summary"](half)
    text = script["tables"].document([made, half])
    assert "## Z80 (no vector instructions that are listed), 1 cores; torch 9; backend" in text
    assert "| 9 (9-9) | - " in text
    assert "**6 (5-7)**" in text
    assert "3 (2.5-3.5), 2.00x (2.00-2.00) " in text
    assert "6 (6-6), 1.00x (0.83-1.17), 0.50x our float32" in text
    assert "0 of 1 medians are below 1.0x; the least is 2.00x, 1:4 on resnet18 32 px" in text
    assert "- compile left out (2 settings): there was no time" in text
    assert "- 1:8 failed (resnet18 32 px, batch 4, 1 thread, bfloat16): RuntimeError: why" in text


def test_the_plot_is_drawn(script, tmp_path):
    made = row()
    made["summary"] = script["summary"](made)
    script["tables"].plot([made], tmp_path / "plot.svg")
    assert "resnet18" in (tmp_path / "plot.svg").read_text()


@pytest.fixture(name="run")
def _run(monkeypatch, capsys):
    """Runs a script as the command line does, in this process, and returns what it prints."""

    def run(name: str, *options: str | Path) -> str:
        file = str(INFERENCE / name)
        monkeypatch.setattr(sys, "argv", [file, "--backend", "dense", *map(str, options)])
        runpy.run_path(file, run_name="__main__")
        return capsys.readouterr().out

    return run


def test_end_to_end_and_resumed(tmp_path, script, run):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"setting": {"model": "resn')  # a kill cut it short
    options = ["--rows", rows, "--models", "resnet18", "--pixels", "32", "--batches", "4"]
    options += ["--threads", "1", "--seconds", "0", "--rounds", "1", "--engines"]
    assert "batch 4, 1 thread, float32: over eager: 1:4 " in run("run.py", *options, "eager", "1:4")
    (found,) = script["rows"].read(rows, script["key"]).values()
    assert found["setting"] == SETTING
    assert (found["fastest"], found["left_out"], found["failed"]) == ("eager", {}, {})
    assert all(0 < difference <= 1e-5 for difference in found["differences"].values())
    assert all(len(taken) == 1 and taken[0] > 0 for taken in found["milliseconds"].values())
    assert "**" in rows.with_suffix(".md").read_text()
    before = rows.read_text()
    assert "1 settings" in run("run.py", *options, "1:4")
    assert rows.read_text() == before


def test_a_row_lasts_while_conditions_and_engines_stay(script):
    made = row(machine=script["machine"].describe(), backend="dense")
    rows, is_done = {script["key"](made): made}, script["is_done"]

    def asked(*engines: str, backend: str = "dense") -> argparse.Namespace:
        return argparse.Namespace(engines=engines, backend=backend)

    assert is_done(SETTING, rows, asked("eager", "1:4"))
    assert not is_done(SETTING, rows, asked("eager", "1:16"))
    assert not is_done(SETTING, rows, asked("eager", backend="cpu"))
    assert not is_done(SETTING | {"threads": 2}, rows, asked("eager"))
    assert not is_done(SETTING, {script["key"](row()): row()}, asked("eager"))  # elsewhere


def test_engines_that_are_missing_or_wrong_are_not_timed(script, monkeypatch):
    engines, networks = script["engines"], script["networks"]
    monkeypatch.setitem(sys.modules, "openvino", None)

    def wrong(model, x, threads, dtype):
        return lambda: torch.cat([model(x)[:3], model(x)[:1] * 1.001])  # in the last image

    def broken(model, x, threads, dtype):
        raise ValueError("why\nand where")

    monkeypatch.setitem(engines.PEERS, "wrong", wrong)
    monkeypatch.setitem(engines.PEERS, "broken", broken)
    contest = script["Contest"](SETTING, "dense")
    contest.enter("1:4", ["eager", "openvino", "wrong", "broken", "1:4"])
    assert list(contest.runners) == ["eager", "1:4"]
    assert list(contest.left_out) == ["openvino"]
    assert contest.left_out["openvino"].startswith("not installed: ")
    assert contest.failed["wrong"].endswith("of the largest output, more than 1e-04: not timed")
    assert contest.failed["broken"] == "ValueError: why"
    half = script["Contest"](SETTING | {"dtype": "bfloat16"}, "dense")
    pytest.importorskip("onnxruntime")
    half._enter("onnxruntime", half._builder("onnxruntime", nn.Identity(), nn.Identity()), half.x)
    assert half.left_out == {"onnxruntime": "ONNX Runtime has no convs in bfloat16 on a CPU"}
    assert networks.images(4, 8)[0].equal(networks.images(4, 8)[3])


def test_what_networks_are_made_of_reaches_their_outputs(script):
    networks = script["networks"]
    x = networks.images(3, 32)
    prepared = networks.prepared("resnet18", "1:16")
    with torch.inference_mode():
        outputs = prepared(x)
        prepared.conv1.weight.mul_(1.01)
        changed = prepared(x)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2 * outputs.abs().max()
    assert (outputs - changed).abs().max() > 1e-4 * outputs.abs().max()


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_exported_engines_agree(engines, name):
    for package in (name, "onnxscript"):
        pytest.importorskip(package)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        found = engines.PEERS[name](model, x, 1, "float32")()
        assert engines.difference(found, model.double()(x.double())) <= 1e-6


def test_freezing_packs_the_weights(engines):
    from torch._dynamo.utils import counters

    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU()).eval()
    counters.clear()
    engines.compiled(model, torch.randn(1, 16, 8, 8), 1, "float32")
    assert counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"] == 1


def test_layers_table():
    layers = runpy.run_path(str(INFERENCE / "layers.py"))
    shape = layers["Shape"]((1, 64, 14, 14), 32, 3, 2)
    times, flops = {"dense": 2.0, "1:4": 0.5}, {"dense": 4e7, "1:4": 1e7}
    figures = layers["Figures"](shape, 3, times, flops, {"1:4": "planar"})
    assert (figures.rate("dense"), figures.rate("1:4")) == (20, 20)
    text = layers["table"]([figures], 40.0)
    assert "| 64-32 3x3/2 14x14 | 3 " in text
    assert "| planar: 0.500 ms, 4.00x, 20 GFLOP/s, 50%, left 0.75 ms |" in text
    assert "| 1.50 ms, 4.00x, 50%, left 0.75 ms " in text


def test_every_distinct_conv_of_a_network_is_measured():
    layers = runpy.run_path(str(INFERENCE / "layers.py"))
    x = torch.randn(1, 3, 32, 32)
    found = layers["convs"]("resnet18", "1:4", x)
    assert len(found) == 19
    assert "conv1" not in found  # three channels are fewer than M
    shape, conv = found["layer4.0.downsample.0"]
    assert str(shape) == "256-512 1x1/2 2x2"
    assert (conv.weight != 0).double().mean() == 0.25


@pytest.fixture(name="layers")
def _layers():
    if engine.load() is None:
        pytest.skip("the engine is not there")
    return runpy.run_path(str(INFERENCE / "layers.py"))


def sparse_conv(pattern: str, **options: int) -> nn.Conv2d:
    conv = nn.Conv2d(32, 32, 3, padding=1, **options).requires_grad_(requires_grad=False)
    conv.weight *= spre_fx.masks.nm_mask(conv.weight, spre_fx.Pattern.parse(pattern))
    return conv


def test_the_dense_runner_computes_the_conv(layers):
    conv = sparse_conv("2:4", stride=2)
    x = torch.randn(1, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layers["dense_runner"](conv, x)().to_dense(), conv(x).relu())


@pytest.mark.parametrize(
    ("pattern", "stride", "by_winograd"), [("2:4", 1, 2), ("2:4", 2, 0), ("1:16", 1, 0)]
)
def test_the_ways_are_those_of_finalize(layers, pattern, stride, by_winograd):
    conv = sparse_conv(pattern, stride=stride)
    ways = layers["sparse_ways"](conv, pattern)
    by_outputs, *others = ways
    quartered = engine.load().isa == "avx2" and pattern == "2:4"
    assert by_outputs == ("quartered" if quartered else "permuted")
    assert others == ["planar", "winograd 2x2", "winograd 4x4"][: 1 + by_winograd]
    x = torch.randn(1, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    for way in ways.values():
        torch.testing.assert_close(way.module(x), conv(x).relu(), rtol=0, atol=1e-5)
        assert layers["sparse_runner"](way.module, x)() is None


def test_the_fastest_way_is_shown_and_memory_has_its_price(layers, monkeypatch):
    milliseconds = {"dense": 9.0, "1:4 planar": 2.0, "1:4 winograd 4x4": 1.75}

    def interleave(runners, **_):
        return {name: [milliseconds.get(name, 3.0)] for name in runners}

    monkeypatch.setattr(layers["timing"], "interleave", interleave)
    conv, options = sparse_conv("1:4"), argparse.Namespace(seconds=0, rounds=1)
    shape = layers["Shape"]((1, 32, 8, 8), 32, 3, 1)
    calls = {"dense": 1.0, "sparse": 0.5}

    def figures():
        return layers["_figures"](shape, 1, {"1:4": conv}, calls, options)

    assert figures().ways == {
        "1:4": "planar"
    }  # 1.25 ms by Winograd's filtering, at a price of 1.25
    assert figures().milliseconds == {"dense": 8.0, "1:4": 1.5}
    assert figures().flops["dense"] == 4 * figures().flops["1:4"] == 2 * 9 * 32 * 32 * 64
    milliseconds["1:4 winograd 4x4"] = 1.6
    assert figures().ways == {"1:4": "winograd 4x4"}
    assert figures().milliseconds["1:4"] == pytest.approx(1.1)


def test_weights_of_each_engine_stand_in_the_table_of_memory():
    memory = runpy.run_path(str(INFERENCE / "memory.py"))
    options = argparse.Namespace(
        **{"model": "resnet18", "pixels": 32, "batch": 1, "backend": "dense"},
        **{"peers": ["eager"], "patterns": ["1:4"]},
    )
    sizes = {}

    def run(name, folder, _):
        network = torch.load(memory["_file"](folder, name), weights_only=False)
        sizes[name] = sum(tensor.nbytes for tensor in network.state_dict().values()) / 2**20
        return (3 * 2**20, 4 * 2**20) if name == "1:4" else "it was killed"

    lines = memory["table"](options, run).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells == [
        ["eager", f"{sizes['eager']:.1f}", "1.000", "it was killed", ""],
        ["1:4", f"{sizes['1:4']:.1f}", "1.000", "3.0", "4.0"],
    ]
    assert sizes["1:4"] == pytest.approx(44.6, abs=0.1)


@pytest.mark.slow
def test_memory_is_that_of_the_network(run):
    options = ["--model", "resnet18", "--pixels", "32", "--peers", "--patterns", "1:4"]
    output = run("memory.py", *options)
    lines = [line.split("|")[1:-1] for line in output.splitlines() if line.startswith("| ")][1:]
    found = {line[0].strip(): [float(cell) for cell in line[1:]] for line in lines}
    ((name, (weights, share, loaded, peak)),) = found.items()
    assert (name, share) == ("1:4", 1)
    assert weights == pytest.approx(44.6, abs=0.1)
    assert 0.9 * weights < loaded <= peak < 4 * weights


def test_overhead_leaves_the_arithmetic_out():
    if engine.load() is None:
        pytest.skip("the engine is not there")
    overhead = runpy.run_path(str(INFERENCE / "overhead.py"))
    network, x = overhead["narrow"]("1:16", 2)
    with torch.inference_mode():
        expected = network(x)
        overhead["without_engine"](lambda: network(x))()
        torch.testing.assert_close(network(x), expected)  # the engine is back
    with pytest.raises(RuntimeError, match="that runs on the engine, found one that does not"):
        overhead["without_engine"](lambda: None)


@pytest.mark.skipif(engine.load() is None, reason="the engine is not there")
@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ((nn.Conv2d(64, 64, 1), nn.Softplus(), nn.Conv2d(64, 64, 1)), "torch runs .*_1"),
        ((nn.Conv2d(8, 8, 1),), "runs as a graph of dense layers"),  # the rule finds it too small
    ],
)
def test_overhead_is_only_measured_where_the_engine_runs_everything(layers, found):
    overhead = runpy.run_path(str(INFERENCE / "overhead.py"))
    prepared = spre_fx.prepare(nn.Sequential(*layers), "1:4", branch=None)
    x = torch.randn(1, layers[0].in_channels, 4, 4)
    with pytest.raises(RuntimeError, match=f"engine runs whole, found: {found}"):
        overhead["on_the_engine"](prepared, x)
