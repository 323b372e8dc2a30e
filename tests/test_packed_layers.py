"""Packed layers stand in for dense ones: in modules, files, copies, and compiled programs."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from spre_fx import ModelError, OptionError, Pattern, masks
from spre_fx.packed_layers import PackedConv2d, PackedLinear, refusal


def sparse(layer: nn.Module, pattern: str = "1:4") -> nn.Module:
    kept = masks.nm_mask(layer.weight, Pattern.parse(pattern))
    layer.weight = nn.Parameter(torch.where(kept, layer.weight, 0.0).detach())
    return layer.requires_grad_(False)


class Net(nn.Module):
    """conv + relu, conv + residual + relu, pooling, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.one = PackedConv2d.from_dense(sparse(nn.Conv2d(32, 48, 3, padding=1)))
        two = sparse(nn.Conv2d(48, 48, 1, bias=False))
        self.two = PackedConv2d.from_dense(two, planar=True)
        self.head = PackedLinear.from_dense(sparse(nn.Linear(48, 10)), quartered=True)
        self.one.activation = "silu"
        self.two.activation = "relu"

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        return self.head(self.two(one, one).mean((2, 3)))

    def exactly(self, x: Tensor) -> Tensor:
        one, two, head = (layer.to_dense().double() for layer in (self.one, self.two, self.head))
        y = nn.functional.silu(one(x.double()))
        return head(nn.functional.relu(two(y) + y).mean((2, 3)))


CONVS = [
    nn.Conv2d(32, 20, 3),
    nn.Conv2d(32, 20, (3, 1), stride=(2, 1), padding=(1, 0), bias=False),
    nn.Conv2d(36, 20, 5, padding="same", dilation=2, groups=2),
    nn.Conv2d(33, 7, 2, padding="valid"),
    nn.Conv2d(33, 7, 2).bfloat16(),
]
LAYOUTS = [(conv, way) for conv in CONVS[:-1] for way in ("planar", "quartered", "")]


@pytest.mark.parametrize(("conv", "way"), [*LAYOUTS, (CONVS[-1], "")], ids=str)
def test_convolutions_there_and_back(conv, way):
    conv = sparse(copy.deepcopy(conv), "2:4")
    packed = PackedConv2d.from_dense(conv, **{way: True} if way else {})
    assert packed.layout.planar is ("planar=True" in str(packed)) is (way == "planar")
    quartered = way == "quartered"
    assert packed.layout.quartered is ("quartered=True" in str(packed)) is quartered
    x = torch.randn(2, conv.in_channels, 11, 12).to(conv.weight.dtype)
    exact = conv.double()(x.double())
    tolerance = 1e-5 if packed.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(packed(x).double(), exact, rtol=0, atol=tolerance)
    back = packed.to_dense()
    assert not back.training
    assert back.weight.dtype == packed.dtype
    assert torch.equal(back.weight.double(), conv.weight)
    assert torch.equal(packed.dense_weight().double(), conv.weight)
    assert (back.bias is None) == (conv.bias is None)
    assert conv.bias is None or torch.equal(back.bias.double(), conv.bias)
    assert torch.equal(back.double()(x.double()), exact)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_there_and_back(bias):
    linear = sparse(nn.Linear(40, 9, bias=bias))
    packed = PackedLinear.from_dense(linear)
    x = torch.randn(3, 2, 40)
    torch.testing.assert_close(packed(x), linear(x), rtol=0, atol=1e-5)
    back = packed.to_dense()
    assert back.state_dict().keys() == linear.state_dict().keys()
    assert all(torch.equal(back.get_parameter(k), v) for k, v in linear.named_parameters())


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(8, 8, 3, padding_mode="reflect", padding=1), "padding_mode='reflect'"),
        (nn.Conv2d(8, 8, (2, 3), padding="same"), r"padding='same' with a kernel of \(2, 3\)"),
        (nn.Conv2d(8, 8, 1).half(), r"found torch\.float16"),
        (nn.Linear(8, 8).double(), r"found torch\.float64"),
        (nn.Conv1d(8, 8, 1), "found Conv1d"),
    ],
)
def test_what_cannot_be_packed_is_refused_in_a_sentence(layer, reason):
    packed = PackedLinear if isinstance(layer, nn.Linear) else PackedConv2d
    with pytest.raises(ModelError, match=f"cannot be packed: expected .*{reason}"):
        packed.from_dense(layer)


def test_what_can_be_packed_is_not_refused():
    assert [refusal(layer) for layer in (*CONVS, nn.Linear(3, 4))] == [None] * 6


