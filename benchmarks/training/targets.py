"""What a step may cost, relative to a dense one."""

from __future__ import annotations

from dataclasses import dataclass

from contenders import PREPARED
from setting import Setting

RATIO, MASKS, MEMORY = "step", "mask updates", "peak memory"


@dataclass(frozen=True)
class Target:
    """The most that a figure may be.

    Attributes:
        figure: Of what: RATIO and MEMORY over dense, or MASKS, the fraction of the step.
        most: The limit.
        contenders: Whose.
        model: On which network; None: on any.
        pattern: At which pattern; None: at any.
    """

    figure: str
    most: float
    contenders: tuple[str, ...]
    model: str | None = None
    pattern: str | None = None

    def __str__(self) -> str:
        return f"<= {100 * self.most:g}%" if self.figure == MASKS else f"<= {self.most:g}x"


_SPRE = ("SR-STE + SpRe",)
TARGETS = (
    Target(RATIO, 1.03, ("SR-STE",)),
    Target(RATIO, 1.95, _SPRE, "resnet18", "2:4"),
    Target(RATIO, 1.7, _SPRE, "resnet18", "1:16"),
    Target(RATIO, 1.5, _SPRE, "resnet50", "2:4"),
    Target(RATIO, 1.35, _SPRE, "resnet50", "1:16"),
    Target(MASKS, 0.02, tuple(PREPARED)),
    Target(MEMORY, 1.25, _SPRE, "resnet50"),
)


def find(figure: str, contender: str, setting: Setting) -> Target | None:
    """The target for a figure, None where there is none."""
    for target in TARGETS if setting.has_targets else ():
        if (
            (target.figure, contender in target.contenders) == (figure, True)
            and target.model in (None, setting.model)
            and target.pattern in (None, setting.pattern)
        ):
            return target
    return None
