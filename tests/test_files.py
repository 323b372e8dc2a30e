"""save and load: the same bits from a file alone, and one clear error for any other file."""

import copy
import io
import json
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from models import MODELS, Residual, assert_same, chain, randomise
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

import spre_fx
from spre_fx import FileError, ModelError, records
from spre_fx.passes import trace

REFUSED = {
    "CustomForward": r"conv1: expected a layer of torch\.nn, found a models\.Standardised\. A file",
    "Parametrised": r"conv1: .* found a torch\.nn\.utils\.parametrize\.ParametrizedConv2d\.",
    "ParametrisedOtherwise": r"conv2: .* found a torch\.nn\.utils\.parametrize\.ParametrizedConv",
    "Hooked": r"conv1: expected no hooks, found forward_hooks: they are Python code, which a file",
    "conv with norm": r"conv: expected a layer of torch\.nn, found a Conv2d whose set of modules",
}
NOTHING_TO_SPARSIFY = ("TiedConvs", "depthwise", "few channels")


def deploy(model: nn.Module, pattern: str = "1:4") -> GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that are never called
        return spre_fx.finalize(spre_fx.prepare(model, pattern))


@pytest.fixture
def deployed() -> GraphModule:
    return deploy(Residual())


@pytest.fixture
def file(deployed, tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    spre_fx.save(deployed, path)
    return path


def assert_same_model(ours: GraphModule, theirs: GraphModule) -> None:
    assert_same(ours.state_dict(), theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    strides = [[t.stride() for t in m.state_dict().values()] for m in (ours, theirs)]
    assert strides[0] == strides[1]
    assert spre_fx.sites(ours) == spre_fx.sites(theirs)
    grads = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (ours, theirs)]
    assert grads[0] == grads[1]
    modes = [[(n, m.training) for n, m in model.named_modules()] for model in (ours, theirs)]
    assert modes[0] == modes[1]
    nodes = [[(n.op, n.name, str(n.target)) for n in m.graph.nodes] for m in (ours, theirs)]
    assert nodes[0] == nodes[1]


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tree_leaves(model(x.clone()))


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(REFUSED) - set(NOTHING_TO_SPARSIFY)))
def test_every_model_comes_back_bit_for_bit(name, tmp_path):
    model = MODELS[name]()
    deployed = deploy(model)
    spre_fx.save(deployed, tmp_path / "model")
    loaded = spre_fx.load(tmp_path / "model")
    assert_same_model(loaded, deployed)
    x = torch.randn(model.shape)
    assert all(map(torch.equal, outputs(loaded, x), outputs(deployed, x)))


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_source_code_is_refused(name, tmp_path):
    deployed = deploy(MODELS[name]())
    with pytest.raises(ModelError, match=REFUSED[name]):
        spre_fx.save(deployed, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_what_is_loaded_is_a_deployed_model_like_any_other(deployed, file, tmp_path):
    loaded = spre_fx.load(file)
    changes = spre_fx.diff(deployed, loaded).text(nodes=True).splitlines()
    assert changes[-2].split()[0] == "change"  # the head of a table without rows
    assert set(changes[-1]) == {"-", " "}
    x = torch.randn(2, 8, 6, 6)
    assert str(spre_fx.cost(loaded, x)) == str(spre_fx.cost(deployed, x))
    spre_fx.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == file.read_bytes()
    exported = torch.export.export(loaded, (x,)).module()
    assert torch.equal(exported(x), deployed(x))
    assert_same_model(copy.deepcopy(loaded), deployed)


def test_a_fresh_process_without_the_source_agrees(deployed, file, tmp_path):
    x = torch.randn(3, 8, 6, 6)
    torch.save({"x": x, "y": deployed(x).detach()}, tmp_path / "io.pt")
    code = f"""
import sys, torch, spre_fx
torch.set_num_threads(1)
io = torch.load({str(tmp_path / "io.pt")!r}, weights_only=True)
loaded = spre_fx.load({str(file)!r})
assert torch.equal(loaded(io["x"]), io["y"])
assert not {{"models", "pickle_of_models"}} & set(sys.modules)
print([site.state.value for site in spre_fx.sites(loaded)])
"""
    run = [sys.executable, "-c", code]
    result = subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.strip() == str(["deployed N:M"] * 4)


def test_a_file_of_version_1_is_read_by_every_later_one():
    """Written by torch 2.15; other versions read it, and compute the same but for rounding."""
    model = spre_fx.load(Path(__file__).parent / "data" / "version1.safetensors")
    x = torch.linspace(-1, 1, 2 * 8 * 6 * 6).view(2, 8, 6, 6)
    assert torch.allclose(model(x), model.expected, rtol=1e-5, atol=1e-5)
    assert [site.pattern for site in spre_fx.sites(model)] == ["1:4"] * 4


def test_types_strides_modes_ties_and_grads_survive(tmp_path):
    model = chain(
        conv=nn.Conv2d(16, 8, 3, bias=False).bfloat16().to(memory_format=torch.channels_last),
        one=nn.Conv2d(8, 8, 1).half().requires_grad_(False),
        norm=nn.BatchNorm1d(4).double(),
    )
    traced = trace(model)
    traced.register_buffer("odd", torch.arange(6).view(2, 3).T, persistent=False)
    traced.register_buffer("none_of_it", torch.empty(0, 3))
    traced.register_parameter("tied", traced.one.weight)
    traced.eval()
    traced.norm.train()
    records.write(traced.conv, records.Record(pattern="1:4", reason="why", note="a 'note'\n\u2713"))
    spre_fx.save(traced, tmp_path / "model")
    loaded = spre_fx.load(tmp_path / "model")
    assert_same_model(loaded, traced)
    assert loaded.tied is loaded.one.weight
    assert torch.equal(loaded.odd, traced.odd)
    assert loaded.odd.stride() == (1, 3)
    assert records.read(loaded.conv) == records.read(traced.conv)
    assert loaded.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_layer_with_two_names_stays_one(tmp_path):
    model = deploy(MODELS["shared block"]())
    model.add_module("again", model.get_submodule("a"))
    spre_fx.save(model, tmp_path / "model")
    loaded = spre_fx.load(tmp_path / "model")
    assert loaded.again is loaded.a
    assert_same_model(loaded, model)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:8", "1:16"])
def test_the_file_is_as_small_as_the_pattern(pattern, tmp_path):
    conv = nn.Conv2d(256, 256, 3, bias=False)
    saved = spre_fx.save(deploy(chain(conv=conv), pattern), tmp_path / "model")
    n, m = map(int, pattern.split(":"))
    (line,) = saved.lines
    dense = conv.weight.nbytes
    assert (line.name, line.pattern, line.dense) == ("conv", pattern, dense)
    assert line.values == dense * n // m
    assert line.indices == line.values // 32 * (m - 1).bit_length()
    assert saved.other == 0
    assert saved.size == (tmp_path / "model").stat().st_size
    assert 0 < saved.size - line.values - line.indices < 2_000


def test_deployed_weights_have_no_negative_zeros():
    """A mask leaves them behind: 0 * -1 is -0. They would not pack."""
    deployed = deploy(chain(conv=nn.Conv2d(8, 8, 3), fc=nn.Conv2d(8, 8, 1)))
    for parameter in deployed.parameters():
        assert not (torch.signbit(parameter) & (parameter == 0)).any()


def test_a_weight_that_broke_its_pattern_is_kept_dense_and_says_so(deployed, tmp_path):
    with torch.no_grad():
        deployed.conv1.weight.fill_(1.0)
    saved = spre_fx.save(deployed, tmp_path / "model")
    assert "1:4, kept dense" in saved.layers()
    assert [line.packed for line in saved.lines] == [False, True, True, True]
    assert_same_model(spre_fx.load(tmp_path / "model"), deployed)


def test_load_puts_tensors_where_it_is_told(file):
    assert {p.device.type for p in spre_fx.load(file, device="meta").parameters()} == {"meta"}


# What is not a deployed model.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: spre_fx.prepare(Residual(), "1:4"),
            r"found one in training, with N:M masks\. Save",
        ),
        (Residual, r"found a Residual\. spre_fx\.adopt takes a dense model"),
        (
            lambda: nn.ModuleList([trace(Residual())]),
            r"found a ModuleList of which only parts are: 0",
        ),
    ],
)
def test_save_refuses_what_is_not_deployed(make, words, tmp_path):
    with pytest.raises(ModelError, match=words):
        spre_fx.save(make(), tmp_path / "model")


