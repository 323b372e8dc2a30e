"""ComputeSparsely: which convs it marks, and that training computes what it does without it."""

import copy
import io
import itertools
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import chain, reasons
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

import spre_fx
from spre_fx import SRSTE, CubicRamp, OptionError, Pattern, SpRe, engine
from spre_fx.masked_conv import Pass, SparseCompute, sparse_passes
from spre_fx.modules import NMConv2d, SpReConv2d
from spre_fx.native_conv import Geometry, kept_by
from spre_fx.passes import ComputeSparsely, Policy, trace, training_pipeline

needs_engine = pytest.mark.skipif(engine.load() is None, reason="needs the engine")

LAST = torch.channels_last
METHODS: dict[str, dict[str, Any]] = {
    "sr-ste": {},
    "asp": {"method": "asp"},
    "lbc": {"method": "lbc", "schedule": CubicRamp(1, 3)},
    "gmp": {"method": "gmp", "schedule": CubicRamp(1, 3)},
    "straight through": {"branch": SpRe(straight_through=True)},
}
GRADUAL = ("lbc", "gmp")  # which keep all weights at first
PATTERNS = ("2:4", "1:4", "1:8", "1:16")
BRANCHES = (None, "spre", "same", "inverse")
BRANCHES_OF: dict[str, tuple[str | None, ...]] = {"straight through": ("spre",), "gmp": (None,)}
QUICK = [("2:4", "spre"), ("1:4", None), ("1:8", "same"), ("1:16", "inverse")]


class Block(nn.Module):
    """A residual block, of another size or not."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.shortcut = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


def net() -> nn.Sequential:
    """A small ResNet, whose first conv has too few channels for any pattern."""
    layers = [nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    layers += [Block(32, 32, 1), Block(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 5))


def prepared(compute: str, pattern: str = "1:4", **options: Any) -> GraphModule:
    torch.manual_seed(0)
    dtype = options.pop("dtype", torch.float64)
    return spre_fx.prepare(net().to(dtype), pattern, compute=compute, **options)


def images(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 3, 7, 7, generator=generator, dtype=torch.float64).to(dtype)


class Calls(TorchDispatchMode):
    """Counts what the engine's kernels are called for, by pass."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.spre_fx.masked_conv.default:
            self.count["forward"] += Pass.FORWARD in sparse_passes(kept_by(args[2]), args[-3])
        if func is torch.ops.spre_fx.masked_conv_backward.default:
            most_kept, *_, (of_x, of_weight) = args[-4:]
            sparse = sparse_passes(kept_by(args[3]), most_kept)
            self.count["input"] += of_x and Pass.INPUT_GRADIENT in sparse
            self.count["weight"] += of_weight and Pass.WEIGHT_GRADIENT in sparse
        return func(*args, **(kwargs or {}))


def step(model: nn.Module, x: Tensor) -> Tensor:
    """Forward and backward; the output."""
    model.zero_grad()
    y: Tensor = model(x)
    (y - 1).square().mean().backward()
    return y.detach()


def assert_same_step(ours: nn.Module, theirs: nn.Module, x: Tensor, tolerance: float) -> None:
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(step(ours, x), step(theirs, x), **close)
    expected = dict(theirs.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, **close)


def cases() -> Iterator[Any]:
    """Options of `prepare`; all but some are slow."""
    for name, pattern, branch in itertools.product(METHODS, PATTERNS, BRANCHES):
        options = {"pattern": pattern, "branch": branch} | METHODS[name]
        quick = (pattern, branch) in QUICK and name in ("sr-ste", "asp")
        quick |= (pattern, branch) == ("1:4", "spre") or (name, pattern) == ("gmp", "1:4")
        if branch in BRANCHES_OF.get(name, BRANCHES):
            marks = () if quick else pytest.mark.slow
            yield pytest.param(options, id=f"{name}, {pattern}, {branch}", marks=marks)


def assert_many_calls(calls: Calls, *, of_weight: bool) -> None:
    assert calls.count["forward"] >= 3
    assert calls.count["input"] >= 3
    assert bool(calls.count["weight"]) is of_weight


