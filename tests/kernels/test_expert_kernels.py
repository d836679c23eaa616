"""The kernels of the expert path against their references."""

import itertools
import math

import pytest
import torch

from slipstream.kernels.add_low_rank import add_low_rank_, add_low_rank_reference_
from slipstream.kernels.expert_activation import (
    FUNCTIONS,
    Activation,
    activation_backward,
    activation_backward_reference,
    activation_forward,
    activation_forward_reference,
)
from slipstream.kernels.gather_rows import gather_rows, gather_rows_reference
from slipstream.kernels.sort_by_expert import sort_by_expert, sort_by_expert_reference
from slipstream.kernels.sum_rows import sum_rows, sum_rows_reference
from slipstream.moe.grouped_mm import grouped_mm
from tests.kernels.conditions import DEVICE, INTERPRETED, compiled_or_interpreted

pytestmark = compiled_or_interpreted


def routed(tokens: int, slots: int, experts: int, absent: float = 0.0) -> torch.Tensor:
    idx = torch.rand(tokens, max(experts, slots), device=DEVICE).topk(slots, dim=1).indices % experts
    return idx.masked_fill(torch.rand(tokens, slots, device=DEVICE) < absent, experts)


@pytest.mark.parametrize(
    ("size", "absent"),
    [
        *itertools.product([(0, 2, 4), (1, 1, 1), (33, 3, 5), (64, 4, 3)], [0.0, 0.4, 1.0]),
        ((700, 8, 128), 0.4),
        ((90, 22, 512), 0.4),
    ],
)
def test_sort_by_expert(size, absent) -> None:
    idx, experts = routed(*size, absent), size[2]
    here = int((idx < experts).sum())
    for num_rows in {idx.numel(), here}:
        slot, row, ends, expert = sort_by_expert(idx, experts, num_rows)
        expected = sort_by_expert_reference(idx, experts, num_rows)
        assert torch.equal(slot[:here], expected[0][:here])
        assert torch.equal(row, expected[1])
        assert torch.equal(ends, expected[2])
        assert torch.equal(expert[:here], expected[3][:here])
        assert slot.shape == expert.shape == (num_rows,)
        for tensor, bound in ((slot, idx.numel()), (expert, experts)):  # the rest can be indexed with
            assert ((tensor >= 0) & (tensor < bound)).all()


@pytest.mark.parametrize("hidden", [8, 300])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_gather_rows(tokens, hidden) -> None:
    x = torch.randn(tokens, hidden, device=DEVICE)
    slot = torch.randperm(tokens * 3, device=DEVICE).to(torch.int32)
    ends = torch.tensor([tokens, 2 * tokens], dtype=torch.int32, device=DEVICE)
    got = gather_rows(x, slot, 3, ends, torch.bfloat16)
    expected = gather_rows_reference(x, slot, 3, ends, torch.bfloat16)
    torch.testing.assert_close(got[: 2 * tokens], expected[: 2 * tokens])
    assert got.shape == expected.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_sum_rows_with_biases(tokens, dtype) -> None:
    idx = routed(tokens, 3, 4, absent=0.3)
    rows = torch.randn(tokens * 3, 40, device=DEVICE).to(dtype)
    row = sort_by_expert_reference(idx, 4, tokens * 3)[1]
    weights, bias = torch.rand(tokens, 3, device=DEVICE), torch.randn(4, 40, device=DEVICE).to(dtype)
    torch.testing.assert_close(
        sum_rows(rows, row, weights, dtype, bias, idx), sum_rows_reference(rows, row, weights, dtype, bias, idx)
    )


