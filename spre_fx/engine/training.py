"""What training.h lays out in memory: weights, and convs with masked weights."""

from __future__ import annotations

import ctypes


class Weight(ctypes.Structure):
    """A weight of `bytes` a number; channels-last, its channels lie side by side.

    Nothing says what the numbers are: an engine compares magnitudes by their bits.
    """

    _fields_ = [
        ("numbers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bytes", "filters", "channels", "taps")),
        ("channels_last", ctypes.c_int64),
    ]


class MaskedConv(ctypes.Structure):
    """A conv2d with masked weights; activations and weights are channels-last or contiguous."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("bytes", "images", "channels", "height", "width"),
            *("filters", "out_height", "out_width", "kernel_h", "kernel_w"),
            *("stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"),
            *("groups", "channels_last", "weight_channels_last"),
        )
    ]
