"""The program that the engine runs, as engine.h lays it out in memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, TypeAlias


class Kind(IntEnum):
    """What a step computes."""

    SPARSE_CONV = 0
    DENSE_CONV = 1
    DEPTHWISE_CONV = 2
    MAX_POOL = 3
    AVERAGE_POOL = 4
    AFFINE = 5
    COPY = 6
    WINOGRAD_CONV = 7


class Activation(IntEnum):
    """What is applied to a result before it is stored."""

    IDENTITY = 0
    RELU = 1
    RELU6 = 2
    SILU = 3
    HARDSWISH = 4


PLANE_SLACK = 16  # elements behind a plane, which are anyone's


class Type(IntEnum):
    """The type of activations and weights."""

    FLOAT32 = 0
    BFLOAT16 = 1


_FIELDS = (
    *("kind", "type"),
    *("x", "x_offset", "x_stride"),
    *("y", "y_offset", "y_stride"),
    *("residual", "residual_offset", "residual_stride"),
    *("weight", "weight_offset"),
    *("bias", "bias_offset"),
    *("batch", "height", "width", "channels"),
    *("out_height", "out_width", "out_channels"),
    *("kernel_h", "kernel_w", "stride_h", "stride_w"),
    *("padding_h", "padding_w", "dilation_h", "dilation_w"),
    *("groups", "activation", "count_inside"),
    *("slots", "channel_group", "parts", "planar"),
    *("x_planes", "y_planes", "residual_planes", "winograd"),
    *("tile_blocks", "tile_pixels", "tile_rows", "split", "direct"),
)


class Step(ctypes.Structure):
    """One operation. Fields left out are 0: an operand that is not there is -1, not 0."""

    _fields_ = [(name, ctypes.c_int64) for name in _FIELDS]


if TYPE_CHECKING:
    Program: TypeAlias = ctypes.Array[Step]
else:
    Program = ctypes.Array


def program(steps: Sequence[Step]) -> Program:
    """The steps one behind the other in memory, copied."""
    return (Step * len(steps))(*steps)