@needs_engine
@pytest.mark.parametrize("options", list(cases()))
def test_training_is_that_of_dense_convs(options: dict[str, Any]) -> None:
    sparse, dense = (prepared(compute, **options) for compute in ("auto", "dense"))
    with Calls() as calls:
        assert_same_step(sparse, dense, images(), 1e-10)
    name = options.get("method")
    if name not in GRADUAL:
        assert_many_calls(calls, of_weight=name == "asp" or options["branch"] in BRANCHES[1:])
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (sparse, dense)]
    for seed in range(4):
        with Calls() as calls:
            assert_same_step(sparse, dense, images(seed=seed), 1e-8)
        for optimizer in optimizers:
            optimizer.step()
    if name in GRADUAL:  # only now
        assert_many_calls(calls, of_weight=True)
    state = dense.state_dict()
    for name, value in sparse.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-8, atol=1e-8)
    for model in (sparse, dense):
        model.eval()
    torch.testing.assert_close(sparse(images()), dense(images()), rtol=1e-8, atol=1e-8)
    deployed = spre_fx.finalize(sparse, backend="dense")
    torch.testing.assert_close(deployed(images()), sparse(images()), rtol=1e-9, atol=1e-9)


@needs_engine
@pytest.mark.parametrize("of_images", [torch.contiguous_format, LAST], ids=str)
@pytest.mark.parametrize("of_weights", [torch.contiguous_format, LAST], ids=str)
def test_memory_formats_are_kept_and_change_no_number(
    of_images: torch.memory_format, of_weights: torch.memory_format
) -> None:
    sparse = prepared("auto").to(memory_format=of_weights)
    x = images().to(memory_format=of_images)
    with Calls() as calls:
        assert_same_step(sparse, prepared("dense"), x, 1e-10)
    assert calls.count["forward"] >= 4
    for parameter in sparse.parameters():
        if parameter.dim() == 4:
            assert parameter.grad is not None
            assert parameter.grad.stride() == parameter.stride()


@needs_engine
@pytest.mark.parametrize(
    ("method", "backend", "dynamic"),
    [
        ("sr-ste", "aot_eager", None),
        *(
            pytest.param(method, backend, dynamic, marks=pytest.mark.slow)
            for method, backend, dynamic in (
                ("asp", "aot_eager", None),
                ("sr-ste", "aot_eager", True),
                ("asp", "aot_eager", True),
                ("sr-ste", "inductor", None),
                ("asp", "inductor", None),
            )
        ),
    ],
)
def test_compiled_whole_it_trains_as_dense_convs_do(
    method: str, backend: str, dynamic: bool | None
) -> None:
    torch._dynamo.reset()
    sparse, dense = (prepared(compute, method=method) for compute in ("auto", "dense"))
    sparse, dense = (m.to(memory_format=LAST) for m in (sparse, dense))
    compiled = torch.compile(sparse, backend=backend, fullgraph=True, dynamic=dynamic)
    for x in (images(), images(seed=1), images(seed=2)[:8] if dynamic else images(seed=2)):
        close = {"rtol": 1e-9, "atol": 1e-9}
        torch.testing.assert_close(step(compiled, x), step(dense, x), **close)
        for ours, theirs in zip(sparse.parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, **close)
    with torch.profiler.profile() as profile:
        step(compiled, images(seed=3))
    names = [event.name for event in profile.events()]
    assert names.count("spre_fx::masked_conv") >= 4
    assert names.count("spre_fx::masked_conv_backward") >= 4


@needs_engine
def test_under_autocast_it_computes_as_it_did() -> None:
    sparse, dense = (prepared(compute, dtype=torch.float32) for compute in ("auto", "dense"))
    with torch.autocast("cpu", torch.bfloat16), Calls() as calls:
        assert_same_step(sparse, dense, images(torch.float32), 0)
    assert not calls.count
    with Calls() as calls:
        assert_same_step(sparse, dense, images(torch.float32), 2e-4)
    assert calls.count["forward"] >= 4


@needs_engine
def test_a_model_in_bfloat16_computes_as_it_did() -> None:
    sparse, dense = (prepared(compute, dtype=torch.bfloat16) for compute in ("auto", "dense"))
    with Calls() as calls:
        assert_same_step(sparse, dense, images(torch.bfloat16), 0)
    assert not calls.count


