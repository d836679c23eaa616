"""Every Triton kernel against its reference: interpreted on a CPU (in a process that sets TRITON_INTERPRET before
Triton is imported), compiled on a GPU."""

import pytest
import torch

from slipstream.kernels import runs_on
from slipstream.kernels.cross_entropy import Transform, cross_entropy_, cross_entropy_reference_
from slipstream.kernels.sum_rows import sum_rows, sum_rows_reference
from tests.kernels.conditions import DEVICE, compiled_or_interpreted

TRANSFORMS = {
    "plain": Transform(300),
    "scaled": Transform(300, inner=0.3),
    "soft-capped": Transform(300, inner=0.5, tanh=True, outer=4.0),
    "sliced": Transform(290, inner=2.0),
}


@compiled_or_interpreted
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_cross_entropy(rows, dtype, transform) -> None:
    logits = (torch.randn(rows, 300, device=DEVICE) * 3).to(dtype)
    labels = torch.randint(0, 290, (rows,), device=DEVICE)
    labels[1::3] = -100
    expected_grad = logits.clone()
    expected = cross_entropy_reference_(expected_grad, labels, transform, -100)
    assert runs_on(logits)
    losses = cross_entropy_(logits, labels, transform, -100)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(logits, expected_grad, rtol=tolerance, atol=tolerance)


@compiled_or_interpreted
def test_cross_entropy_over_several_blocks_and_large_logits() -> None:
    logits = torch.randn(3, 20_000, device=DEVICE) * 40
    logits[0, 17_000], logits[1] = 5000.0, -3000.0
    labels = torch.tensor([17_000, 3, 19_999], device=DEVICE)
    expected_grad = logits.clone()
    expected = cross_entropy_reference_(expected_grad, labels, Transform(20_000), -100)
    losses = cross_entropy_(logits, labels, Transform(20_000), -100)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits, expected_grad, rtol=1e-4, atol=1e-6)


@compiled_or_interpreted
@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("hidden", [1, 48, 1500])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_sum_rows(tokens, hidden, dtype, weighted) -> None:
    slots = 3
    rows = torch.randn(tokens * slots, hidden, device=DEVICE).to(dtype)
    row = torch.randperm(tokens * slots, device=DEVICE).view(tokens, slots)
    weights = torch.rand(tokens, slots, device=DEVICE) if weighted else None
    expected = sum_rows_reference(rows, row, weights, dtype)
    torch.testing.assert_close(sum_rows(rows, row, weights, dtype), expected)


@compiled_or_interpreted
def test_sum_rows_leaves_out_rows_that_are_not_there() -> None:
    rows = torch.tensor([[1.0], [2.0], [4.0]], device=DEVICE)
    row = torch.tensor([[0, 3], [9, 2]], device=DEVICE)
    assert sum_rows(rows, row, None, torch.float32).tolist() == [[1.0], [4.0]]
    assert sum_rows_reference(rows, row, None, torch.float32).tolist() == [[1.0], [4.0]]
