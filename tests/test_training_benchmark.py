"""benchmarks/training: its statistics, its reference, its profile, its resuming and its table."""

import dataclasses
import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from models import Residual
from torch import nn

import spre_fx

RUN = Path(__file__).parent.parent / "benchmarks" / "training" / "run.py"
MACHINE = {"cpu": "Z80", "flags": [], "cores": 1, "versions": {"torch": "9"}}


@pytest.fixture(autouse=True)
def _path(import_benchmarks):
    import_benchmarks("common")
    import_benchmarks("training")


@pytest.fixture(name="module")
def _module():
    return importlib.import_module


@pytest.fixture(name="script")
def _script():
    return runpy.run_path(str(RUN))


@pytest.fixture(name="tiny")
def _tiny(module):
    return module("setting").Setting("resnet18", 2, 32)


def test_ratios_are_paired_so_that_a_slow_round_cancels_out(module):
    timing = module("timing")
    assert timing.ratios([30.0, 60.0, 15.0], [20.0, 40.0, 10.0]) == [1.5, 1.5, 1.5]
    assert timing.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2, 3, 4)
    assert timing.quartiles([7.0]) == (7, 7, 7)


def test_each_round_begins_with_the_next_one(module):
    calls = []

    def timed(name):
        return lambda: float(calls.append(name) or len(calls))

    times, failed = module("timing").interleave({name: timed(name) for name in "abc"}, range(4))
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert times == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}
    assert failed == {}


def test_the_others_go_on_without_one_that_fails(module):
    def broken():
        raise RuntimeError("no kernel\nfor this")

    times, failed = module("timing").interleave({"a": lambda: 1.0, "b": broken}, range(3))
    assert times == {"a": [1, 1, 1]}
    assert failed == {"b": "RuntimeError: no kernel"}


def test_settings_are_checked(module, tiny):
    setting = module("setting")
    assert str(tiny) == "resnet18, batch 2, 32 px, cpu, float32, 1 thread, eager, 2:4"
    with pytest.raises(ValueError, match=r"mode='fast': expected one of \('eager', 'compile'\)"):
        dataclasses.replace(tiny, mode="fast")
    with pytest.raises(spre_fx.PatternError):
        dataclasses.replace(tiny, pattern="4:2")
    assert not tiny.has_targets
    assert setting.Setting("resnet50", 16, 160).has_targets


def in_reference(name: str, branched: tuple[str, ...] = ("conv1", "conv2")) -> str:
    """Where the reference has a parameter of a prepared `Residual`."""
    owner, _, leaf = name.rpartition(".")
    conv = owner.replace("_spre", "").replace("bn", "conv")
    if conv in branched:
        own = owner.replace(conv, "conv").replace(conv.replace("conv", "bn"), "bn")
        return f"{conv}.{own}.{leaf}"
    return f"{owner}.layer.{leaf}" if owner in ("fc", "shortcut.conv") else name


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:8", "2:3"])  # 8 channels: 2:3 has a rest
def test_the_reference_computes_what_prepare_does(module, pattern):
    model = Residual().double()
    reference = module("reference").algorithm_1(model, spre_fx.Pattern.parse(pattern))
    prepared = spre_fx.prepare(model, pattern)
    theirs = dict(reference.named_parameters())
    with torch.no_grad():
        for name, parameter in prepared.named_parameters():
            theirs[in_reference(name)].copy_(parameter)
    assert len(theirs) == len(list(prepared.parameters()))
    for _ in range(2):  # the second with other statistics and weights
        x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
        outputs = [network(x.clone()) for network in (prepared, reference)]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
        for network, y in zip((prepared, reference), outputs, strict=True):
            network.zero_grad()
            y.square().mean().backward()
        for name, parameter in prepared.named_parameters():
            found = theirs[in_reference(name)]
            torch.testing.assert_close(found.grad, parameter.grad, rtol=1e-9, atol=1e-10)
        with torch.no_grad():
            for parameter in (*prepared.parameters(), *reference.parameters()):
                parameter.sub_(0.1 * parameter.grad)
    masked = [site for site in spre_fx.sites(prepared) if site.live_taps is not None]
    assert any(0 < site.live_taps[0] < site.live_taps[1] for site in masked)


def test_the_reference_leaves_narrow_layers_dense(module):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    found = module("reference").algorithm_1(model, spre_fx.Pattern(1, 4))
    assert [type(layer).__name__ for layer in found] == ["Conv2d", "BatchNorm2d", "SparseLayer"]
    assert type(model[2]) is nn.Conv2d


def test_contenders_start_from_the_same_weights(module, tiny):
    contenders = module("contenders")
    networks = [contenders.network(name, tiny) for name in contenders.CONTENDERS[:2]]
    dense, sparse = (network.get_parameter("layer1.0.conv1.weight") for network in networks)
    assert torch.equal(dense, sparse)
    assert contenders.live_taps(networks[0]) is None
    assert 0 < contenders.live_taps(contenders.network("SR-STE + SpRe", tiny)) < 1


