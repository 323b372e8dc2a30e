"""The tracer: what survives, both modes in one graph, and errors that say where."""

import copy
import inspect
import io
import pickle
from collections import namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from models import (
    MODELS,
    AuxiliaryHead,
    ControlFlow,
    FunctionalDropout,
    Inner,
    Model,
    Never,
    Residual,
    SamePadding,
    TiedConvs,
    assert_same,
    chain,
    conv_bn,
    kinds,
    model_of,
    run,
)
from torch import Tensor, nn

from spre_fx import ModelError, TraceError
from spre_fx.passes import Tracer, trace

Heads = namedtuple("Heads", ["logits", "extra"])


def nested_outputs(model: Model, x: Tensor) -> dict[str, Any]:
    y = model.conv1(x)
    if model.training:
        return {"heads": Heads(model.conv2(y), [y, y + 1]), "loss": (y.mean(),)}
    return {"heads": Heads(y.sigmoid(), [y, y - 1]), "loss": (y.sum(),)}


def constants_by_mode(model: Model, x: Tensor) -> Tensor:
    y = model.conv1(x) * (2 if model.training else 3)
    y = F.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=model.training)
    y = F.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=not model.training)
    return F.max_pool2d(y, 2 if model.training else 3).flatten(1, 2 if model.training else -1)


def evaluation_behind_in_place(model: Model, x: Tensor) -> Tensor:
    y = model.conv1(x)
    y.relu_()
    return y if model.training else y.exp()


def erased_in_training(model: Model, x: Tensor) -> Tensor:
    y = model.conv1(x)
    if model.training:
        y[:, 0].zero_()
    return y


