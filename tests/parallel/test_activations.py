"""What activation checkpointing computes again in backward."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import slipstream
from tests.tiny_models import tiny_batch, tiny_model


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def backward_calls(model_type: str, mode: str) -> tuple[Counter[str], torch.Tensor]:
    model = slipstream.accelerate(
        tiny_model(model_type, None).train(), distributed_setup={"activation_checkpointing": mode}
    )
    loss = model(input_ids=tiny_batch(), labels=tiny_batch()).loss
    with Count() as count:
        loss.backward()
    return count.calls, model.get_input_embeddings().weight.grad


@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama", "deepseek_v3"])
def test_selective_repeats_no_gemm_and_no_attention(model_type) -> None:
    (none, expected), (selective, grad), (full, _) = (
        backward_calls(model_type, mode) for mode in ("none", "selective", "full")
    )
    torch.testing.assert_close(grad, expected)
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    for operator in ("aten::mm", "aten::bmm", "aten::addmm", "slipstream::experts", attention):
        assert selective[operator] == none[operator], operator
    assert selective["aten::rsqrt"] > none["aten::rsqrt"]  # norms run again
    assert full["aten::mm"] > none["aten::mm"]
