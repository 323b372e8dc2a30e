"""Small models, each with one thing a compiler has to get right, and what tests ask of any.

Each takes one tensor of its `shape`. Batch norms are random: new ones hide wrong folds.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils._pytree import tree_leaves

from spre_fx import SRSTE, EveryStep, MaskMethod, Pattern, Schedule, SpRe
from spre_fx.passes import PassResult, Policy, trace, training_pipeline


def randomise(model: nn.Module) -> nn.Module:
    """Draw batch norm state and affine parameters at random, in place."""
    with torch.no_grad():
        for module in model.modules():
            tensors = {**module._parameters, **module._buffers}
            if tensors.get("running_mean") is not None:
                tensors["running_mean"].uniform_(-1, 1)
                tensors["running_var"].uniform_(0.3, 3)
            if "Norm" in type(module).__name__ and tensors.get("weight") is not None:
                tensors["weight"].uniform_(0.5, 2).mul_(torch.randn_like(tensors["weight"]).sign())
                tensors["bias"].uniform_(-1, 1)
    return model


def chain(**layers: nn.Module) -> nn.Sequential:
    """The layers one after another, under their names, random."""
    model = randomise(nn.Sequential(OrderedDict(layers)))
    model.shape = Model.shape
    return model


def conv_bn(**options: Any) -> nn.Sequential:
    """conv -> bn -> relu; a 3x3 conv of 8 channels unless told otherwise."""
    conv = nn.Conv2d(**{"in_channels": 8, "out_channels": 8, "kernel_size": 3, **options})
    return chain(conv=conv, bn=nn.BatchNorm2d(conv.out_channels), relu=nn.ReLU())


class Model(nn.Module):
    """Two convs and two batch norms to call as a subclass likes."""

    shape = (2, 8, 6, 6)
    kind: type[nn.Module] = nn.Conv2d

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = self.kind(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        randomise(self)

    def forward(self, x: Tensor) -> Any:
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


class Residual(Model):
    """A residual block with a 1x1 shortcut, pooling and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = chain(conv=nn.Conv2d(8, 8, 1), bn=nn.BatchNorm2d(8))
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y = self.relu(y + self.shortcut(x))
        return self.fc(F.adaptive_avg_pool2d(y, 1).flatten(1))


def model_of(name: str, forward: Callable[[Any, Tensor], Any]) -> type[Model]:
    """A model of that name and forward."""
    return type(name, (Model,), {"forward": forward})


SharedConv = model_of("SharedConv", lambda m, x: m.bn2(m.conv1(m.bn1(m.conv1(x)))))
SharedBatchNorm = model_of("SharedBatchNorm", lambda m, x: m.bn1(m.conv2(m.bn1(m.conv1(x)).relu())))
SumIntoBatchNorm = model_of("SumIntoBatchNorm", lambda m, x: m.bn1(m.conv1(x) + m.conv2(x)))
KeywordCall = model_of(
    "KeywordCall", lambda m, x: m.bn2(m.conv2(input=m.bn1(input=m.conv1(input=x))))
)
TwoHeads = model_of(
    "TwoHeads",
    lambda m, x: {"one": m.bn1(m.conv1(x.relu())), "more": (m.bn2(m.conv2(x)), x.mean())},
)
OtherUsers = model_of("OtherUsers", lambda m, x: m.bn2(m.conv2(m.bn1(y := m.conv1(x)).relu() + y)))
IndexedOutput = model_of("IndexedOutput", lambda m, x: m.conv2(m.bn1(m.conv1(x)))[:, 0])
DeadOutput = model_of("DeadOutput", lambda m, x: (m.conv1(x), m.bn2(m.conv2(x)))[1])
FunctionalDropout = model_of(
    "FunctionalDropout",
    lambda m, x: F.dropout(m.bn2(F.dropout(m.conv2(x), 0.3, m.training)), training=m.training),
)


class TiedConvs(Model):
    def __init__(self) -> None:
        super().__init__()
        self.conv2.weight = self.conv1.weight


class TiedBatchNorms(Model):
    def __init__(self) -> None:
        super().__init__()
        self.bn2.weight = self.bn1.weight


