"""Which layer gets which N:M pattern: the user's wishes and what a layer can carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from spre_fx.errors import OptionError
from spre_fx.modules import NMLayer
from spre_fx.passes import matcher
from spre_fx.passes.base import Reason, Skip
from spre_fx.passes.graph_view import Candidate, GraphView
from spre_fx.patterns import Pattern


@dataclass(frozen=True)
class Policy:
    """The pattern of each layer.

    Attributes:
        pattern: The pattern of every layer that nothing else is said of.
        exclude: Layers to leave dense: names, globs, or module types. A name that is a module with
            layers inside excludes them all.
        overrides: Name or glob -> another pattern, or None for dense. The last match wins.
        depthwise: "flat": depthwise convs get their pattern over the flat order of weights. None:
            they stay dense.

    Raises:
        OptionError: If `depthwise` is neither, or a pattern is flat by itself.
    """

    pattern: Pattern
    exclude: tuple[str | type[nn.Module], ...] = ()
    overrides: Mapping[str, Pattern | None] = field(default_factory=dict)
    depthwise: Literal["flat"] | None = None

    def __post_init__(self) -> None:
        if self.depthwise not in (None, "flat"):
            raise OptionError(f"depthwise={self.depthwise!r}: expected None or 'flat'.")
        for pattern in (self.pattern, *self.overrides.values()):
            if pattern is not None and pattern.flat:
                raise OptionError(
                    f"pattern={str(pattern)!r}: expected 'N:M', found a flat pattern, which is for "
                    f"depthwise convs alone: '{pattern.n}:{pattern.m}' and depthwise='flat'."
                )

    def check(self, *views: GraphView) -> None:
        """Refuse an exclusion or override that no layer of the graphs answers to.

        Raises:
            OptionError: Naming the rule and some of the layers there are.
        """
        found = [(view, candidate) for view in views for candidate in view.candidates.values()]
        names = list(dict.fromkeys(candidate.name for _, candidate in found))
        for option, rules in (("exclude", self.exclude), ("overrides", tuple(self.overrides))):
            for rule in rules:
                if not any(_answers_to(view, candidate, rule) for view, candidate in found):
                    raise OptionError(_no_match(option, rule, names))

    def pattern_for(self, view: GraphView, candidate: Candidate) -> Pattern | Skip:
        """The pattern of one candidate, or why it stays dense."""
        pattern = self._wanted(view, candidate)
        if isinstance(pattern, Skip):
            return pattern
        if self.depthwise == "flat" and is_depthwise(candidate.module):
            pattern = replace(pattern, flat=True)
        for reason, refuse in _PREDICATES:
            detail = refuse(view, candidate, pattern)
            if detail is not None:
                return Skip(reason, f"{candidate.name}: {detail}")
        return pattern

    def _wanted(self, view: GraphView, candidate: Candidate) -> Pattern | Skip:
        for rule in self.exclude:
            if _answers_to(view, candidate, rule):
                said = rule if isinstance(rule, str) else rule.__name__
                detail = f"{candidate.name}: excluded by {said!r}"
                return Skip(Reason.EXCLUDED, detail)
        rules = [rule for rule in self.overrides if _answers_to(view, candidate, rule)]
        pattern = self.overrides[rules[-1]] if rules else self.pattern
        if pattern is None:
            detail = f"{candidate.name}: left dense by the override {rules[-1]!r}"
            return Skip(Reason.EXCLUDED, detail)
        return pattern


def _answers_to(view: GraphView, candidate: Candidate, rule: str | type[nn.Module]) -> bool:
    """Whether the candidate, or a module it is inside of, is what the rule speaks of."""
    parts = candidate.name.split(".")
    names = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    if isinstance(rule, str):
        return any(fnmatchcase(name, rule) for name in names)
    return any(isinstance(view.modules.get(name), rule) for name in names)


def _no_match(option: str, rule: str | type[nn.Module], names: list[str]) -> str:
    said = rule if isinstance(rule, str) else rule.__name__
    known = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return (
        f"{option}: {said!r} matches no conv or linear. Expected the name of a layer or of a "
        f"module that holds some, a glob such as 'layer1.*', or a module type. The layers are: "
        f"{known}."
    )


# Each predicate returns the guilty value in words, or None when the layer can carry the pattern.


def _not_called(_: GraphView, candidate: Candidate, __: Pattern) -> str | None:
    return None if candidate.calls or candidate.inside else "is never called in the traced forward"


def _opaque(view: GraphView, candidate: Candidate, _: Pattern) -> str | None:
    if candidate.inside is None:
        return None
    kind = type(view.modules[candidate.inside]).__name__
    return f"is run by {candidate.inside} ({kind}), which is kept whole"


def _functional(_: GraphView, candidate: Candidate, __: Pattern) -> str | None:
    if candidate.module is not None:
        return None
    function = getattr(candidate.calls[0].target, "__name__", candidate.calls[0].target)
    return f"{function} is called as a function, its weight belongs to no conv or linear module"


def _transposed(view: GraphView, candidate: Candidate, _: Pattern) -> str | None:
    return matcher.transposed(view, candidate)


def _custom_forward(view: GraphView, candidate: Candidate, _: Pattern) -> str | None:
    return matcher.custom_forward(view, candidate)


def _parametrised(_: GraphView, candidate: Candidate, __: Pattern) -> str | None:
    assert candidate.module is not None
    if "weight" in candidate.module._parameters:
        return None
    return "its weight is computed from other parameters (weight norm or another parametrisation)"


def _already_sparse(_: GraphView, candidate: Candidate, __: Pattern) -> str | None:
    module = candidate.module
    return f"already carries {module.pattern}" if isinstance(module, NMLayer) else None


def _shared_parameter(view: GraphView, candidate: Candidate, _: Pattern) -> str | None:
    assert candidate.module is not None
    return view.shared(candidate.module)


def is_depthwise(module: nn.Module | None) -> bool:
    """Whether a module is a conv each of whose filters sees a single channel of several."""
    groups = getattr(module, "groups", 1)
    return groups > 1 and groups == getattr(module, "in_channels", None)


def _depthwise(_: GraphView, candidate: Candidate, pattern: Pattern) -> str | None:
    if pattern.flat or not is_depthwise(candidate.module):
        return None
    groups = getattr(candidate.module, "groups", 1)
    return f"depthwise, groups={groups} equals C_in={groups}"


def _few_channels(_: GraphView, candidate: Candidate, pattern: Pattern) -> str | None:
    assert candidate.module is not None
    weight = candidate.module.weight
    if pattern.flat:
        few = weight.numel() < pattern.m
        return f"its {weight.numel()} weights are fewer than M={pattern.m}" if few else None
    channels = weight.shape[1]
    if channels >= pattern.m:
        return None
    return f"C_in/groups={channels} is less than M={pattern.m}"


_PREDICATES: tuple[tuple[Reason, Callable[[GraphView, Candidate, Pattern], str | None]], ...] = (
    (Reason.NOT_CALLED, _not_called),
    (Reason.OPAQUE, _opaque),
    (Reason.FUNCTIONAL, _functional),
    (Reason.TRANSPOSED, _transposed),
    (Reason.PARAMETRISED, _parametrised),
    (Reason.ALREADY_DONE, _already_sparse),
    (Reason.CUSTOM_FORWARD, _custom_forward),
    (Reason.SHARED_PARAMETER, _shared_parameter),
    (Reason.DEPTHWISE, _depthwise),
    (Reason.FEW_CHANNELS, _few_channels),
)
