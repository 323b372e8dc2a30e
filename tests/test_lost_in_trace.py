"""What a trace would lose in silence is refused, and the model prepared around it."""

from collections.abc import Callable

import pytest
import torch
from models import randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spre_fx
from spre_fx import TraceError
from spre_fx.passes.tracing import trace


class Net(nn.Module):
    """A part that can be followed, within one that does more than operations show."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.calls = 0
        self.shape: tuple[int, ...] | None = None


class NoGrad(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(x)
        return self.last(x)


class Autocast(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=True):
            x = self.first(x.float())
        return self.last(x.float())


class Checkpointed(Net):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.first, x, use_reentrant=self.reentrant))


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class Counts(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.last(self.first(x)) * self.calls


class Remembers(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.first(x)
        self.all_seen = {"first": [self.seen]}
        return self.last(self.seen)


class Optional(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.first(x)
        return self.last(x if mask is None else x * mask)


CONTEXT = (
    "it runs under torch.no_grad(), autocast, activation checkpointing or the like, which a graph "
    "does not hold"
)
LOST: dict[type[Net], str] = {
    NoGrad: CONTEXT,
    Autocast: CONTEXT,
    Checkpointed: CONTEXT,
    CheckpointedReentrant: CONTEXT,
    Counts: "Counts: expected a forward that leaves its module as it is, found one that writes the "
    "attribute 'calls'.",
    Remembers: "Remembers: expected a forward that leaves its module as it is, found one that",
    Optional: "Optional: expected a forward that does the same with and without its optional "
    "arguments, found one that looks whether mask is None.",
}
every_net = pytest.mark.parametrize("build", LOST, ids=lambda kind: kind.__name__)


@every_net
def test_what_would_be_lost_is_refused(build: type[Net]) -> None:
    model = build()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(TraceError) as error:
        trace(model)
    assert LOST[build] in str(error.value)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


@every_net
def test_the_model_is_prepared_around_it(build: type[Net]) -> None:
    dtype = torch.float32 if build is Autocast else torch.float64  # it does not cast float64
    model = randomise(build().to(dtype))
    prepared = spre_fx.prepare(model, "1:4")
    assert type(prepared) is build
    states = {site.name: site.state for site in spre_fx.sites(prepared)}
    assert states == {"first.0": spre_fx.State.SPRE, "last.0": spre_fx.State.SPRE}
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    x = torch.randn(2, 8, 6, 6, dtype=dtype, requires_grad=True)
    for _ in range(2):
        prepared(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    deployed = spre_fx.finalize(prepared)
    tolerance = 1e-2 if build is Autocast else 1e-10
    with torch.no_grad():
        expected = prepared.eval()(x)
        torch.testing.assert_close(deployed(x), expected, rtol=tolerance, atol=tolerance)


def test_state_written_in_the_forward_lives_on() -> None:
    prepared = spre_fx.prepare(Counts(), "1:4").eval()
    x = torch.randn(1, 8, 6, 6)
    torch.testing.assert_close(2 * prepared(x), prepared(x))
    assert prepared.calls == 2


def test_an_optional_argument_works_given_and_not() -> None:
    model = randomise(Optional()).eval()
    prepared = spre_fx.prepare(model, "1:4")
    x, mask = torch.randn(2, 1, 8, 6, 6).unbind(0)
    assert not torch.equal(prepared(x), prepared(x, mask))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x, mask=None: nn.functional.conv2d(x, torch.ones(8, 8, 1, 1), mask),
        lambda self, x, scale=2.0: self.first(x) * scale,
    ],
)
def test_an_argument_that_is_handed_on_is_no_hindrance(forward: Callable[..., Tensor]) -> None:
    trace(type("HandsOn", (Net,), {"forward": forward})())