BODIES: dict[str, Callable[[Any, Tensor], Any]] = {
    "nested outputs": nested_outputs,
    "constants": constants_by_mode,
    "evaluation behind in-place": evaluation_behind_in_place,
    "other keys": lambda m, x: {"y": m.conv1(x)} | ({"z": m.conv2(x)} if m.training else {}),
    "named tuple": lambda m, x: Heads(m.conv1(x), m.bn2(x)) if m.training else m.conv1(x),
    "extra call": lambda m, x: m.conv1(m.conv1(x.neg()) if m.training else x) + m.conv1(x),
    "slices": lambda m, x: m.conv1(x)[:, : x.shape[1] // 2] + (0 if m.training else 1),
}
BUILDERS = MODELS | {name: model_of("ByMode", body) for name, body in BODIES.items()}


def assert_same_in_both_modes(traced: nn.Module, model: nn.Module, x: Tensor) -> None:
    """Outputs, and what a forward leaves in the state; unused state is another test's."""
    for training in True, False:
        ours, theirs = run(traced, x, training=training), run(model, x, training=training)
        assert [k for k in ours if "output" in k] == [k for k in theirs if "output" in k]
        both = ours.keys() & theirs.keys()
        assert_same({key: ours[key] for key in both}, {key: theirs[key] for key in both})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_a_trace_computes_what_the_model_computes_in_both_modes(
    build: Callable[[], nn.Module], training: bool
) -> None:
    model = build().train(training)
    assert_same_in_both_modes(trace(model), model, torch.randn(model.shape))


@pytest.mark.parametrize("name", ["googlenet", "efficientnet_b0"])
def test_torchvision_models_keep_their_outputs_in_both_modes(name: str) -> None:
    options = {} if name == "efficientnet_b0" else {"init_weights": False}
    model = torchvision.models.get_model(name, weights=None, num_classes=3, **options)
    assert_same_in_both_modes(trace(model), model, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize(
    "name", ["AuxiliaryHead", "FunctionalDropout", "DropPath", "nested outputs"]
)
def test_a_copied_or_pickled_trace_still_has_both_modes(name: str) -> None:
    traced = trace(BUILDERS[name]())
    saved = io.BytesIO()
    torch.save(traced, saved)
    saved.seek(0)
    copies = copy.deepcopy(traced), torch.load(saved, weights_only=False)
    x = torch.randn(2, 8, 6, 6)
    for training in True, False:
        expected = run(traced, x, training=training)
        for again in (*copies, pickle.loads(pickle.dumps(copies[1]))):
            assert_same(run(again, x, training=training), expected)
    train, evaluation = run(traced, x, training=True), run(traced, x, training=False)
    assert not torch.equal(train["output 0"], evaluation["output 0"])


def test_names_parameters_and_buffers_survive_as_copies() -> None:
    for model in Residual(), TiedConvs(), MODELS["Parametrised"]():
        traced = trace(model)
        assert_same(dict(traced.state_dict()), dict(model.state_dict()))
        ours = {tensor.data_ptr() for tensor in traced.state_dict().values()}
        assert ours.isdisjoint(tensor.data_ptr() for tensor in model.state_dict().values())
        assert dict(traced.named_parameters()).keys() == dict(model.named_parameters()).keys()


def test_only_what_the_forward_makes_no_use_of_is_left_out() -> None:
    model = Never()
    left_out = model.state_dict().keys() - trace(model).state_dict().keys()
    assert left_out == {"never.weight", "never.bias", "unused", "ticket"}


def test_a_module_called_on_other_values_in_evaluation_stays_one_call() -> None:
    model = model_of("Other", lambda m, x: m.conv1(x if m.training else x.exp()))()
    assert kinds(trace(model)) == ["placeholder", "exp", "TrainingSwitch", "Conv2d", "output"]


def test_requires_grad_hooks_and_attributes_survive() -> None:
    model = Model()
    model.conv1.weight.requires_grad_(False)
    model.conv1.note = "of the user"
    model.conv2.register_forward_hook(lambda _, __, output: 2 * output)
    traced = trace(model)
    assert [p.requires_grad for p in traced.parameters()] == [False] + [True] * 6
    assert traced.conv1.note == "of the user"
    assert_same_in_both_modes(traced, model, torch.randn(2, 8, 6, 6))


def test_a_module_put_in_evaluation_on_its_own_drops_nothing_out() -> None:
    model = chain(conv=nn.Conv2d(8, 8, 1), part=FunctionalDropout())
    model.part.eval()
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(trace(model)(x), model(x))


@pytest.mark.parametrize("training", [True, False])
def test_training_modes_survive_module_by_module(training: bool) -> None:
    model = AuxiliaryHead().train(training)
    model.bn1.train(not training)
    model.aux.drop.train(not training)
    traced = trace(model)
    assert traced.training is training
    expected = {name: module.training for name, module in model.named_modules()}
    found = {name: module.training for name, module in traced.named_modules()}
    assert {name: found[name] for name in expected} == expected
    assert {found[name] for name in found.keys() - expected.keys()} <= {training}


@pytest.mark.parametrize("build", [AuxiliaryHead, ControlFlow, Never])
def test_the_model_is_left_as_it_was_also_when_tracing_fails(build: type[Model]) -> None:
    model = build().train(False)
    model.bn1.train()

    def facts() -> list[tuple[object, ...]]:
        return [(name, m, type(m), m.training, set(vars(m))) for name, m in model.named_modules()]

    before, state = facts(), copy.deepcopy(dict(model.state_dict()))
    with pytest.raises(TraceError) if build is ControlFlow else nullcontext():
        trace(model)
    assert facts() == before
    assert_same(dict(model.state_dict()), state)


def test_convs_batch_norms_and_linears_of_any_class_stay_whole() -> None:
    build = MODELS["CustomForward"]
    assert kinds(trace(build()))[1:3] == ["Standardised", "BatchNorm2d"]
    frozen = chain(conv=nn.Conv2d(8, 8, 1), bn=torchvision.ops.FrozenBatchNorm2d(8))
    assert kinds(trace(frozen)) == ["placeholder", "Conv2d", "FrozenBatchNorm2d", "output"]


@pytest.mark.parametrize("leaf", ["inner", "inn*", Inner])
def test_modules_are_kept_whole_by_name_glob_and_type(leaf: str | type[nn.Module]) -> None:
    model = ControlFlow()
    traced = trace(model, [leaf])
    assert kinds(traced) == ["placeholder", "Conv2d", "BatchNorm2d", "Inner", "output"]
    x = torch.randn(2, 8, 6, 6)
    assert_same_in_both_modes(traced, model, x)
    assert Tracer([leaf]).is_leaf_module(model.inner, "inner")


def test_control_flow_is_an_error_with_module_and_line() -> None:
    with pytest.raises(TraceError) as error:
        trace(ControlFlow())
    lines, first = inspect.getsourcelines(Inner.forward)
    at = first + next(i for i, line in enumerate(lines) if "if x.mean()" in line)
    where = f"{inspect.getsourcefile(Inner)}:{at} `if x.mean() > 0:`"
    assert str(error.value).startswith(
        f"inner: expected a forward that torch.fx can follow, found at {where}: "
    )
    assert error.value.module == "inner"
    assert error.value.cause.startswith(where)


def test_control_flow_of_the_model_itself_is_not_blamed_on_a_module_inside() -> None:
    with pytest.raises(TraceError) as error:
        trace(model_of("Sudden", lambda m, x: x if m.conv1(x).sum() > 0 else -x)())
    assert str(error.value).startswith("Sudden: ")
    assert "if m.conv1(x).sum() > 0 else -x" in str(error.value)
    assert error.value.module == ""


def test_code_of_packages_whose_name_begins_with_torch_is_the_users() -> None:
    with pytest.raises(TraceError, match=r"torchvision.*rpn\.py:\d+ `for feature in x:`"):
        trace(torchvision.models.detection.rpn.RPNHead(8, 1))


@pytest.mark.parametrize(
    "body",
    [
        lambda model, x: model.conv1(x).mul_(3) if model.training else model.conv1(x),
        lambda model, x: model.conv1(x) if model.training else model.conv1(x).clamp_(0, 1),
        lambda model, x: F.elu(model.conv1(x), inplace=model.training),
        lambda model, x: F.elu(model.conv1(x), inplace=not model.training),
        lambda model, x: model.act(model.conv1(x)) if model.training else model.conv1(x),
        erased_in_training,
    ],
)
def test_an_in_place_change_in_one_mode_is_right_or_refused(
    body: Callable[[Model, Tensor], Tensor],
) -> None:
    model = model_of("InPlace", body)()
    model.act = nn.ELU(inplace=True)
    assert "in place" in refusal_of(model, default="right, so in place is no matter")


def refusal_of(model: nn.Module, default: str) -> str:
    """The words with which a model is refused; `default` where its trace is right."""
    try:
        traced = trace(model)
    except TraceError as error:
        return str(error)
    assert_same_in_both_modes(traced, model, torch.randn(2, 8, 6, 6))
    return default


def test_a_constant_of_the_forward_is_the_same_in_both_modes() -> None:
    model = model_of("Constant", lambda m, x: m.conv2(m.conv1(x) * torch.tensor([2.0])))()
    traced = trace(model)
    assert kinds(traced) == [
        "placeholder",
        "Conv2d",
        "_tensor_constant0",
        "mul",
        "Conv2d",
        "output",
    ]
    assert_same_in_both_modes(traced, model, torch.randn(2, 8, 6, 6))


def test_parameters_of_equal_value_stay_two() -> None:
    model = model_of("Offsets", lambda m, x: x + (m.a if m.training else m.b))()
    model.a, model.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    traced = trace(model)
    assert set(traced.state_dict()) == {"a", "b"}
    nn.init.ones_(traced.b)
    assert torch.equal(traced.eval()(torch.zeros(1)), torch.ones(1))


def test_layers_run_the_other_way_round_in_evaluation_are_right_or_refused() -> None:
    body = {True: lambda m, x: m.conv1(m.conv2(x)), False: lambda m, x: m.conv2(m.conv1(x))}
    model = model_of("Turned", lambda m, x: body[m.training](m, x))()
    assert "conv" in refusal_of(model, default="right, whichever conv comes first")


def test_statistics_that_only_evaluation_would_run_are_refused() -> None:
    with pytest.raises(TraceError, match=r"^bn1: expected training and evaluation to run it as"):
        trace(model_of("Late", lambda m, x: x if m.training else m.bn1(x))())


def test_a_model_that_cannot_be_copied_is_refused_with_its_name() -> None:
    model = conv_bn()
    model.stream = (x for x in ())
    with pytest.raises(ModelError, match=r"^Sequential: expected a model that copy\.deepcopy can"):
        trace(model)


def test_constants_of_the_forward_are_no_state_of_the_model() -> None:
    model = model_of("Constant", lambda m, x: m.conv1(x) * torch.tensor([2.0]))()
    traced = trace(model)
    for each in traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)):
        assert not any("constant" in name for name in each.state_dict())
        x = torch.randn(2, 8, 6, 6)
        assert torch.equal(each.train(model.training)(x), model(x))