def test_a_step_trains_and_numbers_stay_finite(module, tiny):
    training = module("training").Training("dense", dataclasses.replace(tiny, channels_last=True))
    assert training.images.is_contiguous(memory_format=torch.channels_last)
    losses = [training.step().item() for _ in range(3)]
    assert losses[2] < losses[0]
    training.images.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="expected a finite loss, found nan"):
        training.milliseconds()


def test_autocast(module, tiny):
    training = module("training").Training("dense", dataclasses.replace(tiny, dtype="bfloat16"))
    kinds = []
    training.network.fc.register_forward_hook(lambda _, inputs, y: kinds.append(y.dtype))
    training.step()
    assert kinds == [torch.bfloat16]
    assert training.network.fc.weight.grad.dtype == torch.float32


def test_a_step_by_kind_of_operation(module, tiny):
    operations, training = module("operations"), module("training")
    trained = training.Training("LBC + SpRe", tiny)
    found = operations.measure(trained, 1)
    inside = {
        "masked weights",
        "conv input gradient",
    }  # of masked convs, which are kinds themselves
    assert set(operations.KIND.values()) - inside < found.keys()
    assert {"spre_fx::masked_conv", "spre_fx::masked_conv, backward"} < found.keys()
    assert all(ms > 0 for ms in found.values())
    assert 0 < operations.share(found, operations.MASKS) < 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trained.network.modules())
    dense = operations.measure(training.Training("dense", tiny), 1, split=False)
    assert operations.MASKS not in dense
    assert "conv input gradient" not in dense
    assert dense["conv forward"] < sum(dense.values())


def test_splitting_the_gradients_changes_none(module):
    operations = module("operations")
    conv, x = nn.Conv2d(4, 6, 3).double(), torch.randn(2, 4, 5, 5).double().requires_grad_()
    inputs = (x, *conv.parameters())
    expected = torch.autograd.grad(conv(x).square().sum(), inputs)
    with operations._SplitGradients():
        found = torch.autograd.grad(conv(x).square().sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("spre_fx::live_taps", "mask updates"),
        ("_SpReMaskBackward", "mask updates"),
        ("_ProductOfNumbersBackward", "masked weights"),
        ("spre_fx::mask_weight", "masked weights"),
        ("GeneratedBackwardFor_spre_fx_mask_weight_default", "masked weights"),
        ("GeneratedBackwardFor_spre_fx_mask_weight_defaultBackward", "masked weights"),
        ("spre_fx::new_operator", "spre_fx::new_operator"),
        ("GeneratedBackwardFor_spre_fx_new_defaultBackward", "spre_fx::new, backward"),
        ("autograd::engine::evaluate_function: ConvolutionBackward0", None),
    ],
)
def test_operators_are_known_by_name(module, name, kind):
    assert module("operations").kind_of(name) == kind


def test_profile_table(module):
    dense, other = {"conv forward": 6.0, "rest": 4.0}, {"conv forward": 9.0, "rest": 5.0}
    text = module("step_profile").table(dense, other | {"mask updates": 1.0}, "SR-STE")
    lines = [line.split() for line in text.splitlines()]
    assert lines[2] == ["conv", "forward", "6.000", "9.000", "+3.000", "+30.0%"]
    assert lines[4] == ["mask", "updates", "0.000", "1.000", "+1.000", "+10.0%"]
    assert lines[5] == ["step", "10.000", "15.000", "+5.000", "+50.0%"]


def row(model="resnet50", batch=16, pixels=160, pattern="1:16", mode="eager"):
    """A made-up row: SR-STE meets its targets, SpRe misses those of the step and of the memory."""
    setting = {"model": model, "batch": batch, "pixels": pixels, "pattern": pattern, "mode": mode}
    setting |= {"threads": 2, "device": "cpu", "dtype": "float32", "channels_last": False}
    return {
        "setting": setting,
        "machine": MACHINE,
        "contenders": ["dense", "SR-STE", "SR-STE + SpRe", "reference"],
        "command": "python benchmarks/training/run.py",
        "date": "2026-11-21",
        "milliseconds": {
            "dense": [100.0, 200.0, 100.0],
            "SR-STE": [102.0, 206.0, 102.0],
            "SR-STE + SpRe": [160.0, 300.0, 150.0],
        },
        "mask_share": {"SR-STE": 0.011, "SR-STE + SpRe": 0.02},
        "live_taps": {"SR-STE + SpRe": 0.5},
        "peak_bytes": {"dense": 2**30, "SR-STE": 2**30, "SR-STE + SpRe": 1.5 * 2**30},
        "failed": {"reference": "RuntimeError: why"},
        "seconds": 1.0,
    }


