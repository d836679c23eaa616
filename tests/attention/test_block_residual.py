"""Against Transformers' residual."""

import copy
import pickle
from typing import Any

import pytest
import torch

import slipstream
from slipstream import hf_models
from slipstream.attention import block_residual
from tests.tiny_models import tiny_batch, tiny_model


def residuals(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == hf_models.BLOCK_RESIDUAL]


def test_a_model_has_them_and_copies_some_of_their_own() -> None:
    model = slipstream.accelerate(tiny_model("inkling2_text"))
    assert all("forward" in vars(one) for one in residuals(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for one in residuals(other):
            one.query.data.normal_()
        mine, its = (m(input_ids=tiny_batch(1, 9), use_cache=False).logits for m in (model, other))
        assert not torch.equal(mine, its)
    assert not block_residual.install(tiny_model("llama"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [0, 1, 4])
@pytest.mark.parametrize("queries", [1, 3])
def test_the_same_mixtures_and_gradients(queries: int, blocks: int, dtype: torch.dtype) -> None:
    plain = residuals(tiny_model("inkling2_text"))[0]
    width = plain.query.shape[-1]
    torch.manual_seed(0)
    plain.query = torch.nn.Parameter(torch.randn((width,) if queries == 1 else (queries, width)).to(dtype))
    ours = copy.deepcopy(plain)
    assert block_residual.install(ours)
    states, partial = torch.randn(2, 5, blocks, width), torch.randn(2, 5, width)
    grads = torch.randn(queries, 2, 5, width)
    found = []
    for module in (plain, ours):
        leaves = [leaf.to(dtype).requires_grad_() for leaf in (states, partial)]
        mixtures = module(*leaves)
        assert len(mixtures) == queries
        torch.autograd.backward(mixtures, list(grads))
        found.append([*mixtures, *(leaf.grad for leaf in leaves), module.query.grad])
    for expected, got in zip(*found, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected)
