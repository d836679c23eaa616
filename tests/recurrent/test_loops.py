"""Models over whose tokens Transformers loops in Python, with our operators in plain PyTorch: the same results, one
graph a layer, and Transformers' own code for generation."""

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import slipstream
from slipstream.compilation import compile_layers
from slipstream.recurrent import install
from tests.tiny_models import tiny_batch, tiny_model

OPERATORS = {
    "jamba": "selective_scan", "mamba": "selective_scan", "falcon_mamba": "selective_scan", "zamba": "selective_scan",
    "recurrent_gemma": "linear_recurrence", "rwkv": "linear_recurrence",
}  # fmt: skip
SLOW = ("mamba", "falcon_mamba", "zamba")
SIZES = {
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1},
    "recurrent_gemma": {},
    "rwkv": {},
}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator runs in its plain form."""
    monkeypatch.setattr(install, "_runs_kernels", lambda x: True)


def _step(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    return {"loss": out.loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-4 * tensor.abs().max().clamp(min=1e-3), name


def _calls(model: Any, ids: torch.Tensor, operator: str) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(input_ids=ids, use_cache=False)
    return sum(event.count for event in profile.key_averages() if event.key == f"slipstream::{operator}")


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in OPERATORS]
)
def test_models_compute_the_same(model_type: str) -> None:
    plain = tiny_model(model_type)
    model = slipstream.accelerate(copy.deepcopy(plain))
    ids, operator = tiny_batch(2, 19), OPERATORS[model_type]
    _same(_step(model, ids), _step(plain, ids))
    assert _calls(model, ids, operator)
    assert not _calls(plain, ids, operator)  # in the same process


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("model_type", SIZES)
def test_layers_compile_to_one_graph_each(model_type: str) -> None:
    torch.compiler.reset()
    model = slipstream.accelerate(tiny_model(model_type, **SIZES[model_type]))
    ids = tiny_batch(2, 19)
    expected = _step(model, ids)
    compile_layers(model, backend="aot_eager")
    counters.clear()
    found = _step(model, ids)
    assert counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    _same(found, expected)
    torch.compiler.reset()


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("model_type", SIZES)
def test_generation_keeps_transformers_states(model_type: str) -> None:
    plain = tiny_model(model_type).eval()
    model = slipstream.accelerate(copy.deepcopy(plain))
    ids = tiny_batch(1, 12)
    written = [m.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (plain, model)]
    assert torch.equal(*written)


@pytest.mark.parametrize("model_type", SIZES)
def test_what_describe_says(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> Any:
        model = slipstream.accelerate(tiny_model(model_type), backend={"compile": "none"})
        return [(c.chosen, c.why) for c in slipstream.describe(model).choices if c.operation == "recurrent"]

    assert not found()  # Transformers' loop
    monkeypatch.setattr(install, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ((chosen, why),) = found()
    assert chosen == "triton"
    assert "never packed" in why