class FunctionalConv(Model):
    """Calls `F.conv2d`, and first, so that its node takes the name of the module `conv2d`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.conv2d = self.conv1
        del self.conv1

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, padding=1)
        return self.bn2(self.conv2(self.bn1(self.conv2d(x)).relu()))


class Renamed(nn.Conv2d):
    """A subclass that computes what its base does."""

    def downsample_stride(self) -> int:
        return 1


class SamePadding(nn.Conv2d):
    """A subclass that pads by itself, as timm's Conv2dSame."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, self.weight.shape[-1] - 1, 0, self.weight.shape[-2] - 1))
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class ConvNormAct(nn.Conv2d):
    """A conv that holds and runs its batch norm and activation, as detectron2's."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.norm, self.activation = nn.BatchNorm2d(self.out_channels), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(super().forward(x)))


class BatchNormAct(nn.BatchNorm2d):
    """A batch norm that runs its activation, written out as timm's BatchNormAct2d."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        training = self.training or (self.running_mean is None and self.running_var is None)
        statistics = self.running_mean, self.running_var
        factor = self.momentum
        x = F.batch_norm(x, *statistics, self.weight, self.bias, training, factor, self.eps)
        return self.act(self.drop(x))


class ScaledBatchNorm(nn.BatchNorm2d):
    """A batch norm that calls its base's forward."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x).relu()


class RenamedBatchNorm(nn.BatchNorm2d):
    """A batch norm that computes what its base does."""


class FunctionalOnModules(Model):
    """Functions on the parameters of modules that are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn1
        y = F.conv2d(x, self.conv1.weight, padding=1)
        y = F.batch_norm(
            y, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, bn.momentum
        )
        y = self.bn2(F.conv2d(y, self.conv2.weight, self.conv2.bias, 2, (1,)))
        return F.linear(y.mean((2, 3)), self.fc.weight, bias=self.fc.bias)


class Kernel(nn.Module):
    """A module of the user's own that is a conv, with weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4, 3, 3))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, dilation=2, groups=2)


class Views(Model):
    """Identities and views between a conv and its batch norm, of another rank."""

    def __init__(self) -> None:
        super().__init__()
        self.identity, self.drop, self.norm = nn.Identity(), nn.Dropout(0.0), nn.BatchNorm1d(8)
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.identity(self.conv1(x)))
        y = self.bn1(y.flatten(2).unsqueeze(-1)).relu().squeeze(-1)
        b, c, h, w = x.shape
        y = self.conv2(y.view(b, c, h, w))
        return self.norm(y.view(y.shape[0], y.size(1), -1).contiguous()).relu()


class Hooked(Model):
    """A hook on a conv, and one on the batch norm behind another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1.register_forward_hook(double)
        self.bn2.register_forward_pre_hook(shift)
        self.conv3 = nn.Conv2d(8, 8, 3)
        self.conv3.register_forward_pre_hook(shift)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(super().forward(x))


def double(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return 2 * output


def shift(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0] + 1,)


class Transposed(Model):
    kind = nn.ConvTranspose2d


class Standardised(nn.Conv2d):
    """Weight standardisation: a conv whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), True), self.bias)


class CustomForward(Model):
    kind = Standardised


class Parametrised(Model):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = weight_norm(self.conv1)


class ParametrisedOtherwise(Model):
    """A spectral norm, and a parametrisation of the bias alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = spectral_norm(self.conv2)
        self.conv3 = nn.Conv2d(8, 8, 1)
        parametrize.register_parametrization(self.conv3, "bias", nn.Softplus())
        self.fc = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv3(super().forward(x)))


class Never(Model):
    """Holds a conv, a parameter and a buffer that its forward makes no use of."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Conv2d(8, 8, 3)
        self.unused = nn.Parameter(torch.randn(3))
        self.register_buffer("ticket", torch.randn(3))


class Attention(Model):
    """An attention layer that torch.fx keeps whole, with a linear inside."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).flatten(2).transpose(1, 2)
        return self.attention(x, x, x, need_weights=False)[0]