def test_an_unknown_activation_is_refused():
    with pytest.raises(OptionError, match="None, relu, relu6, silu, hardswish, found 'gelu'"):
        PackedLinear(torch.ones(4, 4), activation="gelu")


def test_what_print_shows():
    conv = PackedConv2d(torch.ones(4, 8, 3, 3), groups=2, padding=(1, 1), activation="relu")
    assert str(conv) == (
        "PackedConv2d(16, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=2, slots=8, "
        "dtype=float32, bias=False, activation='relu')"
    )
    assert str(PackedLinear(torch.ones(4, 8), torch.ones(4))) == (
        "PackedLinear(8, 4, slots=8, dtype=float32)"
    )


def test_what_it_says_of_its_layout():
    conv = PackedConv2d.from_dense(sparse(nn.Conv2d(64, 32, 3), "1:32"))
    assert (conv.layout, conv.slots, conv.channel_group) == ((1, 32, 1, False), 1, 32)
    assert conv.dtype == torch.float32


def test_a_network_is_exact():
    net, x = Net(), torch.randn(2, 32, 9, 9)
    torch.testing.assert_close(net(x).double(), net.exactly(x), rtol=0, atol=1e-5)


def reloaded(net: Net) -> Net:
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = Net()
    other.load_state_dict(torch.load(file))
    return other


@pytest.mark.parametrize("make", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n)), reloaded])
def test_copies_compute_the_same(make):
    net, x = Net(), torch.randn(1, 32, 6, 6)
    net_copy = make(net)
    assert torch.equal(net_copy(x), net(x))
    assert net_copy.one.packed.data_ptr() != net.one.packed.data_ptr()


def test_a_state_dict_of_other_masks_is_refused_by_torch():
    conv = PackedConv2d.from_dense(sparse(nn.Conv2d(32, 16, 1), "2:4"))
    with pytest.raises(RuntimeError, match="size mismatch for packed"):
        conv.load_state_dict(PackedConv2d.from_dense(sparse(nn.Conv2d(32, 16, 1))).state_dict())


@pytest.mark.parametrize("channel", [-1, 16, 0x43424140])
@pytest.mark.parametrize(
    ("way", "place"),
    [
        ({}, (0, 0, 1, 0, 1, 0, 1, 3)),
        ({"planar": True}, (0, 7, 1, 0, 3, 1)),
        ({"quartered": True}, (0, 0, 1, 0, 3, 0, 1, 3)),
    ],
    ids=str,
)
def test_a_damaged_state_dict_is_refused(channel, way, place):
    conv = PackedConv2d.from_dense(sparse(nn.Conv2d(32, 16, 1), "2:4"), **way)
    state = copy.deepcopy(conv.state_dict())
    state["packed"][place] = channel
    with pytest.raises(RuntimeError, match="packed is damaged: it names channels outside"):
        conv.load_state_dict(state)


def test_the_type_is_that_of_the_packed_weight_whatever_is_done():
    net, x = Net(), torch.randn(1, 32, 6, 6)
    before = net(x)
    net.to(torch.bfloat16)
    assert torch.equal(net(x), before)
    assert net.one.bias.dtype == torch.float32
    with pytest.raises(
        ModelError, match=r"float32, .*found torch\.bfloat16.*finalize\(\.\.\., dtype"
    ):
        net(x.bfloat16())


def test_moving_to_meta_moves_all_of_it():
    net = Net().to("meta").to(torch.bfloat16)
    assert {buffer.device.type for buffer in net.buffers()} == {"meta"}
    assert net(torch.ones(2, 32, 5, 5, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_mode_of_autograd(mode):
    net, x = Net(), torch.randn(1, 32, 6, 6)
    with mode():
        torch.testing.assert_close(net(x).double(), net.exactly(x), rtol=0, atol=1e-5)


def test_compiled_without_a_break():
    net = Net()
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    for batch, size in ((2, 9), (3, 6)):
        x = torch.randn(batch, 32, size, size)
        torch.testing.assert_close(compiled(x), net(x), rtol=0, atol=1e-6)


def test_exported_with_any_batch_and_image():
    net = Net()
    dynamic = {0: Dim("batch"), 2: Dim("height", min=3), 3: Dim("width", min=3)}
    program = export(net, (torch.randn(2, 32, 9, 8),), dynamic_shapes=(dynamic,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("spre_fx.packed_conv2d.default") == 2
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for shape in ((1, 32, 5, 7), (4, 32, 3, 9)):
        x = torch.randn(shape)
        torch.testing.assert_close(loaded(x), net(x), rtol=0, atol=1e-6)


def test_traced_by_fx():
    net, x = Net(), torch.randn(1, 32, 6, 6)
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))
