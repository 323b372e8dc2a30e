"""Records: facts about a layer that outlive copying and pickling, and are no part of its state."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from spre_fx import records
from spre_fx.records import Record

FACTS = Record(pattern="2:4", reason="excluded", note="conv1: excluded by 'conv*'", backend="dense")


def through_torch_save(module: nn.Module) -> nn.Module:
    """What `torch.save` and `torch.load` make of a module."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def test_a_layer_nobody_wrote_on_has_an_empty_record() -> None:
    conv = nn.Conv2d(8, 6, 3)
    assert records.read(conv) == {}
    records.read(conv)["pattern"] = "2:4"
    assert records.read(conv) == {}, "reading left something behind"
    assert records.read(nn.Conv2d(8, 6, 3)) == {}, "one layer's record is another's"


def test_read_returns_what_write_wrote_and_the_last_one_counts() -> None:
    conv = nn.Conv2d(8, 6, 3)
    records.write(conv, FACTS)
    assert records.read(conv) == FACTS
    records.write(conv, Record(pattern="1:4"))
    assert records.read(conv) == {"pattern": "1:4"}


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save]
)
def test_a_record_goes_along_and_a_model_of_its_layer(
    clone: Callable[[nn.Module], nn.Module],
) -> None:
    model = nn.Sequential(nn.Conv2d(8, 6, 3))
    records.write(model[0], FACTS)
    assert records.read(clone(model)[0]) == FACTS  # type: ignore[index]


def test_a_deep_copy_has_a_record_of_its_own() -> None:
    conv = nn.Conv2d(8, 6, 3)
    records.write(conv, Record(pattern="2:4"))
    records.read(copy.deepcopy(conv))["pattern"] = "1:4"
    assert records.read(conv) == {"pattern": "2:4"}


def test_a_record_is_no_part_of_the_state_and_needs_nothing_of_ours_to_be_loaded() -> None:
    conv = nn.Conv2d(8, 6, 3)
    before = conv.state_dict().keys()
    records.write(conv, FACTS)
    assert conv.state_dict().keys() == before
    assert b"spre_fx." not in pickle.dumps(conv)
    assert type(records.read(conv)) is dict


def test_a_note_adds_why_a_layer_was_skipped() -> None:
    conv = nn.Conv2d(3, 6, 3)
    records.write(conv, Record(pattern="2:4"))
    records.note(conv, LookupError("too few channels"), "conv1: C_in/groups=3 is less than M=4")
    assert records.read(conv) == {
        "pattern": "2:4",
        "reason": "too few channels",
        "note": "conv1: C_in/groups=3 is less than M=4",
    }


def test_a_note_without_a_module_goes_nowhere() -> None:
    records.note(None, "functional", "conv2d: a function, no module")