class Counting(Model):
    """Buffers that the forward changes, in each mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("calls", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.mul_(0.5).add_(x.mean())
        if self.training:
            self.steps.add_(1)
        return self.conv1(x) * self.calls.mean() + self.steps


def test_what_a_forward_does_to_a_buffer_is_done_by_its_trace() -> None:
    model = Counting()
    before = copy.deepcopy(model)
    traced = trace(model)
    assert_same(dict(model.state_dict()), dict(before.state_dict()))
    assert traced.state_dict().keys() == {"steps", "conv1.weight"}
    x = torch.randn(2, 8, 6, 6)
    for training in True, True, False, True, False:
        ours, theirs = traced.train(training)(x), model.train(training)(x)
        assert torch.equal(ours, theirs)
        assert torch.equal(traced.calls, model.calls)
    assert int(traced.steps) == int(model.steps) == 3


def changed_in_training(model: Any, x: Tensor) -> Tensor:
    if model.training:
        model.bn1.running_mean.mul_(0.5)
    return model.conv1(x) + model.bn1.running_mean.sum()


def changed_in_evaluation(model: Any, x: Tensor) -> Tensor:
    return (
        model.conv1(x)
        if model.training
        else model.conv1(x) + model.bn1.running_mean.mul_(0.5).sum()
    )


def statistics_in_training(model: Any, x: Tensor) -> Tensor:
    y = model.conv1(x)
    bn = model.bn1
    if model.training:
        return F.batch_norm(y, bn.running_mean, bn.running_var, training=True)
    return y


@pytest.mark.parametrize(
    "body", [changed_in_training, changed_in_evaluation, statistics_in_training]
)
def test_a_buffer_changed_in_one_mode_alone_is_refused(
    body: Callable[[Any, Tensor], Tensor],
) -> None:
    with pytest.raises(TraceError, match="which changes one in place in one mode alone"):
        trace(model_of("InPlace", body)())


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("renamed", ["Renamed", "RenamedBatchNorm"]),
        ("same padding", ["weight", "pad", "bias", "conv2d", "BatchNorm2d"]),
        ("CustomForward", ["Standardised", "BatchNorm2d", "relu", "Conv2d", "BatchNorm2d"]),
    ],
)
def test_subclasses_are_looked_through_where_they_are_one_function(
    name: str, found: list[str]
) -> None:
    ours = [kind.rpartition(".")[2] for kind in kinds(trace(MODELS[name]()))[1:-1]]
    assert ours == found


def test_a_subclass_with_hooks_or_named_is_kept_whole() -> None:
    model = chain(conv=SamePadding(8, 8, 3), bn=nn.BatchNorm2d(8))
    assert "SamePadding" in kinds(trace(model, ["conv"]))
    assert "SamePadding" in kinds(trace(model, [SamePadding]))
    model.conv.register_forward_hook(lambda *_: None)
    assert "SamePadding" in kinds(trace(model))


def test_shapes_of_parameters_and_buffers_are_known_while_tracing() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        assert m.conv1.weight.dim() == m.conv1.weight.ndim == 4
        assert m.conv1.weight.size(0) == m.bn1.running_mean.size()[0] == m.bn1.bias.numel() == 8
        return x * m.bn1.running_mean.view(1, m.conv1.weight.shape[0], 1, 1)

    assert kinds(trace(model_of("Shapes", forward)()))[-3:] == ["view", "mul", "output"]
