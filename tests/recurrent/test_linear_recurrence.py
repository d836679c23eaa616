"""Linear recurrences in plain PyTorch: RG-LRU and WKV against Transformers' loops, alone and in models."""

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

import slipstream
from slipstream.compilation import compile_layers
from slipstream.recurrent import install
from slipstream.recurrent.linear_recurrence import linear_recurrence, wkv
from tests.tiny_models import tiny_batch, tiny_model

MODELS = ["recurrent_gemma", "rwkv"]


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


def _calls(model: Any, ids: torch.Tensor) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(input_ids=ids, use_cache=False)
    return sum(event.count for event in profile.key_averages() if event.key == "slipstream::linear_recurrence")


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("model_type", MODELS)
def test_models_compute_the_same(model_type: str) -> None:
    """As they are, and compiled, each layer one graph."""
    torch.compiler.reset()
    plain, ids = tiny_model(model_type), tiny_batch(2, 19)
    expected = _step(plain, ids)
    model = slipstream.accelerate(tiny_model(model_type))
    _same(_step(model, ids), expected)
    assert _calls(model, ids)
    assert not _calls(plain, ids)  # in the same process
    compile_layers(model, backend="aot_eager")
    counters.clear()
    _same(_step(model, ids), expected)
    assert counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    torch.compiler.reset()


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("model_type", MODELS)
def test_generation_keeps_transformers_states(model_type: str) -> None:
    plain = tiny_model(model_type).eval()
    model = slipstream.accelerate(copy.deepcopy(plain))
    ids = tiny_batch(1, 12)
    written = [m.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (plain, model)]
    assert torch.equal(*written)


def test_what_describe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> Any:
        model = slipstream.accelerate(tiny_model("recurrent_gemma"), backend={"compile": "none"})
        return [c.chosen for c in slipstream.describe(model).choices if c.operation == "recurrent"]

    assert not found()  # Transformers' loop
    monkeypatch.setattr(install, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert found() == ["triton"]