def test_the_table_says_which_targets_are_met(module):
    tables = module("tables")
    text = tables.document([row(mode="compile"), row(), row(model="vgg16_bn")])
    assert "## Z80 (no vector instructions that are listed), 1 cores; torch 9\n" in text
    assert "- 2026-11-21: `python benchmarks/training/run.py`" in text
    assert "### resnet50, batch 16, 160 px, cpu, float32\n" in text
    first, _, last = text.partition("### vgg16_bn")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines()]
    found = {tuple(line[1:4]): line[4:] for line in lines if len(line) == 9}
    assert found["eager", "1:16", "dense"] == ["100 (100-150)", "", "", "", ""]
    assert found["eager", "1:16", "SR-STE"] == [
        *("102 (102-154)", "1.020x (1.020-1.025); <= 1.03x met", "1.10%; <= 2% met", "1.00x", "")
    ]
    assert found["eager", "1:16", "SR-STE + SpRe"] == [
        *("160 (155-230)", "1.500x (1.500-1.550); <= 1.35x **missed**", "2.00%; <= 2% met"),
        *("1.50x; <= 1.25x **missed**", "50%"),
    ]
    assert "6 of 10 targets are met; these are not:" in text
    assert "1 thread" not in text
    assert ", 1:16: SR-STE + SpRe: peak memory 1.50x, target <= 1.25x" in text
    assert text.count("reference failed: RuntimeError: why") == 3
    assert "met" not in last  # no target is set for it
    assert "missed" not in last


def test_the_line_of_a_setting(module):
    line = module("tables").result_line(row())
    assert line.startswith("resnet50, batch 16, 160 px, cpu, float32, 2 threads, eager, 1:16: over")
    assert "SR-STE 1.020x (1.020-1.025); <= 1.03x met, SR-STE + SpRe 1.500x" in line


def test_a_row_lasts_while_conditions_and_contenders_stay(script, module, tiny):
    made = row() | {"setting": dataclasses.asdict(tiny)}
    made["machine"] = module("inputs").machine_of("cpu")
    done, is_done = {script["key"](made): made}, script["is_done"]
    assert is_done(tiny, done, ["dense", "SR-STE"])
    assert not is_done(tiny, done, ["dense", "ASP + SpRe"])
    assert not is_done(dataclasses.replace(tiny, mode="compile"), done, ["dense"])
    elsewhere = made | {"machine": MACHINE}
    assert not is_done(tiny, {script["key"](elsewhere): elsewhere}, ["dense"])


def run(script, monkeypatch, rows: Path, *options: str) -> None:
    arguments = ["--rows", str(rows), "--models", "resnet18", "--batch", "2", "--pixels", "32"]
    arguments += ["--threads", "1", "--patterns", "1:16", "--rounds", "2", "--warm-up", "2"]
    arguments += ["--profiled", "1", "--memory", "1", "--processes", "1", *options]
    monkeypatch.setattr(sys, "argv", [str(RUN), *arguments])
    script["main"]()


@pytest.mark.slow
def test_end_to_end_and_resumed(script, monkeypatch, tmp_path, capfd):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"setting": {"model": "resn')  # a kill cut it short
    options = ("--modes", "eager", "--contenders", "SR-STE + SpRe")
    run(script, monkeypatch, rows, *options)
    assert "eager, 1:16: over dense: SR-STE + SpRe " in capfd.readouterr().out
    (found,) = script["rows"].read(rows, script["key"]).values()
    assert found["contenders"] == ["dense", "SR-STE + SpRe"]
    assert found["failed"] == {}
    assert all(len(ms) == 2 and min(ms) > 0 for ms in found["milliseconds"].values())
    assert 0 < found["mask_share"]["SR-STE + SpRe"] < 1
    weights = 4 * 11_689_512  # and their gradients and momentum
    assert 3 * weights < found["peak_bytes"]["dense"] < found["peak_bytes"]["SR-STE + SpRe"]
    assert "| SR-STE + SpRe |" in rows.with_suffix(".md").read_text()
    before = rows.read_text()
    run(script, monkeypatch, rows, *options)
    assert "1 settings" in capfd.readouterr().out
    assert rows.read_text() == before


@pytest.mark.slow
def test_compiled(script, monkeypatch, tmp_path):
    rows = tmp_path / "rows.jsonl"
    run(script, monkeypatch, rows, "--modes", "compile", "--contenders", "SR-STE + SpRe")
    (found,) = (json.loads(line) for line in rows.read_text().splitlines())
    assert list(found["milliseconds"]) == ["dense", "SR-STE + SpRe"]
    assert (found["mask_share"], found["peak_bytes"], found["failed"]) == ({}, {}, {})


def test_what_fails_is_said_and_ends_the_run_with_an_error(script, monkeypatch, tmp_path):
    rows = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit, match="dense failed: ValueError: Unknown model resnet17"):
        run(script, monkeypatch, rows, "--modes", "eager", "--models", "resnet17")
    assert not rows.exists()
