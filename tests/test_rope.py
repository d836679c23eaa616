"""Against Transformers' own functions, bit by bit, in every architecture that has them."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

import slipstream
from slipstream import hf_models, rope
from slipstream.compilation import compile_layers
from tests.tiny_models import tiny_batch, tiny_model

MODULES = sorted({model_class.__module__ for model_class in MODEL_FOR_CAUSAL_LM_MAPPING.values()})


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = [(module, dict(vars(sys.modules[module]))) for module in MODULES if module in sys.modules]
    for _, names in before:
        for name in rope._FUNCTIONS:
            if name in names:
                names[name] = hf_models.unreplaced(names[name])
    for module, names in before:
        vars(sys.modules[module]).update(names)
    yield
    for module, names in before:
        vars(sys.modules[module]).update(names)


def installed(model_class: Any) -> dict[str, tuple[Any, Any]]:
    """What was replaced, and by what."""
    rope.install(object.__new__(model_class))
    module = vars(sys.modules[model_class.__module__])
    pairs = {name: (hf_models.unreplaced(module[name]), module[name]) for name in rope._FUNCTIONS if name in module}
    return {name: (old, new) for name, (old, new) in pairs.items() if old is not new}


def outputs(function: Any, tensors: list[torch.Tensor], **options: int) -> list[torch.Tensor]:
    """And the gradients."""
    leaves = [tensor.clone().requires_grad_(position < len(tensors) - 2) for position, tensor in enumerate(tensors)]
    found = function(*leaves, **options)
    found = list(found) if isinstance(found, tuple) else [found]
    sum((output.float() * torch.arange(output.numel()).view(output.shape).cos()).sum() for output in found).backward()  # type: ignore[union-attr]
    return [*found, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def inputs(name: str, dtype: torch.dtype, angles_dtype: torch.dtype, part: bool, dim: int) -> list[torch.Tensor]:
    batch, heads, tokens, width = 2, 4, 5, 16
    q, k = torch.randn(batch, tokens, heads, width), torch.randn(batch, tokens, 2, width)
    if dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    angles = torch.randn(batch, tokens, width // 2 if part or name == "_apply_rotary_emb" else width)
    cos, sin = angles.cos().to(angles_dtype), angles.sin().to(angles_dtype)
    if name == "_apply_rotary_emb":
        return [q.to(dtype), cos[:, None], sin[:, None]]
    return [q.to(dtype), k.to(dtype), cos, sin]


def test_the_same_numbers_and_gradients_in_every_architecture() -> None:
    torch.manual_seed(0)
    seen: dict[str, int] = {}
    done = set()
    for model_class in MODEL_FOR_CAUSAL_LM_MAPPING.values():
        if model_class.__module__ in done:
            continue
        done.add(model_class.__module__)
        for name, (old, new) in installed(model_class).items():
            seen[name] = seen.get(name, 0) + 1
            if name.startswith("rotate_half"):
                x = torch.randn(2, 3, 8)
                assert torch.equal(old(x), new(x)), model_class
                continue
            for dtypes in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)):
                for part, dim in ((False, 1), (False, 2), (True, 1)):
                    options = {} if dim == 1 else {"unsqueeze_dim": dim}
                    if name == "_apply_rotary_emb" and (part or options):
                        continue
                    tensors = inputs(name, *dtypes, part, dim)
                    try:
                        expected = outputs(old, tensors, **options)
                    except RuntimeError:
                        assert part, model_class
                        continue
                    for one, other in zip(outputs(new, tensors, **options), expected, strict=True):
                        assert one.dtype == other.dtype
                        assert torch.equal(one, other), (model_class, name)
    assert seen["rotate_half"] > 100
    assert seen["apply_rotary_pos_emb"] > 80
    assert seen["_apply_rotary_emb"] == 1  # GPT-OSS


@pytest.mark.parametrize("model_type", ["cohere", "glm4", "gptj", "nanochat", "qwen4_exp_text", "ernie4_5"])
def test_other_rotations_stay(model_type: str) -> None:
    """Pairs instead of halves, other signs, other parameters."""
    assert "apply_rotary_pos_emb" not in installed(type(tiny_model(model_type)))


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gpt_oss", "phi3"])
def test_a_compiled_layer_makes_no_tensor_of_swapped_halves(model_type: str) -> None:
    def graphs(change: bool) -> tuple[int, torch.Tensor]:
        found = []

        def look(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
            shapes = [node.meta["example_value"].shape for node in graph.graph.nodes if node.target is torch.cat]
            # Not those of angles, which all heads share.
            found.append(sum(len(shape) == 4 and shape[1] > 1 and shape[2] > 1 for shape in shapes))
            return graph.forward

        torch.compiler.reset()
        model = tiny_model(model_type)
        if change:
            rope.install(model)
        compile_layers(slipstream.accelerate(model), look)
        with torch.no_grad():
            logits = model(input_ids=tiny_batch(), use_cache=False).logits
        return max(found), logits

    before, expected = graphs(change=False)
    after, logits = graphs(change=True)
    assert after < before
    assert torch.equal(logits, expected)
    torch.compiler.reset()


def test_only_where_layers_compile() -> None:
    model = slipstream.accelerate(tiny_model("llama"))
    module = vars(sys.modules[type(model).__module__])
    assert hf_models.unreplaced(module["rotate_half"]) is module["rotate_half"]
    model = slipstream.accelerate(tiny_model("llama"), backend={"compile": "layers"})
    assert hf_models.unreplaced(module["rotate_half"]) is not module["rotate_half"]
    again = module["rotate_half"]
    slipstream.accelerate(tiny_model("llama"), backend={"compile": "layers"})
    assert hf_models.unreplaced(module["rotate_half"]) is hf_models.unreplaced(again)  # once, not around itself


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = slipstream.accelerate(tiny_model("llama"), backend={"compile": "layers"})
    assert next(iter(model.parameters())).is_meta
    module = vars(sys.modules[type(model).__module__])
    assert hf_models.unreplaced(module["rotate_half"]) is not module["rotate_half"]
