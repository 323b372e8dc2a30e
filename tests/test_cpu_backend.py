"""The CPU backend: what it takes, what it refuses in words, and its rule."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spre_fx import Pattern, cpu_backend, masks
from spre_fx.cpu_backend import CPUBackend, predicted_ratio, processor
from spre_fx.packed_layers import PackedConv2d, PackedLinear

PATTERN = Pattern(1, 4)
ISAS = ("avx512", "avx2", "portable")


@pytest.mark.parametrize(
    ("layer", "kind", "planar"),
    [
        (nn.Conv2d(16, 8, 3, padding="same", groups=4), PackedConv2d, [False, True]),
        (nn.Linear(16, 8), PackedLinear, [False]),
    ],
)
def test_convs_and_linears_are_packed(
    layer: nn.Module, kind: type[nn.Module], planar: list[bool]
) -> None:
    ways = CPUBackend().candidates(layer, PATTERN)
    assert [way.module.layout.planar for way in ways] == planar
    for way in ways:
        assert (type(way.module), way.kind) == (kind, "cpu")
        assert way.why == "computes the 1:4 non-zeros only"


@pytest.mark.parametrize(("pattern", "competes"), [("2:4", True), ("1:8", True), ("1:16", False)])
def test_winograd_competes_where_many_weights_are_left(pattern: str, competes: bool) -> None:
    ways = CPUBackend().candidates(nn.Conv2d(16, 8, 3), Pattern.parse(pattern))
    assert isinstance(ways, list)
    by_winograd = [way for way in ways if way.kind.startswith("winograd")]
    assert [way.kind for way in by_winograd] == ["winograd 2x2", "winograd 4x4"] * competes
    assert [way.module.winograd for way in by_winograd] == [2, 4] * competes
    assert all("tiles of" in way.why and way.price > 1 for way in by_winograd)
    strided = CPUBackend().candidates(nn.Conv2d(16, 8, 3, stride=2), Pattern.parse(pattern))
    assert {way.kind for way in strided} == {"cpu"}


@pytest.mark.parametrize(
    ("isa", "pattern", "planar", "quartered"),
    [
        ("avx512", "1:8", False, False),
        ("avx512", "1:4", False, False),
        ("avx2", "1:8", True, False),
        ("avx2", "1:4", False, True),
        ("portable", "1:4", True, False),
    ],
)
def test_without_measuring_layouts_follow_the_instructions(
    monkeypatch: pytest.MonkeyPatch, isa: str, pattern: str, planar: bool, quartered: bool
) -> None:
    backend, nm = CPUBackend(), Pattern.parse(pattern)
    monkeypatch.setattr(cpu_backend.engine, "load", lambda: SimpleNamespace(isa=isa))
    for layer in (nn.Conv2d(64, 64, 3), nn.Linear(64, 64)):
        with torch.no_grad():
            layer.weight.mul_(masks.nm_mask(layer.weight, nm))
        ways = backend.candidates(layer, nm)
        layout = backend.rule(layer, nm, ways, None).module.layout
        assert layout.planar is (planar and isinstance(layer, nn.Conv2d))
        assert layout.quartered is quartered
        assert getattr(backend.rule(layer, nm, ways, None).module, "winograd", 0) == 0


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv1d(16, 8, 3), "found Conv1d"),
        (nn.Conv2d(16, 8, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.Conv2d(16, 8, 2, padding="same"), "padding='same'"),
        (nn.Linear(16, 8).double(), "float64"),
    ],
)
def test_others_are_refused_in_words(layer: nn.Module, words: str) -> None:
    refused = CPUBackend().candidates(layer, PATTERN)
    assert isinstance(refused, str)
    assert words in refused


@pytest.mark.parametrize(("isa", "taken"), [("avx512_bf16", True), ("avx512", False)])
def test_bfloat16_needs_its_instructions(
    monkeypatch: pytest.MonkeyPatch, isa: str, taken: bool
) -> None:
    monkeypatch.setattr(cpu_backend.engine, "load", lambda: SimpleNamespace(isa=isa))
    found = CPUBackend().candidates(nn.Linear(64, 64).bfloat16(), PATTERN)
    assert isinstance(found, list) == taken
    refused = "this CPU has no instructions for bfloat16 that the engine uses"
    assert taken or found == refused


@pytest.mark.parametrize("isa", ISAS)
def test_the_rule_follows_the_predicted_ratio(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend.engine, "load", lambda: SimpleNamespace(isa=isa))
    backend = CPUBackend()
    for layer, pattern, kind in (
        (nn.Conv2d(256, 256, 3), Pattern(1, 16), "cpu"),
        (nn.Conv2d(256, 256, 3), Pattern(3, 4), "dense"),
        (nn.Conv2d(8, 4, 1), Pattern(1, 4), "dense"),
    ):
        ways = backend.candidates(layer, pattern)
        assert isinstance(ways, list)
        chosen = backend.rule(layer, pattern, ways, None)
        assert chosen.kind == kind
        assert (chosen.kind == "cpu") == (predicted_ratio(layer, pattern, isa) > 1)
        assert (chosen.module is layer) == (kind == "dense")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layer", [nn.Conv2d(64, 64, 3), nn.Conv2d(8, 8, 1), nn.Linear(24, 40)])
def test_fewer_non_zeros_are_never_slower(layer: nn.Module, isa: str) -> None:
    patterns = [Pattern(n, m) for m in (1, 2, 4, 8, 16, 32) for n in range(1, m)]
    by_density = sorted(patterns, key=lambda pattern: pattern.n / pattern.m)
    ratios = [predicted_ratio(layer, pattern, isa) for pattern in by_density]
    assert ratios == sorted(ratios, reverse=True)
    dense = [p for p in by_density if p.n / p.m >= 3 / 4]
    assert all(ratio < 1 for ratio in ratios[-len(dense) :])


@pytest.mark.parametrize("isa", ISAS)
def test_wider_layers_gain_more(isa: str) -> None:
    for pattern in (Pattern(1, 4), Pattern(2, 4)):
        widths = (4, 8, 16, 32, 64, 256)
        outputs = [predicted_ratio(nn.Linear(64, width), pattern, isa) for width in widths]
        inputs = [predicted_ratio(nn.Linear(width, 64), pattern, isa) for width in widths]
        assert outputs == sorted(outputs)
        assert inputs == sorted(inputs)
    grouped = predicted_ratio(nn.Conv2d(64, 64, 3, groups=8), PATTERN, isa)
    assert grouped == predicted_ratio(nn.Conv2d(8, 8, 3), PATTERN, isa)


def test_times_are_those_of_a_processor_and_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processor() in CPUBackend().machine
    before = CPUBackend().machine
    monkeypatch.setattr(cpu_backend.engine, "load", lambda: SimpleNamespace(isa="other"))
    assert CPUBackend().machine != before
