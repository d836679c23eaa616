"""MiniMax's lightning attention against Transformers' loop over blocks."""

import copy
from typing import Any

import pytest
import torch

import slipstream
from slipstream import hf_recurrent
from slipstream.coverage.checks import packed_batch
from slipstream.recurrent.lightning import lightning_attention
from tests.tiny_models import tiny_batch, tiny_model


def attention(**changes: Any) -> Any:
    torch.manual_seed(0)
    found = hf_recurrent.modules_named(tiny_model("minimax", None, **changes), hf_recurrent.LIGHTNING)
    assert found
    return found[0]


def padded(length: int) -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, :7] = 0
    return mask


def outputs(function: Any, module: Any, hidden: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, state and gradients."""
    hidden = hidden.clone().requires_grad_()
    module.zero_grad()
    found, state = function(hidden)
    (found.float() * torch.arange(found.numel()).view(found.shape).cos()).sum().backward()
    return [found, state, hidden.grad, *(parameter.grad.clone() for parameter in module.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 16, 41])
def test_the_same_numbers_and_gradients(length: int, masked: bool) -> None:
    """At a part of a block, a block, and several with one cut short."""
    module = attention(block_size=16)
    hidden = torch.randn(2, length, module.qkv_proj.in_features)
    mask = padded(length) if masked else None
    expected = outputs(lambda x: type(module).forward(module, x, None, mask), module, hidden)
    found = outputs(lambda x: lightning_attention(module, x, mask, None), module, hidden)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= 1e-5 * other.norm().clamp(min=1e-4)


def test_the_state_is_that_of_the_last_document() -> None:
    module = attention()
    hidden = torch.randn(1, 30, module.qkv_proj.in_features)
    document = (torch.arange(30) >= 11).int()[None]
    out, state = lightning_attention(module, hidden, None, document)
    for inside in (slice(0, 11), slice(11, 30)):
        alone, last = type(module).forward(module, hidden[:, inside], None, None)
        torch.testing.assert_close(out[:, inside], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


def test_generation_and_rows_of_one_document_stay_as_they_are() -> None:
    plain = tiny_model("minimax").eval()
    model = slipstream.accelerate(copy.deepcopy(plain))
    assert slipstream.describe(model)["recurrent"].chosen == "torch"
    ids = tiny_batch(2, 23)
    with torch.no_grad():
        expected = plain(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)
    written = [m.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (plain, model)]
    assert torch.equal(*written)
    # Copies run on their own weights.
    other = copy.deepcopy(model)
    batch = packed_batch((9, 14), seed=2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        assert model(**batch, use_cache=False).logits.any()
        assert not other(**batch, use_cache=False).logits.any()
