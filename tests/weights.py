"""Weights of all kinds, for the tests of masks."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from spre_fx.patterns import Pattern

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KINDS = ("distinct", "ties", "sparse", "zero")
SPECIAL = (float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0)


def draw_weight(shape: tuple[int, ...], dtype: torch.dtype, kind: str, seed: int) -> Tensor:
    """A contiguous weight; of the kind "special" it has numbers that are not usual in it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    match kind:
        case "ties":
            weight = weight.round()
        case "sparse":
            weight = torch.where(weight > 0.5, weight, -0.0)
        case "zero":
            weight = torch.zeros(shape)
    weight = weight.to(dtype)
    if kind == "special":
        tiny = torch.finfo(dtype).smallest_normal
        special = torch.tensor([*SPECIAL, tiny, -tiny / 2, tiny / 4], dtype=dtype)
        which = torch.randint(2 * len(special), shape, generator=generator)
        weight = torch.where(which < len(special), special[which % len(special)], weight)
    return weight


@st.composite
def weights(
    draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, filters: int = 4
) -> tuple[Tensor, Pattern]:
    """A weight of few numbers, contiguous or channels-last, and a pattern."""
    m = draw(st.integers(2, 9) | st.sampled_from([16, 32]))
    n = draw(st.just(1) | st.integers(1, m - 1))
    kernel = draw(st.lists(st.integers(1, 3), max_size=3))
    shape = (draw(st.integers(1, filters)), draw(st.integers(1, 2 * m + 1)), *kernel)
    dtype, kind = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(kinds))
    weight = draw_weight(shape, dtype, kind, draw(st.integers(0, 2**31)))
    if draw(st.booleans()) and len(kernel) == 2:
        weight = weight.to(memory_format=torch.channels_last)
    return weight, Pattern(n, m)
