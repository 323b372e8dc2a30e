"""Which values of a program lie in planes instead of pixels.

A planar conv computes on planes, so its input is turned into planes and its sums are turned back.
What lies between two of them can stay in planes, which spares both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

from torch.fx import Node

from spre_fx.engine import PLANE_SLACK, Activation, Kind
from spre_fx.passes.divide_work import Alias, Concatenation, Work
from spre_fx.passes.native_steps import Operation, Values

_ACTIVATIONS = (Activation.IDENTITY, Activation.RELU, Activation.RELU6)
_LINE = 16  # elements of a cache line


def values_in_planes(
    values: Values, work: Sequence[Work], pinned: AbstractSet[Node]
) -> AbstractSet[Node]:
    """The values that planar convs compute and nothing else reads.

    But for those that only 3x3 convs and the like compute and read: these copy planes row by row,
    which takes as long as turning pixels. A sum lies in planes only if what it adds does. The other
    way round is no matter.

    Args:
        values: The values of one run.
        work: What becomes of each node, in order.
        pinned: Values that lie by themselves.
    """
    convs = [each for each in work if isinstance(each, Operation) and _is_planar(each)]
    fitting = (each for each in convs if each.step.activation in _ACTIVATIONS)
    found = {each.result for each in fitting if len(values[each.result].shape) == 4} - pinned
    for each in work:
        if not (isinstance(each, Operation) and _is_planar(each)):
            found.difference_update(_reads(each))
    plain = {each.result for each in convs if _is_flat(each)}
    plain |= {node for each in convs if _is_flat(each) for node in _reads(each)}
    found &= plain
    sums = [each for each in convs if each.residual is not None]
    while wrong := {s.result for s in sums if s.result in found and s.residual not in found}:
        found -= wrong
    return found


def plane_stride(pixels: int) -> int:
    """Elements from one plane to the next: an odd number of cache lines, which share no sets."""
    return (-(-(pixels + PLANE_SLACK) // _LINE) | 1) * _LINE


def _is_planar(operation: Operation) -> bool:
    return operation.step.kind == Kind.SPARSE_CONV and bool(operation.step.planar)


def _is_flat(operation: Operation) -> bool:
    """Whether it knows no rows: it then computes on planes where they lie."""
    step = operation.step
    sides = (step.kernel_h, step.kernel_w, step.stride_h, step.stride_w)
    return sides == (1, 1, 1, 1) and (step.padding_h, step.padding_w) == (0, 0)


def _reads(work: Work) -> Iterator[Node]:
    if isinstance(work, Operation):
        yield work.x
        if work.residual is not None:
            yield work.residual
    elif isinstance(work, Alias):
        yield work.source
    elif isinstance(work, Concatenation):
        yield from work.operands
    else:
        yield from work.all_input_nodes