class AuxiliaryHead(Model):
    """Two outputs in training, one in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = chain(conv=nn.Conv2d(8, 4, 3), bn=nn.BatchNorm2d(4), drop=nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Any:
        x = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(x))
        return (y, self.aux(x)) if self.training else y


class DropPath(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.training:
            y = y * y.new_empty((y.shape[0], 1, 1, 1)).bernoulli_(0.7)
        return x + y


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            x = -x
        return self.branch(self.conv(x))


class ControlFlow(Model):
    """A module inside whose forward depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.bn1(self.conv1(x)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind
    for kind in (
        *(Model, Residual, TwoHeads, SharedConv, SharedBatchNorm, SumIntoBatchNorm, TiedConvs),
        *(TiedBatchNorms, OtherUsers, FunctionalConv, KeywordCall, Transposed, CustomForward),
        *(
            Parametrised,
            Never,
            DeadOutput,
            IndexedOutput,
            Attention,
            FunctionalDropout,
            AuxiliaryHead,
            DropPath,
            FunctionalOnModules,
            Views,
            Hooked,
            ParametrisedOtherwise,
        ),
    )
} | {
    "renamed": lambda: chain(conv=Renamed(8, 8, 3), bn=RenamedBatchNorm(8)),
    "same padding": lambda: chain(conv=SamePadding(8, 8, 3, 2), bn=nn.BatchNorm2d(8)),
    "conv with norm": lambda: chain(conv=ConvNormAct(8, 8, 3), next=ConvNormAct(8, 8, 3)),
    "norm with activation": lambda: chain(
        conv=nn.Conv2d(8, 8, 3), bn=BatchNormAct(8), next=SamePadding(8, 8, 3), bn2=BatchNormAct(8)
    ),
    "scaled norm": lambda: chain(conv=nn.Conv2d(8, 8, 3), bn=ScaledBatchNorm(8)),
    "own kernel": lambda: chain(conv=Kernel(), bn=nn.BatchNorm2d(8)),
    "shared block": lambda: chain(**dict.fromkeys("ab", FunctionalDropout())),
    "depthwise": lambda: conv_bn(groups=8),
    "grouped": lambda: conv_bn(groups=2),
    "asymmetric": lambda: conv_bn(kernel_size=(1, 5), padding=(0, 2)),
    "no batch norm": lambda: chain(conv=nn.Conv2d(8, 8, 3), relu=nn.ReLU()),
    "no statistics": lambda: chain(
        conv=nn.Conv2d(8, 8, 3), bn=nn.BatchNorm2d(8, track_running_stats=False)
    ),
    "few channels": lambda: chain(
        pool=nn.AdaptiveMaxPool3d((3, None, None)), conv=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8)
    ),
}


def prepare(
    model: nn.Module,
    pattern: str = "1:4",
    method: MaskMethod | None = None,
    schedule: Schedule | None = None,
) -> GraphModule:
    """The training graph of a model, from the passes alone."""
    policy = Policy(Pattern.parse(pattern))
    how = method or SRSTE(), schedule or EveryStep()
    passes = training_pipeline(policy, *how, branch=SpRe(), gamma=1.0)
    return randomise(passes(trace(model))[0])


def kinds(graph_module: GraphModule) -> list[str]:
    """What each node of a graph does: the type of a module, the name of a function."""

    def kind(node: Node) -> str:
        if node.op == "call_module":
            return type(graph_module.get_submodule(str(node.target))).__name__
        named = node.op not in ("placeholder", "output")
        return getattr(node.target, "__name__", str(node.target)) if named else node.op

    return [kind(node) for node in graph_module.graph.nodes]


def node_of(graph_module: GraphModule, name: str) -> Node:
    """The node called `name`."""
    return next(node for node in graph_module.graph.nodes if node.name == name)


def reasons(result: PassResult) -> dict[str, str]:
    """The sentences of a result's skips, with their reasons, by candidate."""
    return {name: str(skip) for name, skip in result.account.skipped.items()}


def run(module: nn.Module, x: Tensor, *, training: bool) -> dict[str, Tensor]:
    """Outputs of a copy of `module` in one mode, from one seed, and its state afterwards."""
    module = copy.deepcopy(module).train(training)
    torch.manual_seed(0)
    outputs = enumerate(tree_leaves(module(x.clone())))
    return {f"output {i}": output.detach() for i, output in outputs} | module.state_dict()


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Two results of `run`, or two state dicts, are equal bit for bit."""
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
