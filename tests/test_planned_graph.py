"""Planned graphs compute what their graphs do: networks of every kind, and every other use."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import randomise
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import spre_fx
from spre_fx import engine
from spre_fx.packed_layers import PackedConv2d, PackedLinear
from spre_fx.passes import FuseEpilogues, trace
from spre_fx.passes.edit import replace_module
from spre_fx.passes.planned_graph import PlannedGraphModule, planned
from spre_fx.winograd_filters import winograd_refusal

pytestmark = pytest.mark.skipif(engine.load() is None, reason="needs the engine")


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class ResNet(nn.Module):
    """A stem, max pooling, two residual blocks and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = conv(3, 24, 7, stride=2), nn.MaxPool2d(3, 2, 1)
        self.a1, self.a2 = conv(24, 24), conv(24, 24)
        self.b1, self.b2, self.down = (
            conv(24, 40, stride=2),
            conv(40, 40),
            conv(24, 40, 1, stride=2),
        )
        self.average, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(40, 7)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.stem(x)))
        x = self.relu(self.a2(self.relu(self.a1(x))) + x)
        out = self.b2(self.relu(self.b1(x)))
        x = self.relu(out + self.down(x))
        return self.fc(torch.flatten(self.average(x), 1))


class MobileNet(nn.Module):
    """Inverted residuals with depthwise convs, hardswish and squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 16, stride=2), nn.Hardswish())
        self.expand = nn.Sequential(conv(16, 56, 1), nn.ReLU6())
        self.depthwise = nn.Sequential(conv(56, 56, groups=56), nn.ReLU6())
        self.squeeze, self.excite = conv(56, 8, 1), conv(8, 56, 1)
        self.project = conv(56, 16, 1)
        self.strided = conv(16, 16, 5, stride=2, groups=16)
        self.drop, self.fc = nn.Dropout(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(self.expand(x))
        scale = F.adaptive_avg_pool2d(y, 1)
        y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(scale))))
        x = F.silu(self.strided(x + self.project(y)))
        return self.fc(self.drop(x.mean([2, 3])))


class DenseNet(nn.Module):
    """Batch norms before convs, and concatenations of all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + 12 * i) for i in range(4))
        self.convs = nn.ModuleList(conv(16 + 12 * i, 12) for i in range(3))
        self.transition, self.pool = conv(52, 20, 1), nn.AvgPool2d(2)
        self.branch, self.fc = conv(20, 9, 1), nn.Linear(29, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, layer in zip(self.norms, self.convs, strict=False):
            features.append(layer(F.relu(norm(torch.cat(features, 1)))))
        x = self.pool(self.transition(F.relu(self.norms[3](torch.cat(features, 1)))))
        x = torch.cat([self.branch(x), x], 1)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class Odd(nn.Module):
    """Several outputs, values used twice, what only torch runs, views and in-place operations."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = conv(8, 20), conv(20, 20), conv(20, 12, 1)
        self.norm = nn.GroupNorm(4, 20)

    def forward(self, x: Tensor, scale: float = 2.0) -> Any:
        a = self.one(x)
        b, c = self.norm(self.two(a)).chunk(2, dim=1)
        d = torch.cat([b, a, c, x], 1)
        e = self.three(self.two(a) * scale)
        f = a.reshape(a.size(0), -1).sum(1)
        a = a.mul_(0.5)
        return {"a": a, "list": [d, e], "f": f}, (e.relu(), x.shape[2], None)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (ResNet, (2, 3, 40, 40)),
    "mobilenet": (MobileNet, (2, 3, 24, 24)),
    "densenet": (DenseNet, (2, 3, 12, 12)),
    "odd": (Odd, (2, 8, 9, 7)),
}
over_models = pytest.mark.parametrize(("build", "shape"), MODELS.values(), ids=MODELS)


def graph_of(model: nn.Module, winograd: int = 0, *, planar: bool = False) -> GraphModule:
    """The fused graph of a model, with convs and linears of 8 inputs and more packed."""
    torch.manual_seed(0)
    graph_module = trace(randomise(model).eval())
    for name, layer in list(graph_module.named_modules()):
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels >= 8:
            side = winograd if winograd_refusal(layer) is None else 0
            packed = PackedConv2d.from_dense(layer, winograd=side, planar=planar)
            replace_module(graph_module, name, packed)
        elif isinstance(layer, nn.Linear):
            replace_module(graph_module, name, PackedLinear.from_dense(layer))
    return FuseEpilogues()(graph_module.requires_grad_(False)).graph_module


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, check_stride=False)


@over_models
def test_a_program_computes_what_its_graph_does(
    build: type[nn.Module], shape: tuple[int, ...]
) -> None:
    gm = graph_of(build())
    program = planned(copy.deepcopy(gm))
    assert isinstance(program, PlannedGraphModule)
    for sizes in (shape, (1, *shape[1:]), (3, shape[1], shape[2] + 8, shape[3] + 4), shape):
        x = torch.randn(sizes)
        for layout in (torch.contiguous_format, torch.channels_last):
            given = x.to(memory_format=layout)
            before = given.clone()
            assert_same(program(given), gm(x.clone()))
            assert program.why_not == ""
            assert torch.equal(given, before)


@over_models
def test_a_program_agrees_with_float64(build: type[nn.Module], shape: tuple[int, ...]) -> None:
    gm = graph_of(build())
    x = torch.randn(shape)
    exact = spre_fx.to_dense(gm).double()(x.double())
    found = planned(gm)(x)
    leaves = torch.utils._pytree.tree_leaves
    for one, other in zip(leaves(found), leaves(exact), strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@over_models
@pytest.mark.parametrize("side", [2, 4])
def test_programs_with_winograds_filtering_agree_with_float64(
    build: type[nn.Module], shape: tuple[int, ...], side: int
) -> None:
    gm = graph_of(build(), side)
    x = torch.randn(shape)
    exact = spre_fx.to_dense(gm).double()(x.double())
    program = planned(gm)
    found = program(x)
    leaves = torch.utils._pytree.tree_leaves
    for one, other in zip(leaves(found), leaves(exact), strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    kinds = {row.kind.partition(" + ")[0] for row in program.plan(x).rows}
    assert ("winograd conv" in kinds) is (build is not MobileNet)


def test_programs_see_new_weights_behind_transformed_filters() -> None:
    program, x = planned(graph_of(ResNet(), 4)), torch.randn(1, 3, 40, 40)
    before = program(x)
    filters = {id(layer.step_weight()) for layer in program.modules() if has_filters(layer)}
    program(x[:, :, :32])  # another program reads the same
    again = {id(layer.step_weight()) for layer in program.modules() if has_filters(layer)}
    assert len(filters) == 3
    assert again == filters
    state = {name: value.clone() for name, value in program.state_dict().items()}
    with torch.no_grad():
        program.a1.packed[..., 0, :] = 0  # the values, not the channels
    changed = program(x)
    assert program.why_not == ""
    assert not torch.equal(changed, before)
    assert_same(changed, spre_fx.to_dense(program)(x))
    program.load_state_dict(state)
    assert torch.equal(program(x), before)


def test_copies_made_for_inference_see_new_weights_too() -> None:
    program, x = planned(graph_of(ResNet(), 4)), torch.randn(1, 3, 40, 40)
    with torch.inference_mode():
        copied = copy.deepcopy(program)
        assert_same(copied(x), program(x))
        for name, tensor in copied.named_buffers():
            if name.endswith("packed"):
                tensor[..., 0, :] = 0
        assert_same(copied(x), spre_fx.to_dense(copied)(x))
        assert copied.why_not == ""


def has_filters(layer: nn.Module) -> bool:
    return isinstance(layer, PackedConv2d) and layer.winograd > 0


def test_a_residual_network_is_one_call_of_the_engine_in_little_memory() -> None:
    program = planned(graph_of(ResNet()))
    plan = program.plan(torch.randn(2, 3, 40, 40))
    assert plan.engine_calls == 1
    assert {row.kind for row in plan.rows} == {
        "dense conv + relu",
        "max pool",
        "sparse conv",
        "sparse conv + relu",
        "sparse conv + residual + relu",
        "average pool",
    }
    assert plan.arena < 0.65 * plan.activations
    assert "1 call of the engine" in str(plan)


def test_concatenations_are_written_in_place() -> None:
    plan = planned(graph_of(DenseNet())).plan(torch.randn(2, 3, 12, 12))
    assert plan.engine_calls == 1
    kinds = [row.kind for row in plan.rows]
    assert kinds.count("affine + relu") == 4
    assert "copy" not in kinds


X = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def resnet() -> tuple[PlannedGraphModule, Tensor]:
    """A planned network and what its graph makes of X."""
    gm = graph_of(ResNet())
    return planned(copy.deepcopy(gm)), gm(X)


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), saved]
)
@pytest.mark.parametrize("ran", [False, True])
def test_copies_run_as_programs_of_their_own(
    resnet: Any, copied: Callable[[nn.Module], nn.Module], ran: bool
) -> None:
    model, expected = resnet
    if ran:
        model(X)
    again = copied(model)
    assert isinstance(again, PlannedGraphModule)
    assert_same(again(X), expected)
    assert again.why_not == ""
    assert type(again).__name__ == type(model).__name__
    assert again.state_dict().keys() == model.state_dict().keys()


def test_new_weights_are_seen(resnet: Any) -> None:
    model, _ = resnet
    model(X)
    torch.manual_seed(5)
    other = graph_of(ResNet())
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(0.5)
    model.load_state_dict(other.state_dict())
    assert_same(model(X), other(X))
    model.stem.weight.data = torch.zeros_like(model.stem.weight)  # the stem's layout is our own
    other.stem.weight.data = torch.zeros_like(other.stem.weight)
    assert_same(model(X), other(X))
    assert model.why_not == ""


def test_exchanged_modules_are_seen(resnet: Any) -> None:
    model, _ = resnet
    model(X)
    model.fc = nn.Linear(40, 3).requires_grad_(False)
    assert model(X).shape == (2, 3)


def test_an_edited_graph_is_planned_anew(resnet: Any) -> None:
    model, expected = resnet
    model(X)
    (result,) = model.graph.output_node().args
    with model.graph.inserting_before(model.graph.output_node()):
        model.graph.output_node().args = (model.graph.call_function(torch.neg, (result,)),)
    model.recompile()
    assert_same(model(X), -expected)


def test_threads_at_the_same_time_do_not_meet(resnet: Any) -> None:
    model, _ = resnet
    inputs = [torch.randn(2, 3, 40, 40) for _ in range(4)]
    expected = [model(x) for x in inputs]
    wrong: list[int] = []

    def repeat(index: int) -> None:
        for _ in range(20):
            if not torch.equal(model(inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=repeat, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_threads(resnet: Any, count: int) -> None:
    model, expected = resnet
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        assert_same(model(X), expected)
    finally:
        torch.set_num_threads(before)


@over_models
def test_outputs_are_tensors_of_their_own(build: type[nn.Module], shape: tuple[int, ...]) -> None:
    model = planned(graph_of(build()))
    x = torch.randn(shape)
    first = model(x)
    kept = copy.deepcopy(first)
    model(torch.randn(shape))
    leaves = torch.utils._pytree.tree_leaves
    for one, other in zip(leaves(first), leaves(kept), strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one, other)


def test_inference_mode_and_plain_calls_share_programs(resnet: Any) -> None:
    model, expected = resnet
    with torch.inference_mode():
        assert_same(model(X), expected)
    assert_same(model(X), expected)
    assert_same(model(x=X), expected)
    assert len(model._runs.programs) == 1


def test_only_so_many_programs_are_kept(resnet: Any) -> None:
    model, _ = resnet
    for side in range(24, 44):
        model(torch.randn(1, 3, side, side))
    assert len(model._runs.programs) == 8


def hook(model: nn.Module) -> None:
    model.a1.register_forward_hook(lambda *_: None)


ASIDE: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "hooks": (hook, "modules in it have hooks"),
    "training": (lambda model: model.train(), "it is in training mode"),
    "gradients": (lambda model: model.stem.requires_grad_(), "gradients are asked for"),
}


@pytest.mark.parametrize(("change", "why"), ASIDE.values(), ids=ASIDE)
def test_where_more_than_the_result_counts_the_graph_runs(
    resnet: Any, change: Callable[[nn.Module], Any], why: str
) -> None:
    model, expected = resnet
    change(model)
    assert_same(model(X).detach(), expected)
    assert model.why_not == why
    assert model.plan(X) == f"runs as a graph: {why}." or why == "gradients are asked for"


def test_autocast_and_modes_run_the_graph(resnet: Any) -> None:
    model, expected = resnet
    fake = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        assert model(fake.from_tensor(X)).shape == expected.shape
    assert model.why_not == "a mode of torch looks at every operation"


def under_autocast(model: nn.Module) -> None:
    """A call that fails in the graph: packed layers take one type."""
    with torch.autocast("cpu"), pytest.raises(spre_fx.ModelError, match=r"found torch.bfloat16"):
        model(X)


CALLS: dict[str, tuple[Callable[[Any], object], str]] = {
    "autocast": (under_autocast, "autocast chooses types"),
    "vmap": (
        lambda model: torch.func.vmap(model)(X[None]),
        "a transform of torch.func is at work",
    ),
    "jit": (
        lambda model: torch.jit.trace(model, X, check_trace=False),
        "torch.jit traces it",
    ),
    "subclass": (
        lambda model: model(X.as_subclass(type("Own", (Tensor,), {}))),
        "an input is a Own",
    ),
    "nowhere": (
        lambda model: model.to("meta")(X.to("meta")),
        "an input is torch.strided on meta",
    ),
    "empty": (lambda model: model(X[:0]), "an input is empty"),
}


@pytest.mark.parametrize(("call", "why"), CALLS.values(), ids=CALLS)
@pytest.mark.filterwarnings("ignore")  # torch.jit is on its way out, and vmap is slow
def test_other_calls_run_the_graph(resnet: Any, call: Callable[[Any], object], why: str) -> None:
    model, _ = resnet
    call(model)
    assert model.why_not == why


def test_a_call_that_fails_says_only_what_is_wrong() -> None:
    with pytest.raises(spre_fx.ModelError) as error:
        planned(graph_of(nn.Sequential(conv(8, 8))))(torch.ones(1, 9, 3, 3))
    assert str(error.value) == "expected an input of shape (N, 8, H, W), found (1, 9, 3, 3)."


def test_a_gradient_of_the_input_is_refused_in_words(resnet: Any) -> None:
    model, expected = resnet
    result = model(X.clone().requires_grad_())
    assert model.why_not == "gradients are asked for"
    assert_same(result.detach(), expected)
    with pytest.raises(spre_fx.ModelError, match="computes no gradients"):
        result.sum().backward()


def test_it_is_traced_exported_and_compiled_as_the_graph_it_is(resnet: Any) -> None:
    model, expected = resnet
    traced = torch.fx.symbolic_trace(model)
    assert_same(traced(X), expected)
    program = torch.export.export(model, (X,))
    assert_same(program.module()(X), expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(compiled(X), expected)


class Boxes(nn.Module):
    """A layer on as many rows as there are positive numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x[x[:, 0] > 0]).relu()


def test_shapes_that_depend_on_numbers_run_the_graph() -> None:
    gm = graph_of(Boxes())
    model = planned(copy.deepcopy(gm))
    for _ in range(4):
        x = torch.randn(9, 16)
        assert_same(model(x), gm(x))
    assert model.why_not == "shapes on the way depend on the numbers of the input"


def test_writing_over_a_view_runs_the_graph() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y[:, 0].mul_(2)
            return y + 1

    gm = graph_of(Writes())
    x = torch.randn(1, 8, 5, 5)
    assert_same(planned(copy.deepcopy(gm))(x), gm(x))
