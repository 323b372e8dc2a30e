"""What is read from the source of a forward that torch.fx cannot follow."""

import pytest
import torch
from torch import Tensor, nn

from spre_fx.passes.outside_code import read_code


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.inner = nn.ModuleDict({"deep": nn.Linear(4, 4)})
        nn.init.zeros_(self.a.weight)  # no part of the forward
        for layer in self.b:
            layer.extra = 1

    def unused(self) -> Tensor:
        return self.a.weight


class Calls(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.a is not None:
            x = self.a(x)
        return self.b(x)


class Reads(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(self.b(x), self.a.weight)


class ReadsInAMethod(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.project(x)

    def project(self, x: Tensor) -> Tensor:
        return x @ self.a.weight


class Iterates(Base):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.b:
            x = layer(x)
        return x


class Indexes(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b[0](x)


class Reaches(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner.deep(x)


class Asks(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.a.in_features)


class AsksOfATensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.to(self.a.weight.dtype))


class Inherits(Iterates):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.a(x))


@pytest.mark.parametrize(
    ("kind", "taken_apart", "read"),
    [
        (Base, set(), set()),
        (Calls, set(), set()),
        (Reads, {"a"}, {"a"}),
        (ReadsInAMethod, {"a"}, {"a"}),
        (Iterates, {"b"}, set()),
        (Indexes, {"b"}, set()),
        (Reaches, {"inner"}, set()),
        (Asks, {"a"}, set()),
        (AsksOfATensor, set(), set()),
        (Inherits, {"b"}, set()),
    ],
)
def test_what_code_does_beside_calling(
    kind: type[Base], taken_apart: set[str], read: set[str]
) -> None:
    made = kind()
    names = {module: name for name, module in made.named_modules()}
    code = read_code(made)
    assert {names[module] for module in code.taken_apart} == taken_apart
    assert {names[module] for module in code.read} == read


def test_code_without_a_source_is_taken_to_only_call() -> None:
    space: dict[str, type[nn.Module]] = {"Base": Base}  # type: ignore[dict-item]
    exec("class Typed(Base):\n    def forward(self, x): return self.a.weight", space)
    assert read_code(space["Typed"]()).read == set()
