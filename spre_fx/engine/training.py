"""A weight as training.h lays it out in memory."""

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
