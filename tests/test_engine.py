"""The engine: Python and C++ agree on the interface; the right library is loaded, or why not."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from spre_fx import OptionError, engine, native_conv
from spre_fx.engine import Activation, Kind, MaskedConv, Step, Type, Weight, library

SOURCES = Path(engine.__file__).parent
HEADER = (SOURCES / "engine.h").read_text()
TRAINING_HEADER = (SOURCES / "training.h").read_text()


def source(version: int, supported: str = "") -> str:
    """A library of another version, or that supports only some of the instruction sets."""
    others = set(library._FUNCTIONS) - {"spre_supports", "spre_takes", "spre_scratch"}
    return f"""#include <string.h>
    long long spre_version() {{ return {version}; }}
    long long spre_supports(const char* isa) {{ return strstr("{supported}", isa) != 0; }}
    long long spre_takes(const void* step) {{ return 0; }}
    long long spre_scratch(const void* steps, long long n, long long threads) {{ return threads; }}
    {"".join(f"void {name}() {{}}" for name in sorted(others))}
    """


def build(
    directory: Path, isa: str, *, version: int = library.VERSION, supported: str = ""
) -> None:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    path = directory / f"_{isa}.so"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=source(version, supported), text=True, check=True)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(library.VARIABLE, raising=False)
    library._loaded.cache_clear()
    yield
    library._loaded.cache_clear()


def test_the_fields_of_a_step_are_those_of_the_header():
    struct = re.search(r"struct Step \{(.*?)\};", HEADER, re.S)[1]
    lines = re.findall(r"int64_t ([\w, ]+);", struct)
    assert [name for line in lines for name in line.split(", ")] == [
        name for name, _ in Step._fields_
    ]


@pytest.mark.parametrize("kind", [Weight, MaskedConv])
def test_the_fields_of_what_training_asks_for_are_those_of_the_header(kind):
    struct = re.search(rf"struct {kind.__name__} \{{(.*?)\}};", TRAINING_HEADER, re.S)[1]
    lines = re.findall(r"(?:const void\*|int64_t) ([\w, ]+);", struct)
    assert [name for line in lines for name in line.split(", ")] == [
        name for name, _ in kind._fields_
    ]


def test_the_numbers_of_the_passes_are_those_of_the_header():
    body = re.search(r"enum MaskedConvPass : int64_t \{(.*?)\};", TRAINING_HEADER, re.S)[1]
    assert {name: int(number) for name, number in re.findall(r"k(\w+) = (\d+)", body)} == {
        "Forward": native_conv.FORWARD,
        "InputGradient": native_conv.INPUT_GRADIENT,
        "WeightGradient": native_conv.WEIGHT_GRADIENT,
    }


def test_every_function_has_the_arguments_of_its_header():
    headers = re.sub(r"//.*", "", HEADER + TRAINING_HEADER)
    declared = re.findall(r"(spre_\w+)\((.*?)\);", headers, re.S)
    found = {name: len([a for a in arguments.split(",") if a]) for name, arguments in declared}
    loaded = {name: len(arguments) for name, (arguments, _) in library._FUNCTIONS.items()}
    assert found == loaded | {"spre_version": 0, "spre_isa": 0}


@pytest.mark.parametrize("enum", [Kind, Activation, Type])
def test_the_numbers_are_those_of_the_header(enum):
    body = re.search(rf"enum {enum.__name__} : int64_t \{{(.*?)\}};", HEADER, re.S)[1]
    numbers = {name.upper(): int(number) for name, number in re.findall(r"k(\w+) = (\d+)", body)}
    assert numbers == {member.name.replace("_", ""): member.value for member in enum}


def test_nothing_there_is_a_sentence(tmp_path):
    assert "no C++ compiler was found" in library.find(tmp_path, library.ISAS)


@pytest.mark.parametrize(
    ("there", "supported", "isas", "expected"),
    [
        (["avx512", "avx2", "portable"], "avx512 avx2 portable", library.ISAS, "avx512"),
        (["avx512", "avx2", "portable"], "avx2 portable", library.ISAS, "avx2"),
        (["avx512_bf16", "avx512", "portable"], "avx512 portable", library.ISAS, "avx512"),
        (["avx512_bf16", "portable"], "avx512_bf16 portable", library.ISAS, "avx512_bf16"),
        (["avx512", "portable"], "avx2 portable", library.ISAS, "portable"),
        (["avx2", "portable"], "avx512 avx2 portable", library.ISAS, "avx2"),
        (["avx512", "avx2", "portable"], "avx512 avx2 portable", ("portable",), "portable"),
    ],
)
def test_the_best_that_is_there_and_runs_is_taken(tmp_path, there, supported, isas, expected):
    for isa in there:
        build(tmp_path, isa, supported=supported)
    assert library.find(tmp_path, isas).isa == expected


def test_an_engine_that_this_cpu_lacks_is_refused(tmp_path):
    for isa in ("avx512", "portable"):
        build(tmp_path, isa, supported="portable")
    assert "avx512 does not run on this CPU" in library.find(tmp_path, ("avx512",))
    assert "avx2 was not compiled; found avx512, portable" in library.find(tmp_path, ("avx2",))


@pytest.mark.parametrize("stale", ["portable", "avx2"])
def test_a_stale_build_is_refused(tmp_path, stale):
    for isa in ("avx2", "portable"):
        version = library.VERSION - (isa == stale)
        build(tmp_path, isa, version=version, supported="avx2 portable")
    found = library.find(tmp_path, library.ISAS)
    expected = rf"_{stale}\.so was compiled for version {library.VERSION - 1} .* reinstall spre_fx"
    assert re.search(expected, found)


def test_a_damaged_library_is_refused(tmp_path):
    (tmp_path / "_portable.so").write_text("not a library")
    assert re.search(r"_portable\.so cannot be loaded .* reinstall", library.find(tmp_path, ()))


def test_any_suffix_of_an_extension_module_will_do(tmp_path):
    build(tmp_path, "portable", supported="portable")
    for suffix in library.EXTENSION_SUFFIXES:
        path = next(tmp_path.iterdir())
        path.rename(tmp_path / f"_portable{suffix}")
        assert library.find(tmp_path, library.ISAS).isa == "portable"


def test_without_openmp_everything_runs_on_one_thread(tmp_path, monkeypatch):
    build(tmp_path, "portable", supported="portable")
    assert library.find(tmp_path, library.ISAS).scratch(engine.program([Step()]), 3) == 3
    monkeypatch.setattr(library.torch._C, "__file__", str(tmp_path / "_portable.so"))
    found = library.find(tmp_path, library.ISAS)
    assert "one thread" in found.one_thread
    assert found.scratch(engine.program([Step()]), 3) == 1


def test_the_variable_turns_it_off(monkeypatch):
    monkeypatch.setenv(library.VARIABLE, "none")
    assert engine.load() is None
    assert engine.why_not().startswith("SPRE_FX_ENGINE=none turns")


def test_another_value_of_the_variable_is_an_error(monkeypatch):
    monkeypatch.setenv(library.VARIABLE, "sse")
    with pytest.raises(
        OptionError, match="to be avx512_bf16, avx512, avx2, portable or none, found 'sse'"
    ):
        engine.load()


def test_what_the_variable_asks_for_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv(library.VARIABLE, "portable")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    with pytest.raises(OptionError, match=r"asks for portable, .* without its C"):
        engine.load()


def test_it_is_loaded_once(monkeypatch):
    first = engine.load()
    monkeypatch.setenv(library.VARIABLE, "none")
    assert engine.load() is first
    assert bool(engine.why_not()) == (first is None)


def test_a_program_is_a_copy_of_its_steps():
    step = Step(kind=Kind.COPY, x=-1, batch=2)
    steps = engine.program([step, Step(direct=1)])
    step.batch = 3
    assert (len(steps), steps[0].kind, steps[0].x, steps[0].batch) == (2, Kind.COPY, -1, 2)
    assert steps[1].direct == 1
