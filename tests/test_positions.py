"""`count_runs`: calls and positions of layers, seen without computing them."""

import torch
from torch import nn

from spre_fx.inspection import with_graphs
from spre_fx.passes.positions import Runs, count_runs


def test_calls_and_positions_add_up():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    runs = count_runs(
        *with_graphs(nn.Sequential(conv, nn.MaxPool2d(2), conv)), (torch.empty(2, 4, 8, 8),)
    )
    assert runs == {"0": Runs((4, 4, 3, 3), calls=2, positions=2 * (64 + 16))}


def test_layers_inside_modules_kept_whole_are_seen_where_they_are_called():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    runs = count_runs(*with_graphs(nn.Sequential(layer)), (torch.empty(3, 5, 8),))
    assert runs["0.linear1"].calls in (0, 1)  # torch's fast path reads its weight by itself
    assert runs["0.self_attn.out_proj"].calls == 0  # its weight is read by the attention
    assert runs["0.linear1"].positions == 15 * runs["0.linear1"].calls


def test_nothing_is_computed():
    huge = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 3, padding=1))
    size = 100_000  # 40 GB an image
    image = torch.empty(1, device="meta").expand(1, 1, size, size)
    assert count_runs(*with_graphs(huge.to("meta")), (image,))["1"].positions == size**2
