"""The operator on the CPU, its rules for torch.library, and which library runs where."""

import pytest
import torch

from spre_fx.errors import ModelError
from spre_fx.masks import nm_mask
from spre_fx.patterns import Pattern
from spre_fx.semi_structured import TwoFour, compress
from spre_fx.semi_structured_ops import (
    DEFAULT_ALGORITHM,
    compress_for_cusparselt,
    pad_dense,
    search_algorithm,
    semi_structured_linear,
    why_not,
)


def two_four(rows=32, columns=64, dtype=torch.float16):
    weight = torch.randn(rows, columns)
    matrix = (weight * nm_mask(weight, Pattern(2, 4))).to(dtype)
    return matrix, compress(matrix)


def multiply(x, found, compressed=None, bias=None, *, rows=32, algorithm=DEFAULT_ALGORITHM):
    return semi_structured_linear(
        x,
        found.values,
        found.metadata,
        compressed,
        bias,
        out_features=rows,
        algorithm=algorithm,
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "columns", "out_features"), [(5, 64, 32), (8, 50, 30)])
def test_it_multiplies_with_the_first_rows_and_columns(rows, columns, out_features, bias):
    matrix, found = two_four()
    x = torch.randn(rows, columns, dtype=torch.float16)
    b = torch.randn(32, dtype=torch.float16) if bias else None
    y = multiply(x, found, None, b, rows=out_features)
    expected = x.double() @ matrix[:out_features, :columns].double().t()
    if b is not None:
        expected += b[:out_features].double()
    torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-2)
    assert y.is_contiguous()


def test_it_keeps_the_rules_of_torch_library():
    _, found = two_four()
    x, bias = torch.randn(5, 64, dtype=torch.float16), torch.randn(32, dtype=torch.float16)
    torch.library.opcheck(
        semi_structured_linear,
        (x, found.values, found.metadata, None, bias),
        {"out_features": 32, "algorithm": DEFAULT_ALGORITHM},
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (torch.empty(5, 65, dtype=torch.float16, device="meta"), r"\(5, 65\)"),
        (torch.empty(5, 64, device="meta"), "torch.float32"),
        (torch.empty(64, dtype=torch.float16, device="meta"), r"\(64,\)"),
    ],
)
def test_a_trace_refuses_inputs_that_no_run_could_take(x, found):
    _, weight = two_four()
    with pytest.raises(ModelError, match=found):
        multiply(x, TwoFour(weight.values.to("meta"), weight.metadata.to("meta")))


def test_the_dense_operand_is_padded_to_multiples_of_eight():
    x = torch.randn(5, 60)
    padded = pad_dense(x, 64)
    assert padded.shape == (8, 64)
    assert torch.equal(padded[:5, :60], x)
    assert padded.count_nonzero() == x.count_nonzero()
    whole = torch.randn(8, 64)
    assert pad_dense(whole, 64) is whole
    assert pad_dense(torch.randn(64, 8).t(), 64).is_contiguous()


@pytest.mark.parametrize(
    ("library", "capability", "reason"),
    [
        ("cutlass", (8, 0), None),
        ("cutlass", (8, 9), None),
        ("cutlass", (9, 0), "8.x only, found 9.0"),
        ("cutlass", (7, 5), "came with compute capability 8.0, found 7.5"),
        ("cusparselt", (7, 5), "came with compute capability 8.0, found 7.5"),
    ],
)
def test_a_library_that_cannot_run_says_why(library, capability, reason):
    found = why_not(library, capability)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_cusparselt_runs_where_torch_was_built_with_it(monkeypatch, capability):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert why_not("cusparselt", capability) is None
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert "built without cuSPARSELt" in why_not("cusparselt", capability)


def test_a_torch_without_the_operators_is_refused_by_name(monkeypatch):
    monkeypatch.delattr(torch, "_sparse_semi_structured_addmm")
    assert "_sparse_semi_structured_addmm" in why_not("cutlass", (8, 0))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in why_not("cusparselt", (9, 4))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("library", ["cusparselt", "cutlass"])
@pytest.mark.parametrize("rows", [1, 49, 3136])
def test_cuda_agrees_with_float64(library, dtype, rows):
    reason = why_not(library, torch.cuda.get_device_capability())
    if reason is not None:
        pytest.skip(reason)
    matrix, found = two_four(128, 192, dtype)
    found = TwoFour(found.values.cuda(), found.metadata.cuda())
    compressed = compress_for_cusparselt(found) if library == "cusparselt" else None
    x = torch.randn(rows, 192, dtype=dtype, device="cuda")
    bias = torch.randn(128, dtype=dtype, device="cuda")
    expected = x.double() @ matrix.cuda().double().t() + bias.double()
    algorithms = [DEFAULT_ALGORITHM]
    if compressed is not None:
        algorithms.append(search_algorithm(pad_dense(x, 192), compressed, bias))
    for algorithm in algorithms:
        y = multiply(x, found, compressed, bias, rows=128, algorithm=algorithm)
        error = (y.double() - expected).abs().max() / expected.abs().max()
        assert error < 4 * torch.finfo(dtype).eps
