"""What only a GPU shows: bf16 accuracy of the kernels there, no host synchronisation."""

import copy

import pytest
import torch
from transformers import Qwen3MoeConfig

import slipstream
from tests.moe.test_grouped_mlp import ACTIVATIONS, oracle, ours, run
from tests.tiny_models import tiny_batch, tiny_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bf16_experts_are_no_further_from_the_truth_than_the_loop(activation, transposed, biased) -> None:
    tokens, hidden, intermediate, experts, top_k = 512, 256, 128, 16, 4
    function, width = ACTIVATIONS[activation]

    def draw(*size: int) -> torch.Tensor:
        return (torch.randn(*size, device="cuda") * 0.2).bfloat16()

    def weight(inputs: int, outputs: int) -> torch.Tensor:
        return draw(experts, inputs, outputs) if transposed else draw(experts, outputs, inputs).transpose(1, 2)

    idx = torch.rand(tokens, experts, device="cuda").topk(top_k, dim=1).indices
    inputs = {
        "x_TH": draw(tokens, hidden),
        "weights_TK": torch.rand(tokens, top_k, device="cuda").bfloat16(),
        "up_EHN": weight(hidden, width * intermediate),
        "down_EIH": weight(intermediate, hidden),
    }
    if biased:
        inputs |= {"up_bias_EN": draw(experts, width * intermediate), "down_bias_EH": draw(experts, hidden)}
    grad = draw(tokens, hidden)
    out, truth = run(oracle, idx, {n: t.double() for n, t in inputs.items()}, grad, activation=function)
    errors = []
    for path in (oracle, ours):
        got, grads = run(path, idx, inputs, grad, activation=function)
        exact = {"out": (got.double() - out).norm()}
        errors.append(exact | {name: (value.double() - truth[name]).norm() for name, value in grads.items()})
    for name, error in errors[0].items():
        assert errors[1][name] <= 1.2 * error, name


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral", "llama"])
def test_loss_in_bf16(model_type) -> None:
    plain = tiny_model(model_type, None)
    ids = tiny_batch(length=64).cuda()
    exact = plain.cuda()(input_ids=ids, labels=ids, use_cache=False).loss
    plain = plain.bfloat16()
    fast = slipstream.accelerate(copy.deepcopy(plain))
    theirs, mine = (m(input_ids=ids, labels=ids, use_cache=False).loss for m in (plain, fast))
    assert abs(mine - exact) <= 1.2 * abs(theirs - exact) + 2e-3 * exact


def layer_shapes(layers: int = 2) -> slipstream.AutoModelForCausalLM:
    """Two layers of Qwen3-30B-A3B's shapes with 16 experts."""
    config = Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=layers, num_experts=16,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts_per_tok=8, use_cache=False,
    )  # fmt: skip
    with torch.device("cuda"):
        return slipstream.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()


def test_experts_do_not_wait_for_the_device() -> None:
    model = layer_shapes()
    ids = torch.randint(0, 151936, (1, 1024), device="cuda")
    model(input_ids=ids, labels=ids).loss.backward()
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(1024, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    idx = torch.rand(1024, 16, device="cuda").topk(8).indices
    weights = torch.rand(1024, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts(x, idx, weights).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_sdpa_runs_cudnn_on_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper GPU")
    q = torch.randn(1, 32, 1024, 128, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, 4, 1024, 128, device="cuda", dtype=torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        torch.cuda.synchronize()
    assert any("cudnn" in event.key for event in profiler.key_averages())
