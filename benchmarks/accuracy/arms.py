"""The arms of the experiment: what is trained, and what each is compared with.

An arm is a way of training one network at one N:M pattern. The mask methods come plain, with the
SpRe branch of the paper, and with what its Fig. 5 puts in the branch's place; then there are the
unstructured baselines, and remedies for what ails the branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import spre_fx
from spre_fx import CubicRamp, EveryK, Freeze, SpRe

PATTERNS = ("2:4", "1:4", "1:8", "1:16")
METHODS = {"SR-STE": "sr-ste", "ASP": "asp", "LBC": "lbc"}
BRANCHES = {
    "SpRe": SpRe(),
    "Same": SpRe("same"),
    "Inverse": SpRe("inverse"),
    "random taps": SpRe("random"),
}


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        name: What tables call it.
        method: Of `spre_fx.prepare`; None: the network stays dense.
        branch: Makes the SpRe branch for a training of so many steps; None: there is none.
        options: More options of `prepare`.
        same_time_as: The arm whose training time this one gets, which is the name of a row in the
            measured step times; None: the steps of all others.
    """

    name: str
    method: str | None
    branch: Callable[[int], SpRe] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    same_time_as: str | None = None

    @property
    def starts_trained(self) -> bool:
        """Whether it starts from the weights of the dense network of its seed."""
        return self.method == "asp"

    def prepare(self, model: nn.Module, pattern: str, steps: int) -> nn.Module:
        """The network as it is trained, for so many steps."""
        if self.method is None:
            return model
        schedules = {
            "lbc": CubicRamp(0, steps // 2, 10),
            "gmp": CubicRamp(steps // 10, steps * 3 // 4, 20),
            "granet": CubicRamp(steps // 10, steps * 3 // 4, 20),
            "rigl": Freeze(steps * 3 // 4, EveryK(20)),
        }
        options = {
            "method": self.method,
            "branch": None if self.branch is None else self.branch(steps),
            "schedule": schedules.get(self.method),
            "exclude": "fc",
        }
        return spre_fx.prepare(model, pattern, **options | dict(self.options))


def _with_branch(method: str, name: str, branch: SpRe) -> Arm:
    return Arm(f"{method} + {name}", METHODS[method], lambda _: branch)


DENSE = Arm("dense", None)
PLAIN = {method: Arm(method, option) for method, option in METHODS.items()}
BRANCHED = {
    method: [_with_branch(method, name, branch) for name, branch in BRANCHES.items()]
    for method in METHODS
}
CONTROLS = {
    method: Arm(f"{method}, same time", option, same_time_as=f"{method} + SpRe")
    for method, option in METHODS.items()
}
UNSTRUCTURED = [Arm("GMP", "gmp"), Arm("RigL", "rigl"), Arm("GraNet", "granet")]


def _remedy(words: str, branch: Callable[[int], SpRe] = lambda _: SpRe(), **options: Any) -> Arm:
    return Arm(f"SR-STE + {words}", "sr-ste", branch, options)


REMEDIES = [
    _remedy("SpRe, running mean", criterion="running-mean"),
    _remedy("SpRe, change", criterion="change"),
    _remedy("SpRe, SNIP", criterion="snip"),
    _remedy("SpRe, hysteresis", lambda _: SpRe(hysteresis=0.1)),
    _remedy("SpRe, hysteresis 0.3", lambda _: SpRe(hysteresis=0.3)),
    _remedy("SpRe, change, hysteresis", lambda _: SpRe(hysteresis=0.1), criterion="change"),
    _remedy("SpRe, narrowing", lambda steps: SpRe(narrow=CubicRamp(0, steps // 2))),
    _remedy("SpRe, straight-through", lambda _: SpRe(straight_through=True)),
    _remedy("Same, straight-through", lambda _: SpRe("same", straight_through=True)),
    _remedy("SpRe, gamma from 0", spre_gamma=0.0),
    _remedy("Same, gamma from 0", lambda _: SpRe("same"), spre_gamma=0.0),
    _remedy(
        "SpRe, narrowing, straight-through, running mean",
        lambda steps: SpRe(narrow=CubicRamp(0, steps // 2), straight_through=True),
        criterion="running-mean",
    ),
]

ARMS = {
    arm.name: arm
    for arm in (
        DENSE,
        *(
            arm
            for method in METHODS
            for arm in (PLAIN[method], *BRANCHED[method], CONTROLS[method])
        ),
        *UNSTRUCTURED,
        *REMEDIES,
    )
}
