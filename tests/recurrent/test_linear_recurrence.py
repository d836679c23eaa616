"""Linear recurrences in plain PyTorch: the operator, and WKV against Transformers' loop."""

import pytest
import torch
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from slipstream.recurrent.linear_recurrence import linear_recurrence, wkv


def test_one_operator_to_autograd_and_torch_compile() -> None:
    torch.manual_seed(0)
    inputs = [torch.rand(2, 9, 5).requires_grad_(), torch.randn(2, 9, 5).mT.contiguous().mT.requires_grad_()]
    torch.library.opcheck(torch.ops.slipstream.linear_recurrence.default, inputs)
    assert torch.autograd.gradcheck(linear_recurrence, [t.detach().double().requires_grad_() for t in inputs])


@pytest.mark.parametrize("size", [1.0, 40.0], ids=["near", "far beyond what fp32 holds as exponentials"])
@pytest.mark.parametrize("length", [2, 37])
def test_wkv(length: int, size: float) -> None:
    torch.manual_seed(length)
    inputs = [torch.randn(6), torch.randn(6), size * torch.randn(2, length, 6), torch.randn(2, length, 6)]
    weight = torch.randn(2, length, 6)
    results = []
    for function in (wkv, lambda *given: rwkv_linear_attention_cpu(*given)[0]):
        given = [tensor.clone().requires_grad_() for tensor in inputs]
        out = function(*given)
        results.append([out, *torch.autograd.grad((out * weight).sum(), given)])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1e-3)
