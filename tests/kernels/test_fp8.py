"""FP8 operands against their definition, and what a GEMM of them loses."""

import pytest
import torch

from slipstream.kernels import fp8
from slipstream.kernels.fp8 import (
    LARGEST,
    Operand,
    quantize_columns,
    quantize_columns_reference,
    quantize_rows,
    quantize_rows_reference,
)
from tests.kernels.conditions import DEVICE, INTERPRETED, compiled_or_interpreted

SUBNORMAL = 2**-9  # the smallest step of e4m3


@pytest.fixture(autouse=True)
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's cast to e4m3 loses the carry (127 becomes 64): there, compare what would be cast."""
    if INTERPRETED:
        monkeypatch.setattr(fp8, "DTYPE", torch.float32)


def assert_same(got: Operand, expected: Operand) -> None:
    torch.testing.assert_close(got.scale, expected.scale, rtol=0, atol=0)
    assert got.values.dtype == expected.values.dtype == fp8.DTYPE
    torch.testing.assert_close(got.values.float(), expected.values.float(), rtol=0, atol=0)
    assert got.values.is_contiguous()


@pytest.mark.skipif(INTERPRETED, reason="of the reference")
def test_examples() -> None:
    values, scale = quantize_rows_reference(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
    assert values.tolist() == [[224, -448], [0, 0]]
    torch.testing.assert_close(scale, torch.tensor([2 / 448, 1e-30]))
    values, scale = quantize_columns_reference(torch.tensor([[[1.0, 0.0], [-2.0, 4.0]]]))
    assert values.tolist() == [[[224, -448], [0, 448]]]
    torch.testing.assert_close(scale, torch.tensor([[2 / 448, 4 / 448]]))


@pytest.mark.skipif(INTERPRETED, reason="of the reference")
def test_every_value_is_within_half_a_step() -> None:
    """e4m3 has 3 bits behind the point: 1/16 of a value at most, and half of 2^-9 near zero."""
    rows = torch.randn(50, 300) * torch.logspace(-8, 8, 50)[:, None]
    values, scale = quantize_rows_reference(rows)
    error = (values.float() * scale[:, None] - rows).abs()
    assert (error <= rows.abs() / 16 * 1.001 + scale[:, None] * SUBNORMAL / 2).all()
    assert (values.float().abs().amax(1) == LARGEST).all()


@compiled_or_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "width"), [(0, 16), (1, 1), (5, 48), (3, 2100)])
def test_rows(rows, width, dtype) -> None:
    given = (torch.randn(rows, width, device=DEVICE) * torch.logspace(-6, 3, rows, device=DEVICE)[:, None]).to(dtype)
    given[1:2] = 0
    assert_same(quantize_rows(given), quantize_rows_reference(given))


@compiled_or_interpreted
def test_rows_that_no_expert_owns_are_not_read() -> None:
    given = torch.randn(7, 32, device=DEVICE)
    given[4:] = float("nan")
    ends = torch.tensor([1, 1, 4], dtype=torch.int32, device=DEVICE)
    got, expected = quantize_rows(given, ends), quantize_rows_reference(given[:4])
    assert_same(Operand(got.values[:4], got.scale[:4]), expected)
    assert got.values.shape == given.shape


@compiled_or_interpreted
def test_what_is_not_finite_stays_so() -> None:
    given = torch.ones(2, 32, device=DEVICE)
    given[0, 3], given[1, 3] = float("inf"), float("nan")
    values, scale = quantize_rows(given)
    assert (values.float() * scale[:, None]).isnan().any(1).all()


@compiled_or_interpreted
@pytest.mark.parametrize("stored", ["in-out", "out-in"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("few", [0, 1 << 20], ids=["many columns", "few columns"])
@pytest.mark.parametrize("size", [(1, 16, 16), (3, 80, 144), (2, 529, 65)])
def test_columns(size, few, dtype, stored, monkeypatch) -> None:
    monkeypatch.setattr(fp8, "_FEW_COLUMNS", few)
    experts, inputs, outputs = size
    if stored == "in-out":
        weight = torch.randn(experts, inputs, outputs, device=DEVICE).to(dtype)
    else:
        weight = torch.randn(experts, outputs, inputs, device=DEVICE).to(dtype).transpose(1, 2)
    weight[0, :, 2] = 0
    assert_same(quantize_columns(weight), quantize_columns_reference(weight))
