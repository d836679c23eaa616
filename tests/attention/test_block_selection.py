"""Against Transformers' loop over queries."""

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import slipstream
from slipstream import hf_models
from slipstream.attention import block_selection
from tests.tiny_models import tiny_batch, tiny_model

LENGTH = 75  # no multiple of a block
# 3 blocks of the 18 that the last query sees whole; with few heads, several blocks would score nothing.
CHANGES = {"indexer_budget": 12, "indexer_compress_ratio": 4, "indexer_n_heads": 16}


def pair(**changes: Any) -> tuple[Any, Any]:
    plain = tiny_model("qwen4_exp_text", None, **{**CHANGES, **changes})
    ours = copy.deepcopy(plain)
    assert block_selection.install(ours)
    return plain, ours


def selections(model: Any, **inputs: Any) -> list[torch.Tensor]:
    found = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: found.append(output))
        for module in model.modules()
        if type(module).__name__ == hf_models.QSA_INDEXER
    ]
    with torch.no_grad():
        model(use_cache=False, **inputs)
    for hook in hooks:
        hook.remove()
    return found


def padded(left: bool) -> torch.Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, slice(0, 22) if left else slice(LENGTH - 22, LENGTH)] = 0
    return mask


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [None, padded(left=False), padded(left=True)], ids=["whole", "right", "left"])
def test_the_same_tokens_are_selected(mask: torch.Tensor | None, attn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ours = pair()
    for model in (plain, ours):
        model.set_attn_implementation(attn)
    inputs = {"input_ids": tiny_batch(2, LENGTH), "attention_mask": mask}
    expected = selections(plain, **inputs)
    indexer = next(module for module in plain.modules() if type(module).__name__ == hf_models.QSA_INDEXER)
    if mask is None or attn == "sdpa":
        monkeypatch.setattr(type(indexer), "forward", None)  # not called
    found = selections(ours, **inputs)
    assert len(found) == len(expected) > 0
    for ours_BSS, theirs_BSS in zip(found, expected, strict=True):
        assert torch.equal(ours_BSS, theirs_BSS)
    assert expected[0][0, 0, -1].sum() == 12 + LENGTH % 4


@pytest.mark.parametrize("length", [1, 3, 4, 9])
def test_fewer_tokens_than_blocks(length: int) -> None:
    for model in pair():
        ids = tiny_batch(1, length)
        assert all(
            torch.equal(found[0, 0], torch.ones(length, length).tril().bool())
            for found in selections(model, input_ids=ids)
        )


def test_queries_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ours = pair()
    monkeypatch.setattr(block_selection, "_QUERIES", 7)
    ids = tiny_batch(1, LENGTH)
    for found, expected in zip(selections(ours, input_ids=ids), selections(plain, input_ids=ids), strict=True):
        assert torch.equal(found, expected)


def test_generation_goes_as_before() -> None:
    plain, ours = pair()
    ids = tiny_batch(1, LENGTH)
    texts = [model.generate(ids, max_new_tokens=4, do_sample=False) for model in (plain, ours)]
    assert torch.equal(*texts)


def test_masks_of_other_kinds_go_as_before() -> None:
    plain, ours = pair()
    mask = torch.ones(LENGTH, LENGTH).tril().bool()
    mask[50:, :20] = False  # another document
    inputs = {"input_ids": tiny_batch(1, LENGTH), "attention_mask": mask[None, None]}
    for found, expected in zip(selections(ours, **inputs), selections(plain, **inputs), strict=True):
        assert torch.equal(found, expected)


def test_an_accelerated_model_says_so_and_can_be_copied() -> None:
    model = slipstream.accelerate(tiny_model("qwen4_exp_text", None, **CHANGES))
    assert "for all queries at once" in slipstream.describe(model)["attn"].why
    assert "for all queries at once" not in slipstream.describe(slipstream.accelerate(tiny_model("llama")))["attn"].why
    ids = tiny_batch(1, LENGTH)
    copied = copy.deepcopy(model)
    indexers = [module for module in copied.modules() if type(module).__name__ == hf_models.QSA_INDEXER]
    assert all(indexer.forward.__self__ is indexer for indexer in indexers)
    assert torch.equal(copied(input_ids=ids).logits, model(input_ids=ids).logits)
    assert pickle.loads(pickle.dumps(indexers[0])).forward.__func__.__name__ == "forward"
    assert isinstance(copied(input_ids=ids, use_cache=True).past_key_values, DynamicCache)