def test_save_refuses_hooks_names_and_foreign_graphs(deployed, tmp_path):
    handle = deployed.conv1.register_forward_hook(lambda *_: None)
    with pytest.raises(
        ModelError, match=r"conv1: expected no hooks, found forward_hooks: they are"
    ):
        spre_fx.save(deployed, tmp_path / "model")
    handle.remove()
    deployed.add_module('a"b', nn.ReLU())
    with pytest.raises(ModelError, match=r"'a\"b': expected a module name of letters, digits"):
        spre_fx.save(deployed, tmp_path / "model")
    exported = torch.export.export(Residual().eval(), (torch.randn(2, 8, 6, 6),)).module()
    with pytest.raises(
        ModelError, match=r"expected a plain torch\.fx graph, found one with _PyTree"
    ):
        spre_fx.save(exported, tmp_path / "model")


# What is not such a file.


def test_no_file_and_a_directory(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(
            FileError, match=r"expected a file that spre_fx\.save wrote, found none"
        ):
            spre_fx.load(path)


def zipped(path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, path)


def pickled(path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, path, _use_new_zipfile_serialization=False)


def other_tensors(path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.ones(3)}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (zipped, r"found a zip archive, as torch\.save and torch\.export\.save write: torch\.load"),
        (pickled, r"found a pickle\."),
        (other_tensors, r"found a safetensors file of another kind, .* called \['format'\]"),
        (lambda path: path.write_bytes(b""), r"found something else"),
        (lambda path: path.write_bytes(b"\x08\x0aonnx" * 9), r"found what may be an ONNX model"),
        (lambda path: path.write_text("a letter to my aunt"), r"found something else"),
        (
            lambda path: path.write_bytes(b"\xff" * 7 + b"\x7f{" + b"x" * 99),
            r"truncated or damaged",
        ),
    ],
)
def test_foreign_files_are_named(write, words, tmp_path):
    write(tmp_path / "file")
    with pytest.raises(FileError, match=words):
        spre_fx.load(tmp_path / "file")


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any], version: int = 1) -> None:
    """Change the description of a file, as someone would who knows how to make up its checksum."""
    with safetensors.safe_open(file, "pt") as content:
        metadata = content.metadata()
        parts = {name: content.get_tensor(name).clone() for name in content.keys()}  # noqa: SIM118
    text = metadata["spre_fx"].split(" ", 2)[2]
    description = json.loads(text)
    change(description)
    text = json.dumps(description)
    digest = sha256(text.encode()).hexdigest()
    safetensors.torch.save_file(parts, file, {"spre_fx": f"{version} {digest} {text}"})


