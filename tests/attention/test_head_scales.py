"""Against Transformers' norm, and that the gradient of a scale sums numbers of a token and head."""

import copy
import pickle
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import slipstream
from slipstream import hf_models
from slipstream.attention import head_scales
from tests.tiny_models import tiny_batch, tiny_model

HEADS, WIDTH = 2, 16


def norms(scale_dtype: torch.dtype) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = tiny_model("zaya")
    plain = next(module for module in model.modules() if type(module).__name__ == hf_models.ZAYA_QK_NORM)
    plain = copy.deepcopy(plain).to(scale_dtype)
    plain.temp.data = torch.randn_like(plain.temp)
    ours = copy.deepcopy(plain)
    assert head_scales.install(ours)
    return plain, ours


def states(norm: Any, dtype: torch.dtype, tokens: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    heads = norm.temp.numel()
    queries, keys = (torch.randn(3, tokens, count, WIDTH).to(dtype) for count in (4 * heads, heads))
    keys[0, 0] = 0  # shorter than what lengths are clamped to
    return queries.requires_grad_(), keys.requires_grad_()


def outputs(norm: Any, dtype: torch.dtype, computed: torch.dtype | None = None) -> list[torch.Tensor]:
    """And the gradients."""
    leaves = [leaf.detach().to(computed or dtype).requires_grad_() for leaf in states(norm, dtype)]
    found = norm(*leaves)
    norm.temp.grad = None
    sum((output.float() * torch.arange(output.numel()).view(output.shape).cos()).sum() for output in found).backward()  # type: ignore[union-attr]
    return [*found, *(leaf.grad for leaf in (*leaves, norm.temp))]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("dtype", "scale_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_the_same_states_and_gradients(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    """As near to what fp32 gives."""
    plain, ours = norms(scale_dtype)
    exact = outputs(copy.deepcopy(plain).float(), dtype, torch.float32)
    for found, expected, true in zip(outputs(ours, dtype), outputs(plain, dtype), exact, strict=True):
        assert found.dtype == expected.dtype
        error, its = ((one.float() - true).norm() / true.norm() for one in (found, expected))
        assert error < 1e-6 if dtype == torch.float32 else error < 1.2 * its + 1e-3


@pytest.mark.parametrize("change", [False, True])
def test_the_gradient_of_a_scale_sums_a_number_a_token(change: bool) -> None:
    """What Inductor takes long over is a sum over tokens and widths at once."""
    plain, ours = norms(torch.float32)
    norm = ours if change else plain
    queries, keys = states(norm, torch.float32, tokens=64)
    summed: list[int] = []

    def look(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.sum.dim_IntList and node.meta["val"].numel() == norm.temp.numel():
                summed.append(node.args[0].meta["val"].numel() // norm.temp.numel())
        return make_boxed_func(graph)

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=look)
    compiled = torch.compile(norm, backend=backend)
    sum(output.sum() for output in compiled(queries, keys)).backward()  # type: ignore[union-attr]
    torch.compiler.reset()
    tokens = keys.shape[0] * keys.shape[1]
    assert max(summed) == (tokens if change else tokens * WIDTH)


def test_only_where_layers_compile() -> None:
    def changed(model: Any) -> list[bool]:
        return [
            "forward" in module.__dict__
            for module in model.modules()
            if type(module).__name__ == hf_models.ZAYA_QK_NORM
        ]  # fmt: skip

    assert not any(changed(slipstream.accelerate(tiny_model("zaya"))))
    model = slipstream.accelerate(tiny_model("zaya"), backend={"compile": "layers"})
    assert all(changed(model))
    assert len(changed(model)) > 0
    assert not head_scales.install(tiny_model("llama"))


def test_a_copy_has_scales_of_its_own() -> None:
    model = tiny_model("zaya")
    head_scales.install(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for name, parameter in other.named_parameters():
            if name.endswith("qk_norm.temp"):
                parameter.data.fill_(1.0)
        mine, its = (m(input_ids=tiny_batch(1, 9), use_cache=False).logits for m in (model, other))
        assert not torch.equal(mine, its)
