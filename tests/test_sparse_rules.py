"""The rules of TensorRT and OpenVINO, one broken at a time."""

import numpy as np
import pytest

from spre_fx.sparse_rules import WeightedNode, judge, verdict_table


def weight(*shape: int, per_four: int = 2) -> np.ndarray:
    """`per_four` non-zeros in every four input channels."""
    values = np.ones(shape)
    values[:, np.arange(shape[1]) % 4 >= per_four] = 0
    return values


@pytest.mark.parametrize(
    ("op", "values", "dtype", "expected"),
    [
        ("Conv", weight(256, 256, 3, 3), "float16", None),
        ("Conv", weight(64, 64, 1, 1), "int8", None),
        ("Conv", weight(64, 64, 3, per_four=1), "float16", None),
        ("Gemm", weight(64, 64), "float16", None),
        ("MatMul", weight(64, 64), "int8", None),
        (
            "ConvTranspose",
            weight(64, 64, 3, 3),
            "float16",
            "ConvTranspose is neither conv nor fully",
        ),
        ("Conv", None, "", "its weight is no constant"),
        ("Conv", weight(64, 3, 7, 7), "float16", "C=3 is no multiple of 4"),
        ("Conv", weight(64, 64, 3, 3, per_four=3), "float16", "3 non-zeros in 4 channels"),
        ("Gemm", weight(64, 64, per_four=4), "float16", "4 non-zeros in 4 channels"),
        ("Conv", weight(64, 64, 3, 3), "float32", "float32, not float16 or int8"),
        ("Conv", weight(64, 64, 3, 3), "bfloat16", "bfloat16, not float16 or int8"),
    ],
)
def test_tensorrt(op, values, dtype, expected):
    verdict = judge(WeightedNode("conv", op, values, dtype))
    if expected is None:
        assert verdict.tensorrt is None
    else:
        assert verdict.tensorrt.startswith(expected)
    assert verdict.in_half == (verdict.tensorrt is None or dtype in ("float32", "bfloat16"))


def test_one_odd_group_is_enough():
    values = weight(64, 64, 3, 3)
    values[17, 42:44, 1, 2] = 1.0
    assert judge(WeightedNode("conv", "Conv", values, "float16")).tensorrt.startswith("4 non-zeros")


@pytest.mark.parametrize(
    ("shape", "pays"),
    [
        ((256, 256, 1, 1), True),
        ((256, 32, 3, 3), True),  # 3 x 3 counts as nine times the channels
        ((256, 28, 3, 3), False),
        ((255, 512, 3, 3), False),
        ((256, 255), False),
    ],
)
def test_what_size_pays(shape, pays):
    assert judge(WeightedNode("conv", "Conv", weight(*shape), "float16")).pays == pays


@pytest.mark.parametrize(
    ("op", "values", "dtype", "expected"),
    [
        ("MatMul", weight(64, 128), "int8", None),
        ("Conv", weight(64, 64, 1, 1), "int8", "Conv is no matrix multiplication"),
        ("MatMul", None, "", "its weight is no constant"),
        ("Gemm", weight(1000, 512), "int8", "1000 is no multiple of 64"),
        ("Gemm", weight(64, 64), "float32", "float32 is not int8"),
    ],
)
def test_openvino(op, values, dtype, expected):
    assert judge(WeightedNode("fc", op, values, dtype)).openvino == expected


def test_the_table_says_it_all():
    nodes = [
        WeightedNode("stem", "Conv", np.ones((64, 3, 7, 7)), "float16"),
        WeightedNode("small", "Conv", weight(64, 16, 1, 1), "float16"),
        WeightedNode("fc", "Gemm", weight(256, 256, per_four=1), "int8"),
    ]
    lines = [line.split("  ") for line in verdict_table([judge(n) for n in nodes]).splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[0] == ["node", "op", "weight", "type", "zeros", "TensorRT", "OpenVINO"]
    conv = "no: Conv is no matrix multiplication"
    assert cells[2:] == [
        ["stem", "Conv", "64x3x7x7", "float16", "0.0%", "no: C=3 is no multiple of 4", conv],
        ["small", "Conv", "64x16x1x1", "float16", "50.0%", "sparse, but small", conv],
        ["fc", "Gemm", "256x256", "int8", "75.0%", "sparse", "sparse"],
    ]