def test_a_newer_version_is_named(file):
    rewrite(file, lambda _: None, version=2)
    with pytest.raises(
        FileError, match=r"expected version 1 of the format, found version '2'\. Load"
    ):
        spre_fx.load(file)


def test_checksums_of_description_and_tensors(file):
    content = bytearray(file.read_bytes())
    place = content.index(b"deployed") if b"deployed" in content else content.index(b"dense")
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        FileError, match=r"checksum of the description of the model .* found another"
    ):
        spre_fx.load(file)
    content[place] ^= 1
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        FileError, match=r"checksum of \S+ to be the one it was saved with.* damaged"
    ):
        spre_fx.load(file)


def test_tensors_too_many_or_too_few(file):
    with safetensors.safe_open(file, "pt") as content:
        metadata = content.metadata()
        parts = {name: content.get_tensor(name).clone() for name in content.keys()}  # noqa: SIM118
    safetensors.torch.save_file(parts | {"more": torch.ones(1)}, file, metadata)
    with pytest.raises(FileError, match=r"expected 12 tensors, found 13; .* not expected: more\."):
        spre_fx.load(file)
    parts.pop("fc.bias")
    safetensors.torch.save_file(parts, file, metadata)
    with pytest.raises(FileError, match=r"expected 12 tensors, found 11; missing .*: fc\.bias\."):
        spre_fx.load(file)


def damaged(content: bytes, random_: random.Random) -> bytes:
    """Bytes flipped, cut off, cut out, doubled or blanked, anywhere, often where the header is."""
    header = 8 + int.from_bytes(content[:8], "little")
    end = random_.choice([8, header, len(content)])
    at = random_.randrange(end)
    length = random_.choice([1, 1, 7, 300])
    changed = bytearray(content)
    match random_.randrange(5):
        case 0 | 1:
            for _ in range(random_.choice([1, 1, 3])):
                changed[random_.randrange(end)] ^= 1 << random_.randrange(8)
        case 2:
            del changed[at:]
        case 3:
            del changed[at : at + length]
        case 4:
            changed[at:at] = changed[at : at + length]
    return bytes(changed)


