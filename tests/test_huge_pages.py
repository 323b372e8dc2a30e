"""Results in huge pages: what torch.empty_like returns but for where it lies."""

import pytest
import torch
from torch import Tensor

from spre_fx import huge_pages

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 0, 1, 2),
    "with gaps": lambda x: x[:, ::2],
    "expanded": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("filters", [0, 4, 1024])
def test_it_is_laid_out_as_torch_does(filters: int, dtype: torch.dtype, layout: str) -> None:
    like: Tensor = LAYOUTS[layout](torch.zeros(filters, 1024, 3, 3, dtype=dtype))
    found, expected = huge_pages.empty_like(like), torch.empty_like(like)
    assert (found.dtype, found.shape, found.stride()) == (dtype, like.shape, expected.stride())
    assert found.fill_(1).eq(1).all()


def test_other_devices_keep_theirs() -> None:
    assert huge_pages.empty_like(torch.zeros(2**22, device="meta")).device.type == "meta"
