"""Fifty steps on real text: the loss curve is Transformers' own."""

import itertools
from pathlib import Path

import pytest
import torch

import slipstream
from slipstream.optim import AdamW
from tests.tiny_models import tiny_model

STEPS, ROWS, LENGTH = 50, 4, 64
TEXT = Path(__file__).parents[1] / "LICENSE"


def batches(device: str) -> torch.Tensor:
    """Bytes of the licence as tokens, other ones every step."""
    ids = torch.tensor(list(TEXT.read_bytes()), dtype=torch.long, device=device)
    return ids[: STEPS * ROWS * LENGTH // 2].repeat(2).view(STEPS, ROWS, LENGTH)


def curve(model, optimizer, device: str) -> torch.Tensor:
    losses = []
    for ids in batches(device):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama"])
def test_fifty_steps(model_type) -> None:
    plain, ours = tiny_model(model_type, None).train(), tiny_model(model_type, None).train()
    ours.load_state_dict(plain.state_dict())
    slipstream.accelerate(ours)
    expected = curve(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3), "cpu")
    got = curve(ours, AdamW(ours.parameters(), lr=1e-3), "cpu")
    assert expected[-5:].mean() < expected[0] - 1.0  # it does learn
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "llama"])
def test_fifty_steps_in_bf16_within_noise(model_type) -> None:
    """No further from the fp32 curve than twice what plain Transformers is in bf16."""
    start = tiny_model(model_type, None).state_dict()
    curves = {}
    for name, dtype in itertools.product(("plain", "ours"), (torch.float32, torch.bfloat16)):
        if (name, dtype) == ("ours", torch.float32):
            continue
        model = tiny_model(model_type, None).train()
        model.load_state_dict(start)
        model = model.to("cuda", dtype)
        if name == "ours":
            slipstream.accelerate(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        curves[name, dtype] = curve(model, optimizer, "cuda")
    truth = curves["plain", torch.float32]
    plain, ours = ((curves[name, torch.bfloat16] - truth).abs().mean() for name in ("plain", "ours"))
    assert ours <= 2 * plain + 0.01