def fuzz(deployed: GraphModule, file: Path, count: int) -> tuple[int, int]:
    content, random_, refused = file.read_bytes(), random.Random(0), 0
    reference = deployed.state_dict()
    for _ in range(count):
        changed = damaged(content, random_)
        file.write_bytes(changed)
        try:
            loaded = spre_fx.load(file)
        except FileError:
            refused += 1
        else:
            assert_same(loaded.state_dict(), reference)  # a blank of the header, for one
    return refused, count


def test_a_few_hundred_damaged_files(deployed, file):
    refused, count = fuzz(deployed, file, 300)
    assert refused > 0.95 * count


@pytest.mark.slow
def test_thousands_of_damaged_files(deployed, file):
    refused, count = fuzz(deployed, file, 10_000)
    assert refused > 0.95 * count


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every container in the data with every key into it."""
    found = []
    for key in data if isinstance(data, dict) else range(len(data)):
        found.append((data, key))
        if isinstance(data[key], dict | list):
            found += places(data[key])
    return found


def tampered(description: dict[str, Any], random_: random.Random) -> None:
    odd = [None, -1, 10**30, 0.5, "", "x", "__class__", [], {}, True, {"tuple": [1]}, ["a", 3]]
    for _ in range(random_.choice([1, 1, 2, 5])):
        container, key = random_.choice(places(description))
        match random_.randrange(4):
            case 0:
                del container[key]
            case 1:
                container[key] = random_.choice(odd)
            case 2:
                container[key] = copy.deepcopy(random_.choice(places(description))[0])
            case 3 if isinstance(container, list):
                container.insert(key, copy.deepcopy(random_.choice(container)))


def fuzz_description(file: Path, count: int) -> int:
    content, random_, refused = file.read_bytes(), random.Random(0), 0
    for _ in range(count):
        file.write_bytes(content)
        rewrite(file, lambda description: tampered(description, random_))
        try:
            assert isinstance(spre_fx.load(file), GraphModule)
        except FileError:
            refused += 1
    return refused


def test_a_description_by_other_hands_gives_that_error_and_no_other(file):
    assert fuzz_description(file, 300) > 150


@pytest.mark.slow
def test_thousands_of_descriptions_by_other_hands(file):
    assert fuzz_description(file, 10_000) > 5_000


def node(description: dict[str, Any], op: str) -> list[Any]:
    return next(node for node in description["graph"] if node[0] == op)


def set_target(op: str, target: str, args: list[Any] | None = None) -> Callable[..., None]:
    def change(description: dict[str, Any]) -> None:
        found = node(description, op)
        found[2] = target
        found[3] = found[3] if args is None else args

    return change


def set_name(name: str) -> Callable[..., None]:
    return lambda description: node(description, "placeholder").__setitem__(1, name)


BAIT = "x=open('taken', 'w')"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            set_target("call_function", "os.system", ["touch taken"]),
            r"call_function of 'os\.system'",
        ),
        (
            set_target("call_function", "torch.load"),
            r"call_function of 'torch\.load', which is not",
        ),
        (set_target("call_function", "builtins.eval"), r"call_function of 'builtins\.eval'"),
        (set_target("call_function", "operator.attrgetter"), r"'operator\.attrgetter'"),
        (set_target("call_function", "torch.ops.load_library"), r"'torch\.ops\.load_library'"),
        (
            set_target("call_function", "builtins.getattr", [{"node": 0}, "__class__"]),
            r"getattr\(\.\.\., \('__class__',\)\)\", which is not known",
        ),
        (
            set_target("call_method", "__reduce__"),
            r"call_method of '__reduce__', which is not known",
        ),
        (set_target("call_method", "apply_"), r"call_method of 'apply_', which is not known"),
        (set_target("call_method", f"relu({BAIT})"), r"call_method of \"relu\("),
        (set_target("call_module", f'a", {BAIT})'), r"call_module of 'a"),
        (set_target("call_module", "fc.weight"), r"a call of 'fc\.weight', which is no layer"),
        (set_target("placeholder", BAIT), r"placeholder of \"x=open"),
        (set_target("output", "exit"), r"output of 'exit', which is not known"),
        (set_name(BAIT), r"a name \"x=open\('taken', 'w'\)\""),
        (lambda d: node(d, "call_module").__setitem__(4, {BAIT: 1}), r"a name \"x=open"),
        (lambda d: d.update(name=BAIT), r"a model called \"x=open"),
        (lambda d: d["modules"].append([f'"{BAIT}', None]), r"a module called '\"x=open"),
        (lambda d: d["modules"][0][1].update(type="Sequential"), r"a layer 'Sequential'"),
        (
            lambda d: d["modules"][0][1]["options"].update(device="cuda"),
            r"Conv2d with unknown options \['device'\]",
        ),
        (
            lambda d: d["modules"][0][1]["options"].update(in_channels=10**12, groups=10**12),
            r"conv1\.weight of shape \(8, 8, 3, 3\) in a layer that takes \(8, 1, 3, 3\)|cannot be",
        ),
        (
            lambda d: d["tensors"]["conv1.weight"].update(shape=[10**9, 10**9, 3, 3]),
            r"expected \d+ values and \d+ bytes of indices",
        ),
        (
            lambda d: d["tensors"]["fc.bias"].update(strides=[10**15]),
            r"fc\.bias with strides \[1000000000000000\], which shape \(5,\) lacks",
        ),
        (
            lambda d: d["tensors"]["fc.bias"].update(dtype="int64"),
            r"fc\.bias of torch\.float32 and shape \(5,\) where int64 and \(5,\) was announced",
        ),
        (
            lambda d: d["tensors"].update({"fc.none": {"sha256": {}, "same": "fc.nil"}}),
            r"one that cannot be followed \(KeyError: 'fc\.nil'\)",
        ),
        (
            lambda d: d["graph"].insert(0, ["placeholder", "z", "x", [], {}]),
            r"a graph with inputs \['x', 'x'\], not each of a name of its own",
        ),
        (lambda d: d["graph"].pop(), r"a graph whose output is not its last node"),
        (
            lambda d: d["records"].update({"conv1": {"dict": [["pattern", 3]]}}),
            r"conv1: a record \{'pattern': 3\}, which is not text",
        ),
        (lambda d: d.update(tensors=[]), r"expected a checksum of every tensor, found none"),
        (
            lambda d: d["modules"].append(["more", {"type": "Linear", "options": OPTIONS}]),
            r"no values for more\.weight",
        ),
        (
            lambda d: d["graph"].insert(0, ["get_attr", "g", "conv1", [], {}]),
            r"a use of 'conv1', which is no tensor|cannot be followed",
        ),
    ],
)
def test_what_a_file_may_not_say(change, words, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rewrite(file, change)
    with pytest.raises(FileError, match=words):
        spre_fx.load(file)
    assert not (tmp_path / "taken").exists()


OPTIONS = {"in_features": 10**7, "out_features": 10**7}


def test_nothing_is_pickled(file, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    for module, name in ((torch, "load"), (torch, "save")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr("pickle.Unpickler", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    spre_fx.load(file)
    assert b"pickle" not in file.read_bytes()


def test_a_failing_save_leaves_the_old_file(deployed, file, monkeypatch):
    before = file.read_bytes()
    randomise(deployed)
    deployed.conv1.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError):
        spre_fx.save(deployed, file)
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_input_is_not_changed(deployed, tmp_path):
    before = io.BytesIO()
    torch.save(deployed, before)
    spre_fx.save(deployed, tmp_path / "model")
    after = io.BytesIO()
    torch.save(deployed, after)
    assert before.getvalue() == after.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "densenet121", "swin_t", "vit_b_16"])
def test_torchvision_models_come_back(name, tmp_path):
    import torchvision

    deployed = deploy(torchvision.models.get_model(name).eval(), "1:16")
    saved = spre_fx.save(deployed, tmp_path / "model")
    loaded = spre_fx.load(tmp_path / "model")
    assert_same_model(loaded, deployed)
    x = torch.randn(1, 3, 224, 224)
    assert all(map(torch.equal, outputs(loaded, x), outputs(deployed, x)))
    packed = sum(line.dense for line in saved.lines)
    assert saved.size < packed / 16 * (1 + 4 / 32) * 1.001 + saved.other + 400_000
