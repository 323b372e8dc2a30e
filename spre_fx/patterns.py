"""N:M patterns: at most N non-zeros among M consecutive input channels."""

from __future__ import annotations

import re
from dataclasses import dataclass

from spre_fx.errors import PatternError

_TEXT = re.compile(r"(\d+):(\d+)( flat)?")


@dataclass(frozen=True, order=True)
class Pattern:
    """At most `n` non-zeros among `m` consecutive input channels of one filter at one tap (Eq. 3).

    Attributes:
        n: Non-zeros kept per group.
        m: Channels per group.
        flat: Whether groups are M consecutive weights in the order (C_out, *kernel, C_in/groups)
            instead, which straddle taps and filters: see `depthwise` of `spre_fx.prepare`.

    Raises:
        PatternError: Unless 1 <= n < m.
    """

    n: int
    m: int
    flat: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise PatternError(
                f"{self.n}:{self.m} is not an N:M pattern: expected 1 <= N < M, for example '2:4' "
                "or '1:16'. For a dense layer use None in `overrides`, or `exclude` it."
            )

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """Read `"N:M"`, or `"N:M flat"`, as `str` writes them.

        Raises:
            PatternError: If `text` is not of that form, or N >= M.
        """
        if isinstance(text, Pattern):
            return text
        match = _TEXT.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise PatternError(
                f"{text!r} is not an N:M pattern: expected a string such as '2:4' or '1:16'."
            )
        return cls(int(match[1]), int(match[2]), flat=match[3] is not None)

    @property
    def density(self) -> float:
        """Fraction of weights kept, N/M."""
        return self.n / self.m

    def kept(self, numel: int) -> int:
        """Weights the unstructured mask B^U keeps of `numel`: `ceil(numel * N / M)`, exactly."""
        return -(-numel * self.n // self.m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}{' flat' * self.flat}"
