"""Models by name, and files of torch.save: what is taken and what is refused."""

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import ResNet

from spre_fx import ModelError, OptionError
from spre_fx.loading import load_file, load_model


def test_a_torchvision_name():
    first, second = load_model("resnet18"), load_model("resnet18")
    assert isinstance(first, ResNet)
    assert torch.equal(first.conv1.weight, second.conv1.weight)


def test_a_timm_name(monkeypatch):
    timm = types.ModuleType("timm")
    timm.is_model = lambda name: name == "tiny"
    timm.create_model = lambda name, pretrained: nn.Linear(4, 5 if pretrained else 2)
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert load_model("timm:tiny").out_features == 2
    assert load_model("timm:tiny", pretrained=True).out_features == 5
    with pytest.raises(OptionError, match="timm knows no model 'huge'"):
        load_model("timm:huge")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(OptionError, match="pip install timm"):
        load_model("timm:tiny")


def test_a_name_in_a_module():
    assert isinstance(load_model("torch:nn.Identity"), nn.Identity)
    with pytest.raises(OptionError, match="No module named 'nowhere'"):
        load_model("nowhere:model")
    with pytest.raises(OptionError, match="no attribute 'nothing'"):
        load_model("torch:nothing")
    with pytest.raises(ModelError, match="found a float"):
        load_model("math:pi")
    with pytest.raises(ModelError, match="without arguments, found TypeError"):
        load_model("torch:nn.Linear")
    with pytest.raises(ModelError, match=r"expected an nn\.Module, found a dict"):
        load_model("builtins:dict")
    with pytest.raises(OptionError, match="expected a torchvision or timm name"):
        load_model("torch:nn.Identity", pretrained=True)


class Evil:
    """Touches a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("touched"),)


def test_nothing_is_unpickled_without_trust(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(1), "evil": Evil()}, "evil.pt")
    with pytest.raises(OptionError, match="--trust"):
        load_file(Path("evil.pt"), trust=False)
    assert not Path("touched").exists()
    load_file(Path("evil.pt"), trust=True)
    assert Path("touched").exists()


def test_states_are_found_under_the_names_of_the_bare_model(tmp_path):
    state = nn.Linear(2, 2).state_dict()
    wrapped = {f"module._orig_mod.{name}": value for name, value in state.items()}
    for content in (state, {"epoch": 1, "model": state}, {"state_dict": wrapped}):
        torch.save(content, tmp_path / "state.pt")
        found = load_file(tmp_path / "state.pt", trust=False)
        assert list(found) == ["weight", "bias"]


@pytest.mark.parametrize("content", [3, {"epoch": 3}, [torch.zeros(1)]], ids=str)
def test_files_that_hold_no_model(tmp_path, content):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(OptionError, match="expected a model or a state_dict"):
        load_file(tmp_path / "file.pt", trust=False)


def test_files_that_are_none_of_torch(tmp_path):
    (tmp_path / "file.pt").write_bytes(b"hello")
    with pytest.raises(OptionError, match=r"file\.pt"):
        load_file(tmp_path / "file.pt", trust=True)
    with pytest.raises(OptionError, match="found none"):
        load_file(tmp_path, trust=False)
