"""Every Triton kernel against its reference: interpreted on a CPU (in a process that sets TRITON_INTERPRET before
Triton is imported), compiled on a GPU."""

import itertools

import pytest
import torch

from slipstream.kernels import runs_on, scale
from slipstream.kernels.cross_entropy import Transform, cross_entropy_, cross_entropy_reference_
from slipstream.kernels.nf4 import dequantize_nf4, dequantize_nf4_reference, quantize_nf4
from slipstream.kernels.scale import scale_, scale_reference_
from slipstream.kernels.square_sum import square_sum, square_sum_reference
from slipstream.kernels.sum_rows import sum_rows, sum_rows_reference
from slipstream.parallel.clip import total_grad_norm
from tests.kernels.conditions import DEVICE, compiled_or_interpreted

TRANSFORMS = {
    "plain": Transform(300),
    "scaled": Transform(300, inner=0.3),
    "soft-capped": Transform(300, inner=0.5, tanh=True, outer=4.0),
    "negative": Transform(300, inner=-0.3),
    "sliced": Transform(290, inner=2.0),
}


@compiled_or_interpreted
@pytest.mark.parametrize("scaled", [False, True], ids=["sum", "scaled"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1], ids=["no z-loss", "z-loss"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [0, 7])
def test_cross_entropy(rows, dtype, transform, z_loss, scaled) -> None:
    logits = (torch.randn(rows, 300, device=DEVICE) * 3).to(dtype)
    labels = torch.randint(0, 290, (rows,), device=DEVICE)
    labels[1::3] = -100
    scale = torch.tensor(0.3, device=DEVICE) if scaled else None
    expected_grad = logits.clone()
    expected = cross_entropy_reference_(expected_grad, labels, transform, -100, scale, z_loss)
    assert runs_on(logits)
    losses = cross_entropy_(logits, labels, transform, -100, scale, z_loss)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(logits, expected_grad, rtol=tolerance, atol=tolerance)


@compiled_or_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("columns", [1, 2, 17, 300, 512])
def test_cross_entropy_of_any_width(columns, dtype) -> None:
    """Rows as a GEMM leaves them: padded to a multiple of 16 with what was in memory."""
    padded = torch.full((5, -(-columns // 16) * 16), float("nan"), dtype=dtype, device=DEVICE)
    padded[:, :columns] = torch.randn(5, columns, device=DEVICE)
    labels = torch.randint(0, columns, (5,), device=DEVICE)
    expected_grad = padded[:, :columns].clone()
    expected = cross_entropy_reference_(expected_grad, labels, Transform(columns), -100)
    losses = cross_entropy_(padded, labels, Transform(columns), -100)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(padded[:, :columns], expected_grad, rtol=tolerance, atol=tolerance)
    assert not padded[:, columns:].count_nonzero()


@compiled_or_interpreted
def test_cross_entropy_over_several_blocks_and_large_logits() -> None:
    logits = torch.randn(3, 20_000, device=DEVICE) * 40
    logits[0, 17_000], logits[1] = 5000.0, -3000.0
    labels = torch.tensor([17_000, 3, 19_999], device=DEVICE)
    expected_grad = logits.clone()
    expected = cross_entropy_reference_(expected_grad, labels, Transform(20_000), -100)
    losses = cross_entropy_(logits, labels, Transform(20_000), -100)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits, expected_grad, rtol=1e-3, atol=1e-6)


@compiled_or_interpreted
def test_cross_entropy_label_in_every_place_of_a_row() -> None:
    """Its gradient is written last, over what the blocks wrote."""
    columns = 8192 + 40
    labels = torch.tensor([0, 7, 8, 4095, 8191, 8192, columns - 1], device=DEVICE)
    logits = torch.zeros(len(labels), columns, device=DEVICE)
    cross_entropy_(logits, labels, Transform(columns), -100)
    expected = torch.full_like(logits, 1 / columns)
    expected[range(len(labels)), labels] -= 1
    torch.testing.assert_close(logits, expected)


@compiled_or_interpreted
def test_cross_entropy_without_gradient_leaves_the_logits() -> None:
    logits = torch.randn(3, 300, device=DEVICE)
    labels = torch.tensor([0, -100, 299], device=DEVICE)
    before = logits.clone()
    losses = cross_entropy_(logits, labels, Transform(300), -100, need_grad=False)
    assert torch.equal(logits, before)
    torch.testing.assert_close(losses, cross_entropy_(logits, labels, Transform(300), -100))


@compiled_or_interpreted
def test_cross_entropy_of_labels_that_do_not_exist_is_nan() -> None:
    logits = torch.randn(4, 48, device=DEVICE)
    labels = torch.tensor([40, -1, 39, 1 << 40], device=DEVICE)
    losses = cross_entropy_(logits, labels, Transform(40), -100)
    assert losses.isnan().tolist() == [True, True, False, True]
    assert logits[:, :40].isnan().all(1).tolist() == [True, True, False, True]


@compiled_or_interpreted
def test_cross_entropy_of_infinite_and_nan_logits_is_nan() -> None:
    logits = torch.randn(3, 300, device=DEVICE)
    logits[0, 5], logits[1, 5], logits[2, 5] = float("inf"), float("nan"), -float("inf")
    losses = cross_entropy_(logits, torch.zeros(3, dtype=torch.long, device=DEVICE), Transform(300), -100)
    assert losses.isnan().tolist() == [True, True, False]


@compiled_or_interpreted
@pytest.mark.parametrize("items", [0, 4], ids=["divided by zero", "divided"])
def test_cross_entropy_of_ignored_rows_is_zero(items) -> None:
    logits = torch.randn(3, 300, device=DEVICE)
    scale = torch.tensor(items, device=DEVICE).float().reciprocal()
    losses = cross_entropy_(logits, torch.full((3,), -100, device=DEVICE), Transform(300), -100, scale, z_loss=0.1)
    assert losses.count_nonzero() == logits.count_nonzero() == 0


@compiled_or_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("size", "factor"),
    [*itertools.product([(0,), (1,), (3, 7)], [1.0, 1 / 3, 0.0]), ((5 * 4096 + 3,), 1 / 3)],
)
def test_scale(size, factor, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "_PROGRAMS", 2)  # which take several blocks each
    tensor = torch.randn(size, device=DEVICE).to(dtype)
    expected = scale_reference_(tensor.clone(), torch.tensor(factor, device=DEVICE))
    assert scale_(tensor, torch.tensor(factor, device=DEVICE)) is tensor
    # The interpreter cuts where a GPU rounds to bf16.
    torch.testing.assert_close(tensor, expected, rtol=1e-2 if dtype == torch.bfloat16 else 0, atol=0)


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
    assert sum_rows(rows[:0], row, None, torch.float32).tolist() == [[0.0], [0.0]]
    assert sum_rows_reference(rows[:0], row, None, torch.float32).tolist() == [[0.0], [0.0]]


@compiled_or_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [(3, 8, 16), (2, 5, 13), (1, 1, 1), (2, 70, 64), (0, 4, 4)])
def test_dequantize_nf4(size, dtype) -> None:
    """Also a last block that is not full, and more than a program's values."""
    packed = quantize_nf4(torch.randn(size, device=DEVICE))
    assert runs_on(packed)
    expected = dequantize_nf4_reference(packed, size, dtype)
    tolerance = 0 if dtype == torch.float32 else 1e-2  # bf16 is cut off, not rounded, where kernels are interpreted
    torch.testing.assert_close(dequantize_nf4(packed, size, dtype), expected, rtol=tolerance, atol=0)


@compiled_or_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_square_sum(dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipstream.kernels.square_sum._PROGRAMS", 3)  # so that one of them takes several blocks
    tensors = [torch.randn(size, device=DEVICE).to(dtype) for size in ((1,), (0,), (5, 7000), (4096,), (3, 4097))]
    tensors.append(tensors[2].t())
    exact = sum(tensor.double().square().sum() for tensor in tensors)
    for found in (square_sum(tensors), square_sum_reference(tensors)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(square_sum(tensors), square_sum(tensors), rtol=0, atol=0)
    for value in (float("nan"), float("inf")):
        tensors[4][2, 4000] = value
        assert not torch.isfinite(square_sum(tensors))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_norm_of_large_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large, small and transposed gradients in one norm, and no wait for the device."""
    monkeypatch.setattr("slipstream.parallel.clip._LARGE", 1000)
    params = []
    for index, dtype in enumerate([torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16]):
        param = torch.nn.Parameter(torch.zeros(100, 10 if index == 3 else 50, dtype=dtype, device="cuda"))
        param.grad = torch.randn_like(param)
        params.append(param)
    params[2].grad = torch.randn(50, 100, device="cuda").bfloat16().t()
    exact = sum(param.grad.double().square().sum() for param in params).sqrt()
    total_grad_norm(params)
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = total_grad_norm(params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(norm.double(), exact, rtol=1e-5, atol=0)
