"""Small edits of a model's modules: adding, replacing, and erasing what nothing uses."""

import pytest
import torch
from models import Residual, SharedConv, chain, kinds, node_of
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from spre_fx.passes import trace
from spre_fx.passes.edit import add_module, erase_unused, replace_module


@pytest.mark.parametrize(
    ("name", "got"), [("new", "new"), ("conv1", "conv12"), ("shortcut.new", "shortcut.new")]
)
def test_a_module_is_added_under_its_name_or_a_numbered_one(name: str, got: str) -> None:
    gm, module = trace(Residual()), nn.Identity()
    conv = gm.conv1
    assert add_module(gm, name, module) == got
    assert gm.get_submodule(got) is module
    assert gm.conv1 is conv


def test_numbers_count_up_past_modules_buffers_and_attributes() -> None:
    root = nn.Module()
    root.taken = nn.ReLU()
    root.register_buffer("taken2", torch.zeros(1))
    root.taken3 = "text"
    assert [add_module(root, "taken", nn.Identity()) for _ in range(2)] == ["taken4", "taken5"]


def test_numbers_go_behind_the_last_part_of_a_name() -> None:
    root = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 1)))
    assert add_module(root, "0.0", nn.Identity()) == "0.02"
    assert type(root[0]._modules["02"]) is nn.Identity


def test_an_added_module_can_be_called_by_its_name() -> None:
    gm = trace(chain(conv=nn.Conv2d(8, 8, 1)))
    output = node_of(gm, "output")
    with gm.graph.inserting_before(output):
        new = gm.graph.call_module(add_module(gm, "conv", nn.ReLU()), (node_of(gm, "conv"),))
    output.args = (new,)
    gm.recompile()
    assert gm(torch.randn(2, 8, 6, 6)).min() == 0


@pytest.mark.parametrize("name", ["conv1", "shortcut.conv"])
def test_a_module_is_replaced_where_it_was(name: str) -> None:
    gm, module = trace(Residual()), nn.Identity()
    before = [n for n, _ in gm.named_modules()]
    replace_module(gm, name, module)
    assert gm.get_submodule(name) is module
    assert [n for n, _ in gm.named_modules()] == before


def detached(gm: GraphModule, name: str) -> GraphModule:
    """The graph, with the input of a node wherever its value was used."""
    node = node_of(gm, name)
    node.replace_all_uses_with(node.all_input_nodes[0])
    return gm


def test_an_unused_node_goes_with_what_only_it_used_and_with_its_modules() -> None:
    gm = trace(Residual())
    node_of(gm, "shortcut_bn").replace_all_uses_with(node_of(gm, "x"))
    erase_unused(gm, [node_of(gm, "shortcut_bn")])
    assert kinds(gm) == [
        *("placeholder", "Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d", "add", "ReLU"),
        *("adaptive_avg_pool2d", "flatten", "Linear", "output"),
    ]
    assert not [name for name in gm.state_dict() if name.startswith("shortcut")]
    gm.graph.lint()


def test_a_node_in_use_stays() -> None:
    gm = trace(Residual())
    before = kinds(gm)
    erase_unused(gm, [node_of(gm, name) for name in ("conv1", "x", "output", "add")])
    assert kinds(gm) == before


def test_a_module_called_elsewhere_stays() -> None:
    gm = detached(trace(SharedConv()), "conv1_1")
    erase_unused(gm, [node_of(gm, "conv1_1")])
    assert kinds(gm) == ["placeholder", "Conv2d", "BatchNorm2d", "BatchNorm2d", "output"]
    assert "conv1.weight" in gm.state_dict()


def test_a_node_listed_twice_is_erased_once() -> None:
    gm = detached(trace(SharedConv()), "bn2")
    erase_unused(gm, [node_of(gm, "bn2")] * 2)
    assert "bn2.weight" not in gm.state_dict()


def test_other_nodes_without_users_stay() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x + 1
        y.add_(x)
        return y.exp()

    gm = detached(symbolic_trace(forward), "exp")
    erase_unused(gm, [node_of(gm, "exp")])
    assert kinds(gm) == ["placeholder", "add", "add_", "output"]


def test_inputs_stay_though_nothing_uses_them() -> None:
    gm = detached(symbolic_trace(lambda x, y: x + y), "add")
    erase_unused(gm, [node_of(gm, "add")])
    assert [node.name for node in gm.graph.nodes] == ["x", "y", "output"]
