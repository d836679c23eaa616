"""PEFT's adapters on linear layers of our models: in the layer's dtype, and PEFT's own wherever that is not plain."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn

import slipstream
from slipstream.compilation import compile_layers
from slipstream.linear_adapters import AdapterLinear
from tests.tiny_models import tiny_batch, tiny_model

BF16 = torch.bfloat16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def adapted(model: Any, **changes: Any) -> Any:
    """Of the same values each time, in training mode."""
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS,
                                               "init_lora_weights": False, **changes})).train()  # fmt: skip


def pair(dtype: torch.dtype, model_type: str = "llama", **changes: Any) -> tuple[Any, Any]:
    """Adapted: a plain model, and its copy that is ours."""
    base = tiny_model(model_type, None).to(dtype)
    return adapted(copy.deepcopy(base), **changes), adapted(slipstream.accelerate(base), **changes)


def layer_of(model: Any) -> Any:
    return model.get_base_model().model.layers[0].self_attn.q_proj


def run(layer: Any, dtype: torch.dtype, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """Output of one projection, and the gradients of its input and of its adapters' parameters."""
    torch.manual_seed(1)
    x = torch.randn(3, 16, layer.in_features).to(dtype).requires_grad_()
    torch.manual_seed(2)  # of dropout
    out = layer(x, **kwargs)
    torch.manual_seed(3)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return out.detach(), *torch.autograd.grad(out, [x, *trained], torch.randn(out.shape).to(out.dtype))


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


# gpt_oss has biases in attention, which lora_bias wants
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "bias": ("gpt_oss", {"lora_bias": True}),
    "dropout": ("llama", {"lora_dropout": 0.5}),
}


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_16_bits_against_fp32_arithmetic(case: str, dtype: torch.dtype) -> None:
    model_type, changes = CASES[case]
    plain, ours = (layer_of(model) for model in pair(dtype, model_type, **changes))
    seen = []
    for factor in (ours.lora_A["default"], ours.lora_B["default"]):
        factor.register_forward_hook(lambda _, given, out: seen.append((given[0].dtype, out.dtype)))
    expected = run(copy.deepcopy(plain).float(), torch.float32)
    theirs, got = run(plain, dtype), run(ours, dtype)
    assert seen == [(dtype, dtype)] * 2
    assert [part.dtype for part in got] == [dtype, dtype, *[torch.float32] * (len(got) - 2)]
    for part, their, reference in zip(got, theirs, expected, strict=True):
        # The roundings of one product more than PEFT has.
        assert error(part, reference) <= error(their, reference) + 4 * torch.finfo(dtype).eps
        assert error(part, reference) > 0


def test_two_adapters_and_switches() -> None:
    results: list[Any] = []
    for model in pair(BF16):
        torch.manual_seed(4)
        second = LoraConfig(r=6, target_modules=PROJECTIONS, init_lora_weights=False)
        model.add_adapter("second", second)
        layer = layer_of(model)
        first = run(layer, BF16)
        model.base_model.set_adapter(["default", "second"])
        both = run(layer, BF16)
        with model.disable_adapter():
            alone = layer(torch.ones(1, layer.in_features, dtype=BF16))
        merged = copy.deepcopy(model).merge_and_unload().model.layers[0].self_attn.q_proj
        assert type(merged) is nn.Linear
        results.append((first, both, alone, merged.weight))
    theirs, got = results
    for index in (0, 1):
        assert all(error(*parts) < 0.02 for parts in zip(got[index], theirs[index], strict=True))
    assert error(got[1][0], got[0][0]) > 0.1, "the second counts"
    torch.testing.assert_close(got[2:], theirs[2:], rtol=0, atol=0)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_a_base_in_fp32_is_peft_s_arithmetic(autocast: bool) -> None:
    results = []
    for model in pair(torch.float32):
        with torch.autocast("cpu", BF16, enabled=autocast):
            results.append(run(layer_of(model), torch.float32))
    assert results[0][0].dtype == (BF16 if autocast else torch.float32)
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=["bf16", "fp32"])
def test_input_in_16_bits_under_autocast(dtype: torch.dtype) -> None:
    """What follows another product, whatever the weights' dtype: PEFT's own numbers too, rounded to fp32 and back."""
    results = []
    for model in pair(dtype):
        with torch.autocast("cpu", BF16):
            results.append(run(layer_of(model), BF16))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_plain_model_beside_it_is_left_alone() -> None:
    plain, ours = pair(BF16)
    assert type(layer_of(ours).lora_A["default"]) is AdapterLinear
    for factors in (layer_of(plain).lora_A, layer_of(plain).lora_B):
        assert type(factors["default"]) is nn.Linear
    seen = []
    layer_of(plain).lora_A["default"].register_forward_hook(lambda _, given, out: seen.append(out.dtype))
    run(layer_of(plain), BF16)
    assert seen == [torch.float32]
    states = [model.state_dict() for model in (plain, ours)]
    assert {name: tensor.dtype for name, tensor in states[0].items()} == {
        name: tensor.dtype for name, tensor in states[1].items()
    }