ACTIVATIONS = {
    **{f"{name} {'gated' if gated else 'plain'}": Activation(name, gated) for name in FUNCTIONS for gated in (0, 1)},
    "gpt-oss": Activation("silu", True, True, 1.702, 1.0, 1.0),
    "clamped": Activation("silu", True, False, 1.0, 0.7),
    "interleaved": Activation("gelu", True, True),
}


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("tokens", "inner"), [(0, 8), (1, 1), (6, 40), (2, 2100)])
def test_activation(tokens, inner, biased, activation) -> None:
    experts, slots = 4, 3
    idx = routed(tokens, slots, experts, absent=0.3)
    here = int((idx < experts).sum())
    slot, _, ends, expert = sort_by_expert_reference(idx, experts, idx.numel())
    width = inner * (2 if activation.gated else 1)
    hidden = torch.randn(idx.numel(), width, device=DEVICE)
    hidden[here:] = math.nan  # what no expert here owns is never read
    bias = torch.randn(experts, width, device=DEVICE) if biased else None
    grad = torch.randn(idx.numel(), inner, device=DEVICE)
    weights = torch.rand(tokens, slots, device=DEVICE)
    got = activation_forward(hidden, bias, expert, ends, activation)
    expected = activation_forward_reference(hidden, bias, expert, ends, activation)
    torch.testing.assert_close(got[:here], expected[:here], rtol=1e-5, atol=1e-5)
    arguments = (slot, weights, activation)
    gradients = activation_backward(hidden, bias, expert, ends, grad.clone(), *arguments)
    references = activation_backward_reference(hidden, bias, expert, ends, grad.clone(), *arguments)
    for field in ("hidden_RN", "weighted_RI"):
        got, expected = getattr(gradients, field), getattr(references, field)
        torch.testing.assert_close(got[:here], expected[:here], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients.weights_TK, references.weights_TK, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rows_that_torch_pads(dtype) -> None:
    """Where only the inner width is not a multiple of 16 bytes, torch's grouped GEMM leaves room between rows."""
    experts, inner, activation = 2, 7, Activation("silu", False)
    idx = torch.tensor([[0], [1], [1], [0], [1], [1]], device=DEVICE)
    slot, _, ends, expert = sort_by_expert_reference(idx, experts, 6)
    down = torch.randn(experts, inner, 16, device=DEVICE, dtype=dtype)
    rows, hidden = (torch.randn(6, width, device=DEVICE).to(dtype) for width in (16, inner))
    grad = grouped_mm(rows, down.transpose(1, 2), ends)
    assert grad.is_contiguous()
    padded = grad.new_full((6, 8), math.nan)[:, :inner].copy_(grad)
    weights = torch.rand(6, 1, device=DEVICE)
    references = activation_backward_reference(hidden, None, expert, ends, grad.clone(), slot, weights, activation)
    for given in (grad, padded):
        gradients = activation_backward(hidden, None, expert, ends, given, slot, weights, activation)
        for got, expected in zip(gradients, references, strict=True):
            torch.testing.assert_close(got, expected)


# Rows of each expert, and how many belong to none.
LOADS = {
    "skewed": ([0, 90, 1, 0, 0, 64, 3, 0], 0),
    "many in a block": ([1, 2, 0, 3] * 10, 0),
    "some elsewhere": ([30, 0, 40, 0], 70),
    "none here": ([0, 0, 0], 9),
    "no rows": ([0, 0], 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rank", "width"), [(8, 8), (16, 136), (24, 264), (72, 48), (16, 37)])
@pytest.mark.parametrize("load", LOADS)
def test_add_low_rank(load, rank, width, dtype) -> None:
    counts, elsewhere = LOADS[load]
    experts, here = len(counts), sum(counts)
    rows = here + elsewhere
    ends = torch.tensor(counts, device=DEVICE).cumsum(0, dtype=torch.int32)
    expert = torch.repeat_interleave(torch.tensor([*counts, elsewhere])).clamp(max=experts - 1).to(DEVICE, torch.int32)
    out = torch.randn(rows, width, device=DEVICE).to(dtype)
    low = torch.randn(rows, rank, device=DEVICE).to(dtype)
    low[here:] = math.nan
    # In the order in memory that autograd's transposes give, too.
    b = torch.randn(experts, rank, width, device=DEVICE).to(dtype)
    got, want = out.clone(), out.clone()
    assert add_low_rank_(got, low, b.mT.contiguous().mT, expert, ends) is got
    add_low_rank_reference_(want, low, b, expert, ends)
    assert torch.equal(got[here:], out[here:])
    torch.testing.assert_close(got, want)
    exact = out[:here].double() + torch.einsum("ra,rab->rb", low[:here].double(), b[expert[:here].long()].double())
    # Rounded once, by half of the last place; the interpreter cuts it off.
    for result, places in ((want, 0.51), (got, 1.01 if INTERPRETED else 0.51)):
        torch.testing.assert_close(result[:here].double(), exact, rtol=torch.finfo(dtype).eps * places, atol=1e-4)


def test_add_low_rank_into_a_part_of_wider_rows() -> None:
    wide = torch.randn(70, 32, device=DEVICE)
    low, b = torch.randn(70, 8, device=DEVICE), torch.randn(1, 8, 24, device=DEVICE)
    expert, ends = torch.zeros(70, dtype=torch.int32, device=DEVICE), torch.tensor([70], device=DEVICE).int()
    want = wide.clone()
    want[:, :24] += low @ b[0]
    add_low_rank_(wide[:, :24], low, b, expert, ends)
    torch.testing.assert_close(wide, want)
