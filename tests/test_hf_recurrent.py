"""What slipstream/hf_recurrent.py relies on in Transformers. A failure here means that upstream moved something."""

import inspect
import sys
from typing import Any

import pytest
import torch

from slipstream import hf_recurrent
from tests.tiny_models import tiny_batch, tiny_model


def test_mamba_scan_can_be_replaced() -> None:
    """By a name of the modelling file, which the layers look up at every call; put back afterwards."""
    model = tiny_model("nemotron_h")
    calls = []

    def scan(x_BSHD: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, **rest):  # type: ignore[no-untyped-def]
        calls.append((x_BSHD.shape, dt.shape, B.shape == C.shape))
        return torch.zeros_like(x_BSHD)

    ids = tiny_batch(1, 16)
    before = model(input_ids=ids, use_cache=False).logits
    module = sys.modules[type(model).__module__]
    conv = module.causal_conv1d_fn
    with hf_recurrent.scanning_by(model, {hf_recurrent.MAMBA_SCAN: scan}):
        assert module.causal_conv1d_fn is inspect.unwrap(conv)
        model(input_ids=ids, use_cache=False)
    config = model.config
    heads = (1, 16, config.mamba_num_heads)
    mamba = sum(kind == "linear_attention" for kind in config.layer_types)
    assert calls == [((*heads, config.mamba_head_dim), heads, True)] * mamba
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    assert module.causal_conv1d_fn is conv
    with hf_recurrent.scanning_by(tiny_model("llama"), {hf_recurrent.MAMBA_SCAN: scan}):  # has none
        pass


@pytest.mark.parametrize("name", ["jamba", "mamba", "falcon_mamba", "zamba"])
def test_a_selective_scan_is_told_whose_layer_calls_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = tiny_model(name), []
    original = hf_recurrent.recurrent_functions(model)[hf_recurrent.SELECTIVE_SCAN]

    def scan(*args: Any, **kwargs: Any) -> Any:
        told.append(kwargs["use_associative_scan"])
        return original(*args, **kwargs)

    for module in model.modules():
        hf_recurrent.ask_for_scan(module, "ours")
    monkeypatch.setitem(vars(sys.modules[type(model).__module__]), hf_recurrent.SELECTIVE_SCAN, scan)
    model(input_ids=tiny_batch(1, 4), use_cache=False)
    assert set(told) == {"ours"}


def test_the_loops_that_stay_outside_of_graphs_are_there() -> None:
    """By the names that Transformers gives them."""
    assert hf_recurrent.looping_modules(tiny_model("jetmoe"))
    assert not hf_recurrent.looping_modules(tiny_model("llama"))