def test_variants_are_peft_s() -> None:
    plain, ours = (layer_of(model) for model in pair(BF16, use_dora=True))
    torch.testing.assert_close(run(ours, BF16), run(plain, BF16), rtol=0, atol=0)
    # A variant beside a plain adapter takes the layer back.
    plain, ours = pair(BF16)
    for model in (plain, ours):
        torch.manual_seed(5)
        model.add_adapter("dora", LoraConfig(r=4, target_modules=PROJECTIONS, use_dora=True, init_lora_weights=False))
        model.base_model.set_adapter(["default", "dora"])
    torch.testing.assert_close(run(layer_of(ours), BF16), run(layer_of(plain), BF16), rtol=0, atol=0)


def test_adapters_by_sample_are_peft_s() -> None:
    plain, ours = (layer_of(model) for model in pair(BF16))
    outputs = [run(layer, BF16, adapter_names=["default", "__base__", "default"])[0] for layer in (plain, ours)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_a_factor_that_was_replaced_is_peft_s() -> None:
    """As PEFT does to swap adapters of other ranks into a compiled model."""
    plain, ours = (layer_of(model) for model in pair(BF16))
    replaced = nn.Linear(4, ours.out_features, bias=False)
    replaced.weight = ours.lora_B["default"].weight
    ours.lora_B["default"] = replaced
    torch.testing.assert_close(run(ours, BF16), run(plain, BF16), rtol=0, atol=0)


def test_a_forward_that_was_put_there_stays() -> None:
    """As tensor parallelism and offloading do; here accelerated after PEFT."""
    model = adapted(tiny_model("llama", None).to(BF16))
    factor = layer_of(model).lora_A["default"]
    original, calls = factor.forward, []
    factor.forward = lambda x: (calls.append(x.dtype), original(x))[1]
    slipstream.accelerate(model)
    run(layer_of(model), BF16)
    assert calls == [torch.float32]
    assert type(layer_of(model).lora_B["default"]) is AdapterLinear


def test_accelerated_after_peft_and_copied() -> None:
    _, expected = pair(BF16)
    model = adapted(tiny_model("llama", None).to(BF16))
    slipstream.accelerate(model)
    for other in (model, copy.deepcopy(model)):
        torch.testing.assert_close(run(layer_of(other), BF16), run(layer_of(expected), BF16), rtol=0, atol=0)
    with disable_input_dtype_casting(model):
        run(layer_of(model), BF16)


def test_compiled_layers_share_their_graphs() -> None:
    results = []
    for compiled in (False, True):
        model = slipstream.accelerate(tiny_model("qwen3_moe", None, num_hidden_layers=3).to(BF16))
        with_adapters = adapted(model, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        if compiled:
            torch.compiler.reset()
            torch._dynamo.utils.counters.clear()
            compile_layers(model, "aot_eager")
        loss = with_adapters(input_ids=tiny_batch(), labels=tiny_batch()).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in with_adapters.parameters() if p.requires_grad)])
    assert all(part.dtype == torch.float32 for part in results[1][1:])
    assert all(error(*parts) < 0.02 for parts in zip(*results, strict=True))
    assert not torch._dynamo.utils.counters["graph_break"]
    # What enters the first layer needs no gradient.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    torch.compiler.reset()
