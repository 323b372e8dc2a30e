"""Facts about a layer that must outlive pickling and copying of its graph.

`node.meta`, `gm.meta` and node names are lost when a GraphModule is pickled. A plain dict on the
leaf module is not, needs nothing of this library to be loaded again, and never enters the
`state_dict`.
"""

from __future__ import annotations

from typing import TypedDict, cast

from torch import nn

_ATTRIBUTE = "spre_fx_record"


class Record(TypedDict, total=False):
    """What was written down about one module, a conv or linear but for the last entry.

    Attributes:
        pattern: The N:M pattern its weights obey.
        reason: Why it was skipped, one word or two.
        note: The sentence for people: why it was skipped, or why it has no SpRe branch.
        backend: What it was lowered to.
        dense_ms: Milliseconds of the dense layer where its backend was chosen by measuring.
        chosen_ms: Milliseconds of what it was lowered to.
        unstructured: The unstructured method that chose its zeros, which obey no pattern.
        permutation: What became of the order of its input channels.
        shared: What else uses its parameters, where no graph shows it; it must stay dense.
        divided: True on a module with code that torch.fx cannot follow, around parts that it can.
    """

    pattern: str
    reason: str
    note: str
    backend: str
    dense_ms: float
    chosen_ms: float
    unstructured: str
    permutation: str
    shared: str
    divided: bool


def read(module: nn.Module) -> Record:
    """The record of `module`, empty if none was written."""
    record: Record = getattr(module, _ATTRIBUTE, Record())
    return record


def write(module: nn.Module, record: Record) -> None:
    """Replace the record of `module`."""
    setattr(module, _ATTRIBUTE, record)


def note(module: nn.Module | None, reason: object, detail: str) -> None:
    """Write down why `module` was skipped, where there is a module to write on."""
    if module is not None:
        write(module, read(module) | Record(reason=str(reason), note=detail))


_OF_THE_CHOICE = ("backend", "note", "dense_ms", "chosen_ms")


def without_choice(record: Record) -> Record:
    """A record with nothing in it of what the layer was lowered to."""
    lowered = "backend" in record
    kept = {key: value for key, value in record.items() if not (lowered and key in _OF_THE_CHOICE)}
    return cast(Record, kept)
