"""Against Transformers' bias, and that its gradient scatters nothing."""

import copy
import pickle
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import slipstream
from slipstream import hf_models
from slipstream.attention import relative_bias
from tests.tiny_models import tiny_batch, tiny_model

HEADS, EXTENT = 3, 8


def biases(model_type: str = "inkling_text") -> tuple[Any, Any]:
    found = (m for m in tiny_model(model_type).modules() if type(m).__name__ in hf_models.RELATIVE_LOGITS)
    plain = type(next(found))(4, EXTENT)
    torch.manual_seed(0)
    torch.nn.init.normal_(plain.proj)
    ours = copy.deepcopy(plain)
    assert relative_bias.install(ours)
    return plain, ours


@pytest.mark.parametrize("model_type", ["inkling_text", "inkling2_text"])
@pytest.mark.parametrize(
    ("queries", "keys", "first_query", "first_key"),
    [(20, 20, 0, 0), (5, 5, 0, 0), (1, 1, 0, 0), (1, 20, 19, 0), (4, 11, 30, 23), (4, 20, 9, 0)],
    ids=["longer than the extent", "shorter", "one", "generating", "a sliding cache", "a static cache"],
)
def test_the_same_bias_and_gradients(
    model_type: str, queries: int, keys: int, first_query: int, first_key: int
) -> None:
    positions = torch.arange(queries) + first_query, torch.arange(keys) + first_key
    torch.manual_seed(1)
    states = torch.randn(2, queries, HEADS, 4)
    grad = torch.randn(2, HEADS, queries, keys)
    found = []
    for module in biases(model_type):
        leaf = states.clone().requires_grad_()
        bias = module(leaf, *positions)
        bias.backward(grad)
        found.append((bias, leaf.grad, module.proj.grad))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)
    assert torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize("change", [False, True])
def test_nothing_is_scattered(change: bool) -> None:
    module = biases()[change]
    targets: list[str] = []

    def look(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=look)
    positions = torch.arange(20)
    bias = torch.compile(module, backend=backend, fullgraph=True)(torch.randn(2, 20, HEADS, 4), positions, positions)
    bias.square().sum().backward()
    torch.compiler.reset()
    assert any("scatter" in target for target in targets) != change
    assert module.proj.grad is not None


@pytest.mark.parametrize("model_type", ["inkling_text", "inkling2_text"])
def test_models_have_it_and_copies_biases_of_their_own(model_type: str) -> None:
    model = slipstream.accelerate(tiny_model(model_type))
    assert "the gradient of its relative bias is gathered" in slipstream.describe(model)["attn"].why
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for module in other.modules():
            if type(module).__name__ in hf_models.RELATIVE_LOGITS:
                module.proj.data.add_(1.0)
        mine, its = (m(input_ids=tiny_batch(1, 9), use_cache=False).logits for m in (model, other))
        assert not torch.equal(mine, its)
    assert not relative_bias.install(tiny_model("llama"))
