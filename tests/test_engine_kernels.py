"""Every kernel of every installed engine: what torch computes, and nothing written beside it."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from engine_cases import KINDS, Draw, Fenced, dtypes, fenced
from torch.nn import functional as F
from training_cases import CALLS

from spre_fx import engine, weight_layout
from spre_fx.engine import Activation, Engine, Kind, Step, Type, library

ROOT = Path(engine.__file__).parents[2]
SOURCES = Path(engine.__file__).parent
ONE_BY_ONE = {
    f"{name}_{axis}": 1 for name in ("kernel", "stride", "dilation") for axis in ("h", "w")
}


@pytest.fixture(params=library.ISAS)
def each_engine(request):
    found = library.find(SOURCES, (request.param,))
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_computes_what_torch_does(each_engine, kind, threads):
    for seed in range(12):
        for dtype in dtypes(each_engine.isa):
            case = KINDS[kind](Draw(100 * threads + seed, dtype))
            assert each_engine.takes(case.step)
            case.run(each_engine, threads)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("call", CALLS)
def test_what_training_asks_for_is_what_torch_computes(each_engine, call, threads):
    for seed in range(30):
        CALLS[call](each_engine, 100 * threads + seed, threads)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "winograd_conv"])
def test_what_is_not_finite_passes_through_as_in_torch(each_engine, kind):
    cases = [
        KINDS[kind](Draw(seed, dtype, finite=False))
        for seed in range(12)
        for dtype in dtypes(each_engine.isa)
    ]
    assert sum(not bool(case.expected.isfinite().all()) for case in cases) > len(cases) / 2
    for case in cases:
        case.run(each_engine, 1)


@pytest.mark.parametrize("channels", [20, 60])
def test_parts_of_a_channel_group_that_are_not_there_are_not_read(each_engine, channels):
    weight = torch.zeros(24, channels // 4, 4).scatter_(
        2, torch.tensor([1, 3]).expand(24, channels // 4, 2), 1.0
    )
    weight = (weight * torch.randn(weight.shape)).view(24, channels, 1, 1)
    packed = weight_layout.pack(weight, quartered=True)
    x = torch.full((1, 5, 7, channels + 3), float("nan"))
    x[..., :channels] = torch.randn(1, 5, 7, channels)
    y = torch.zeros(1, 5, 7, 24)
    memories = [*map(fenced, (x.flatten()[:-3], y, packed))]
    step = Step(
        **{"kind": Kind.SPARSE_CONV, "x": 0, "y": 1, "weight": 2, "residual": -1, "bias": -1},
        **{"batch": 1, "height": 5, "width": 7, "out_height": 5, "out_width": 7},
        **{"channels": channels, "x_stride": channels + 3, "out_channels": 24, "y_stride": 24},
        **{**ONE_BY_ONE, "groups": 1, "slots": 8, "channel_group": 16, "parts": 4},
    )
    steps = engine.program([step])
    in_place = each_engine.isa == "avx2"
    least = each_engine.scratch(engine.program([Step(kind=Kind.COPY)]), 1)
    assert (each_engine.scratch(steps, 1) == least) is in_place
    scratch = Fenced(-(-each_engine.scratch(steps, 1) // 64) * 64)
    each_engine.run(steps, [memory.address for memory in memories], scratch.address, 1)
    found = memories[1].bytes.view(torch.float32).view(35, 24)
    expected = x[..., :channels].reshape(35, channels).double() @ weight.view(24, -1).double().t()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    step.tile_pixels = step.direct = 1
    assert each_engine.takes(step) is in_place


@pytest.mark.parametrize("side", [2, 4])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_winograd_keeps_what_is_not_finite_within_its_tiles(each_engine, side, value):
    case = KINDS["winograd_conv"](Draw(3, torch.float32))
    weight = torch.randn(16, 16, 3, 3)
    x = torch.zeros(1, 12, 12, 16)
    x[0, 5, 5, 7] = value
    y = torch.full((1, 12, 12, 16), 3.0)
    packed = weight_layout.pack_winograd(weight, side)
    step = case.step
    step.x, step.y, step.weight, step.bias, step.residual = 0, 1, 2, -1, -1
    step.x_offset = step.y_offset = step.tile_pixels = 0
    step.batch, step.height, step.width, step.out_height, step.out_width = 1, 12, 12, 12, 12
    step.channels = step.out_channels = step.x_stride = step.y_stride = 16
    step.padding_h = step.padding_w = 1
    step.winograd, step.activation = side, Activation.IDENTITY
    memories = [*map(fenced, (x, y, packed))]
    steps = engine.program([step])
    scratch = Fenced(-(-each_engine.scratch(steps, 1) // 64) * 64)
    each_engine.run(steps, [memory.address for memory in memories], scratch.address, 1)
    finite = memories[1].bytes.view(torch.float32).view(12, 12, 16).isfinite().all(2)
    assert not finite[4:7, 4:7].any()
    touched = torch.zeros(12 // side, 12 // side, dtype=torch.bool)
    touched[4 // side : 6 // side + 1, 4 // side : 6 // side + 1] = True
    tiles = finite.unfold(0, side, side).unfold(1, side, side).flatten(2)
    assert torch.equal(~tiles.all(2), touched)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_writes_nothing(each_engine, kind, threads):
    for seed in range(6):
        case = KINDS[kind](Draw(seed, torch.float32))
        case.step.batch = 0
        case.expected = case.y.values.double()
        case.run(each_engine, threads)


@pytest.mark.parametrize("x", ["inf", "-inf", "nan", "500", "-500", "-88", "-3", "0"])
@pytest.mark.parametrize("activation", [Activation.SILU, Activation.HARDSWISH, Activation.RELU6])
def test_activations_at_the_ends_of_their_range(each_engine, activation, x):
    step = Step(
        kind=Kind.AFFINE,
        activation=activation,
        **{"y": 1, "x_stride": 1, "y_stride": 1, "residual": -1, "weight": -1, "bias": -1},
        **{"batch": 1, "height": 1, "width": 1, "channels": 1, "groups": 1},
        **{"out_height": 1, "out_width": 1, "out_channels": 1, **ONE_BY_ONE},
    )
    given = torch.tensor([float(x)])
    x, y = fenced(given), Fenced(4)
    each_engine.run(engine.program([step]), [x.address, y.address], 0, 1)
    torch_does = {Activation.SILU: F.silu, Activation.HARDSWISH: F.hardswish}
    expected = torch_does.get(activation, F.relu6)(given)
    found = y.bytes.view(torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (-1, {}),
        (len(Kind), {}),
        (Kind.DENSE_CONV, {"dilation_w": 2}),
        (Kind.DENSE_CONV, {"groups": 2}),
        (Kind.WINOGRAD_CONV, {"winograd": 2}),
        (Kind.WINOGRAD_CONV, {"winograd": 3, "kernel_h": 3, "kernel_w": 3}),
        (Kind.WINOGRAD_CONV, {"winograd": 4, "kernel_h": 3, "kernel_w": 3, "stride_h": 2}),
        (Kind.WINOGRAD_CONV, {"winograd": 4, "kernel_h": 3, "kernel_w": 3, "dilation_w": 2}),
        (Kind.WINOGRAD_CONV, {"winograd": 4, "kernel_h": 3, "kernel_w": 3, "groups": 2}),
        (
            Kind.WINOGRAD_CONV,
            {"winograd": 4, "kernel_h": 3, "kernel_w": 3, "type": Type.BFLOAT16},
        ),
        (Kind.SPARSE_CONV, {"channel_group": 8}),
        (Kind.SPARSE_CONV, {"channel_group": 16, "parts": 0}),
        (Kind.SPARSE_CONV, {"channel_group": 16, "slots": 3, "parts": 3}),
        (Kind.SPARSE_CONV, {"channel_group": 16, "slots": 3, "parts": 2}),
        (Kind.SPARSE_CONV, {"channel_group": 16, "slots": 6, "parts": 4}),
        (Kind.SPARSE_CONV, {"channel_group": 32, "slots": 4, "parts": 2}),
        (Kind.SPARSE_CONV, {"channel_group": 16, "slots": 4, "parts": 2, "planar": 1}),
        (Kind.SPARSE_CONV, {"channel_group": 16, "x_planes": 1}),
        (Kind.DENSE_CONV, {"y_planes": 1}),
        (
            Kind.SPARSE_CONV,
            {"channel_group": 16, "planar": 1, "y_planes": 1, "activation": Activation.SILU},
        ),
        (Kind.SPARSE_CONV, {"channel_group": 16, "planar": 1, "y_planes": 1, "residual": 1}),
        (Kind.SPARSE_CONV, {"channel_group": 16, "tile_pixels": 1, "direct": 1, "padding_h": 1}),
        (Kind.SPARSE_CONV, {"channel_group": 32, "tile_pixels": 1, "direct": 1}),
        (Kind.SPARSE_CONV, {"channel_group": 16, "type": Type.BFLOAT16}),
    ],
)
def test_a_step_without_a_kernel_is_refused(each_engine, kind, fields):
    sizes = {"channels": 16, "out_channels": 16, "batch": 1, "height": 4, "width": 4}
    common = {**ONE_BY_ONE, **sizes, "groups": 1, "out_height": 4, "out_width": 4, "slots": 4}
    common |= {"parts": 1}
    assert not each_engine.takes(Step(kind=kind, **{**common, **fields}))


def test_only_one_library_takes_bfloat16(each_engine):
    step = Step(kind=Kind.COPY, type=Type.BFLOAT16)
    assert each_engine.takes(step) == (each_engine.isa == "avx512_bf16")


class Chain:
    """Six 3x3 convs that each read what the one before wrote, in two buffers by turns."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(48, 48, 3, 3, generator=generator) / 20 for _ in range(6)]
        image = torch.randn(1, 48, 9, 9, generator=generator)
        self.expected = image.double()
        for weight in weights:
            self.expected = F.relu(F.conv2d(self.expected, weight.double(), padding=1))
        packed = [weight_layout.pack(weight) for weight in weights]
        self.start = image.permute(0, 2, 3, 1).contiguous()
        self.memories = [fenced(self.start), fenced(self.start), *map(fenced, packed)]
        self.steps = engine.program(
            [
                Step(
                    **{"kind": Kind.SPARSE_CONV, "activation": Activation.RELU, "groups": 1},
                    **{"x": i % 2, "y": 1 - i % 2, "residual": -1, "weight": 2 + i, "bias": -1},
                    **{"x_stride": 48, "y_stride": 48, "channels": 48, "out_channels": 48},
                    **{"batch": 1, "height": 9, "width": 9, "out_height": 9, "out_width": 9},
                    **{**ONE_BY_ONE, "kernel_h": 3, "kernel_w": 3, "padding_h": 1, "padding_w": 1},
                    **{"slots": packed[i].flatten(4, 5).shape[4], "channel_group": 16, "parts": 1},
                )
                for i in range(6)
            ]
        )

    def run(self, engine: Engine, threads: int) -> None:
        first = self.memories[0].bytes.view(torch.float32)
        first.copy_(self.start.view(-1))
        scratch = Fenced(-(-engine.scratch(self.steps, threads) // 64) * 64)
        addresses = [memory.address for memory in self.memories]
        engine.run(self.steps, addresses, scratch.address, threads)
        found = first.view(1, 9, 9, 48).permute(0, 3, 1, 2).double()
        torch.testing.assert_close(found, self.expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_each_step_sees_what_the_one_before_wrote(each_engine, threads):
    chain = Chain(0)
    for _ in range(20):
        chain.run(each_engine, threads)


def test_programs_run_at_once_do_not_meet(each_engine):
    errors = []

    def run(seed):
        try:
            chain = Chain(seed)
            for _ in range(50):
                chain.run(each_engine, 1)
        except AssertionError as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def flags(isa: str) -> list[str]:
    """How setup compiles a library, without the optimisation."""
    build = pytest.importorskip("spre_fx.engine.build")
    return [flag for flag in (*build.FLAGS, *build.ISAS[isa]) if flag != "-O3"]


def output(command: list[str | Path], **environment: str) -> str:
    """What a command that ends well writes.

    Raises:
        AssertionError: If it does not end well, with what it wrote.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    found = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr[-4000:]
    return found.stdout.strip()


def compile_with(sanitizers: str, isa: str, source: Path, to: Path, *more: str) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++ and its sanitizers")
    output(["g++", *flags(isa), "-O1", "-g", f"-fsanitize={sanitizers}", *more, source, "-o", to])


@pytest.mark.slow
def test_the_address_and_undefined_behaviour_sanitizers_find_nothing(each_engine, tmp_path):
    for isa in {"portable", each_engine.isa}:
        shared = ("-shared", "-fPIC", "-fno-sanitize-recover=all")
        source = SOURCES / f"{isa}.cpp"
        compile_with("address,undefined", isa, source, tmp_path / f"_{isa}.so", *shared)
    runtimes = [
        output(["g++", f"-print-file-name={name}"])
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    for cases in ("engine_cases.py", "training_cases.py"):
        output(
            [sys.executable, Path(__file__).with_name(cases), tmp_path, each_engine.isa, "100"],
            LD_PRELOAD=" ".join(runtimes),
            ASAN_OPTIONS="detect_leaks=0",
        )


@pytest.mark.slow
def test_the_thread_sanitizer_finds_nothing(each_engine, tmp_path):
    source = Path(__file__).with_name("engine_threads.cpp")
    include = f'-DENGINE="{SOURCES / each_engine.isa}.cpp"'
    compile_with("thread", each_engine.isa, source, tmp_path / "threads", include, "-pthread")
    output([tmp_path / "threads"])