@needs_engine
def test_images_that_do_not_fit_are_refused_in_the_words_of_torch() -> None:
    model = prepared("auto").get_submodule("3.conv2")
    assert isinstance(model, NMConv2d)
    with pytest.raises(RuntimeError, match="to have 32 channels, but got 24 channels"):
        model(torch.randn(16, 24, 7, 7, dtype=torch.float64))
    y, *_ = model(torch.randn(32, 7, 7, dtype=torch.float64))
    assert y.shape == (32, 7, 7)


def pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def marks(model: nn.Module) -> dict[str, SparseCompute]:
    found = {n: m.sparse for n, m in model.named_modules() if isinstance(m, NMConv2d | SpReConv2d)}
    return {name: each for name, each in found.items() if each is not None}


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled, saved])
def test_copies_and_pickles_keep_what_is_marked(clone: Callable[[nn.Module], Any]) -> None:
    model = prepared("auto")
    twin = clone(model)
    assert marks(twin) == marks(model)
    assert len(marks(model)) == 5 + 4
    assert_same_step(twin, model, images(), 0)


def test_checkpoints_know_nothing_of_it() -> None:
    sparse, dense = prepared("auto"), prepared("dense")
    assert sparse.state_dict().keys() == dense.state_dict().keys()
    step(dense, images())
    torch.optim.SGD(dense.parameters(), 0.1).step()
    sparse.load_state_dict(dense.state_dict())
    assert len(marks(sparse)) == 5 + 4
    assert_same_step(sparse, dense, images(), 1e-10)
    dense.load_state_dict(sparse.state_dict())
    assert not marks(dense)


def test_the_default_is_auto_and_nothing_else_is_an_option() -> None:
    assert marks(spre_fx.prepare(net(), "1:4")) == marks(prepared("auto"))
    assert not marks(spre_fx.prepare(net(), "1:4", compute="dense"))
    with pytest.raises(OptionError, match=r"expected compute=.* found 'sparse'"):
        spre_fx.prepare(net(), "1:4", compute="sparse")  # type: ignore[arg-type]


def wired(model: nn.Module, pattern: str = "1:4", **options: Any) -> GraphModule:
    method = options.pop("method", SRSTE())
    policy = Policy(Pattern.parse(pattern), **options)
    branch = SpRe()
    pipeline = training_pipeline(policy, method, method.schedule, branch=branch, gamma=1.0)
    return pipeline(trace(model))[0]


def test_each_branch_is_told_its_geometry_density_and_gradient() -> None:
    conv = nn.Conv2d(8, 6, (3, 1), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
    gm = ComputeSparsely()(wired(chain(conv=conv, bn=nn.BatchNorm2d(6)), "1:4")).graph_module
    geometry = Geometry([2, 1], [1, 0], [1, 2], 2)
    assert marks(gm) == {
        "conv": SparseCompute(geometry, 0.25, False),
        "conv_spre": SparseCompute(geometry, 0.25, True),
    }


def test_what_is_not_marked_says_why() -> None:
    model = chain(
        stem=nn.Conv2d(3, 8, 3, padding=1),
        conv=nn.Conv2d(8, 8, 3, padding=1),
        bn=nn.BatchNorm2d(8),
        point=nn.Conv2d(8, 8, 1),
        depth=nn.Conv2d(8, 8, 3, padding=1, groups=8),
        reflect=nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        same=nn.Conv2d(8, 8, 3, padding="same"),
        flat=nn.Flatten(2),
        line=nn.Conv1d(8, 8, 3),
        back=nn.ConvTranspose1d(8, 8, 3),
        fc=nn.Linear(36, 8),
    )
    result = ComputeSparsely()(wired(model))
    assert result.account.applied == ("conv", "point")
    assert reasons(result) == {
        **{
            name: f"not sparse: {name}: expected a masked Conv2d, found {found}"
            for name, found in {
                **dict.fromkeys(("stem", "depth"), "Conv2d"),
                **{"line": "NMConv1d", "back": "ConvTranspose1d", "fc": "NMLinear"},
            }.items()
        },
        "reflect": "refused by the backend: reflect: padding=(1, 1), padding_mode='reflect'",
        "same": "refused by the backend: same: padding='same', padding_mode='zeros'",
    }
    assert marks(result.graph_module).keys() == {"conv", "conv_spre", "point"}


def test_a_layer_says_that_it_is_marked() -> None:
    assert "compute=sparse" in repr(prepared("auto").get_submodule("3.conv1"))
    assert "compute=sparse" not in repr(prepared("dense"))
