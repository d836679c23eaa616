"""Slipstream against plain Transformers with `eager` experts and its own loss, in fp32: loss and every gradient."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

import slipstream
from slipstream import hf, hf_recurrent
from slipstream.deferred_logits import DeferredLogits
from tests.tiny_models import moe_architectures, tiny_batch, tiny_model

RELATIVE = 1e-5

STRICT = [
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "nemotron_h",
    "olmoe",
    "qwen2_moe",
    "granitemoe",
    "glm4_moe",
    "llama",
    "qwen3",
    "gemma2",
]

# Experts that Transformers does not call through the interface: they load and train as there.
OUTSIDE = ["jetmoe", "doge"]
# Those whose modules get it here.
ADAPTED = ["llama4_text", "dbrx", "longcat_flash"]


def backward(model: PreTrainedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(3)  # for models with dropout or jitter
    ids = tiny_batch()
    labels = ids.clone()
    labels[:, :5] = -100
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(model_type: str, floor: float, **changes: int) -> PreTrainedModel:
    """Largest error of each gradient over its own largest value, or over `floor` x the median of those values where
    that is larger: a gradient far below the others is a difference of larger numbers and carries their rounding."""
    reference = tiny_model(model_type, None if model_type in OUTSIDE + ADAPTED else "eager", **changes)
    ours = slipstream.accelerate(copy.deepcopy(reference))
    expected_loss, expected = backward(reference)
    loss, grads = backward(ours)
    assert abs(loss - expected_loss) <= RELATIVE * abs(expected_loss)
    assert grads.keys() == expected.keys()
    scale = torch.stack([grad.abs().max() for grad in expected.values()]).median() * floor
    exact: dict[str, torch.Tensor] = {}
    for name, grad in expected.items():
        error = (grads[name] - grad).abs().max()
        if error > RELATIVE * torch.maximum(grad.abs().max(), scale):
            # Transformers' own rounding: on some processors Gemma 4's is 2e-5.
            exact = exact or backward(copy.deepcopy(reference).double())[1]
            assert error <= (grad - exact[name]).abs().max(), (name, error.item())
    return ours


@pytest.mark.parametrize("model_type", STRICT)
def test_loss_and_every_gradient(model_type: str) -> None:
    model = compare(model_type, floor=0.0)
    assert slipstream.describe(model)["loss"].chosen == "fused"


@pytest.mark.parametrize("model_type", sorted(set(moe_architectures()) - set(STRICT)))
def test_every_architecture_of_the_interface(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    touched = []
    monkeypatch.setattr(DeferredLogits, "materialize", lambda self: touched.append(self))
    # Gated delta net on CPU is noisier than its experts: Transformers' own grouped_mm is as far from eager.
    floor = 10.0 if model_type in ("qwen3_next", "qwen3_5_moe_text", "qwen4_exp_text") else 1.0
    model = compare(model_type, floor)
    assert not touched
    report = slipstream.describe(model)
    assert (report["experts"].chosen, report["loss"].chosen) == ("slipstream", "fused")


@pytest.mark.parametrize(("model_type", "changes"), [
    *((name, {}) for name in ADAPTED), ("llama4_text", {"num_experts_per_tok": 1}),
    ("longcat_flash", {"moe_topk": 6}),
])  # fmt: skip
def test_adapted_architectures(model_type: str, changes: dict[str, int]) -> None:
    model = compare(model_type, floor=1.0, **changes)
    report = slipstream.describe(model)
    assert (report["experts"].chosen, report["loss"].chosen) == ("slipstream", "fused")
    before = tiny_model(model_type, None, **changes)
    assert list(model.state_dict()) == list(before.state_dict())
    copied = copy.deepcopy(model)
    assert next(hf.experts_modules(copied))[1].forward.__self__ is next(hf.experts_modules(copied))[1]
    slow = slipstream.accelerate(before, backend={"experts": "transformers"})
    assert slipstream.describe(slow)["experts"].chosen == "transformers"


@pytest.mark.parametrize(("model_type", "experts"), [("jetmoe", "grouped_mm"), ("doge", "transformers")])
def test_architectures_outside_the_interface(model_type: str, experts: str) -> None:
    report = slipstream.describe(compare(model_type, floor=1.0))
    assert (report["experts"].chosen, report["loss"].chosen) == (experts, "fused")
    assert "interface" in report["experts"].why


def test_grouped_projections() -> None:
    """Experts without tokens, widths that `grouped_mm` does not take, copies, and Transformers' own if asked for."""
    reference = tiny_model("jetmoe", None, intermediate_size=50)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith("router.layer.weight"):
                parameter[1:] = -parameter[0]  # the first expert gets a choice of each token, or none
    ours = slipstream.accelerate(copy.deepcopy(reference))
    (_, expected), (_, found) = backward(reference), backward(ours)
    weights = [name for name in expected if name.endswith("linear.weight")]
    assert any(not expected[name][expert].any() for name in weights for expert in range(expected[name].shape[0]))
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)
    assert list(ours.state_dict()) == list(reference.state_dict())
    ids = tiny_batch()
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        assert ours(input_ids=ids).logits.any()
        assert not copied(input_ids=ids).logits.any()
    slow = slipstream.accelerate(tiny_model("jetmoe", None), backend={"experts": "transformers"})
    assert slipstream.describe(slow)["experts"].chosen == "transformers"
    assert hf_recurrent.looping_modules(slow)
    assert not hf_recurrent.looping_modules(ours)
