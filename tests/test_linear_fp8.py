"""Dense projections in FP8. On a CPU what FP8 operands stand for is multiplied, as in tests/moe/test_fp8.py."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import slipstream
from slipstream import AutoModelForCausalLM, fp8, hf
from slipstream.kernels.fp8 import quantize_columns, quantize_rows
from slipstream.linear_adapters import AdapterLinear
from slipstream.linear_fp8 import FP8Linear
from tests.moe.test_fp8 import ONE_GEMM, check_training, error, hopper
from tests.tiny_models import sgd_losses, tiny_batch, tiny_config, tiny_model


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "obstacle", lambda device: None)


def loaded(model_type: str = "qwen3_moe", **options: Any) -> Any:
    torch.manual_seed(0)
    config = tiny_config(model_type, num_hidden_layers=2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **options)


def both(biased: bool = False, device: str = "cpu") -> tuple[nn.Linear, FP8Linear]:
    plain = nn.Linear(128, 64, bias=biased, device=device, dtype=torch.bfloat16)
    rounded: Any = copy.deepcopy(plain)
    rounded.__class__ = FP8Linear
    return plain, rounded


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_forward_and_gradients(biased: bool) -> None:
    x = torch.randn(3, 20, 128).bfloat16()
    grad = torch.randn(3, 20, 64).bfloat16()
    found = []
    for layer in both(biased):
        given = x.clone().requires_grad_()
        out = layer(given)
        out.backward(grad)
        found.append((out, given.grad, *(parameter.grad for parameter in layer.parameters())))
    (expected, expected_x, *parameters), (out, grad_x, *grads) = found
    assert 0.01 < error(out, expected) < ONE_GEMM
    assert 0.01 < error(grad_x, expected_x) < ONE_GEMM
    for got, wanted in zip(grads, parameters, strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got, wanted)  # in 16 bits


@pytest.mark.usefixtures("emulated")
def test_nothing_more_is_kept_than_needed() -> None:
    """A frozen weight keeps no rows; no operand in FP8 is kept at all."""
    _, layer = both()
    layer.requires_grad_(False)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(4, 128, dtype=torch.bfloat16, requires_grad=True))
    assert [tensor.shape for tensor in saved] == [(128, 64)]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("tokens", [0, 5])
def test_what_the_compiler_is_told_is_true(tokens: int) -> None:
    rows, weight = torch.randn(tokens, 128).bfloat16(), torch.randn(128, 64).bfloat16()
    out = torch.ops.slipstream.mm_fp8(rows, weight)
    with FakeTensorMode() as mode:
        fake = torch.ops.slipstream.mm_fp8(mode.from_tensor(rows), mode.from_tensor(weight))
    assert (fake.shape, fake.stride(), fake.dtype) == (out.shape, out.stride(), out.dtype)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("how", ["eager", "compiled", "selective"])
def test_a_model_trains(how: str) -> None:
    setup = {"activation_checkpointing": "selective"} if how == "selective" else None
    models = [loaded(), loaded(backend={"linear": "fp8"}, distributed_setup=setup)]
    row = slipstream.describe(models[1])["linear"]
    assert (row.chosen, row.why) == ("fp8", "8 projections in decoder layers; weight gradients in bf16")
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    assert not any(
        isinstance(part, FP8Linear) for _, _, router, _ in hf.routers(models[1]) for part in router.modules()
    )
    assert type(models[1].lm_head) is nn.Linear
    check_training(models, how == "compiled")


@pytest.mark.usefixtures("emulated")
def test_selective_checkpointing_runs_no_projection_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], fp8.quantize_rows
    monkeypatch.setattr(fp8, "quantize_rows", lambda *given: calls.append(None) or original(*given))
    model = loaded(backend={"linear": "fp8"}, distributed_setup={"activation_checkpointing": "selective"})
    model(input_ids=tiny_batch(), labels=tiny_batch()).loss.backward()
    assert len(calls) == 8 * 2


@pytest.mark.usefixtures("emulated")
def test_adapters_stay_in_16_bits() -> None:
    model = get_peft_model(loaded(backend={"linear": "fp8"}), LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    parts = {name: type(module) for name, module in model.named_modules()}
    assert parts["base_model.model.model.layers.0.self_attn.q_proj.base_layer"] is FP8Linear
    assert parts["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default"] is AdapterLinear
    losses = sgd_losses(model, [tiny_batch()] * 4)
    assert losses[-1] < losses[0]
    late = get_peft_model(tiny_model("llama", None), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"linear='fp8'\): adapters stay in 16 bits; accelerate the model, then"):
        slipstream.accelerate(late, backend={"linear": "fp8"})


@pytest.mark.usefixtures("emulated")
def test_routers_of_every_kind_are_left_alone() -> None:
    """Where they are linear layers of plain Transformers, too."""
    model = loaded("mixtral", backend={"linear": "fp8"})
    kinds = {type(part) for _, _, router, _ in hf.routers(model) for part in router.modules()}
    assert kinds
    assert FP8Linear not in kinds
    with pytest.raises(ValueError, match="which layers of JetMoeForCausalLM are routers is not known"):
        slipstream.accelerate(tiny_model("jetmoe", None), backend={"linear": "fp8"})


@pytest.mark.usefixtures("emulated")
def test_widths_that_do_not_fit_are_left_alone() -> None:
    model = slipstream.accelerate(tiny_model("llama", None, intermediate_size=40), backend={"linear": "fp8"})
    kinds = {name: type(module) for name, module in model.model.layers[0].named_modules()}
    assert kinds["mlp.up_proj"] is nn.Linear
    assert kinds["self_attn.q_proj"] is FP8Linear


@pytest.mark.parametrize("operation", ["linear", "experts"])
def test_split_weights_are_refused(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="'fp8' takes whole weights, not those of tp_size=2; use tp_size=1"):
        slipstream.accelerate(
            tiny_model("qwen3_moe", None), backend={operation: "fp8"}, distributed_setup={"tp_size": 2}
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"linear='fp8'\): FP8 GEMMs need a Hopper GPU, .* cpu; use linear='auto'"):
        loaded(backend={"linear": "fp8"})


def test_a_model_that_never_left_the_cpu_is_refused_at_its_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "device_obstacle", lambda weight: None)
    with pytest.raises(ValueError, match=r"linear='fp8'\): FP8 GEMMs need a Hopper GPU, .* cpu; or use linear='auto'"):
        loaded(backend={"linear": "fp8"})(tiny_batch())


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("stored", ["in-out", "out-in"])
@pytest.mark.parametrize("tokens", [1, 77, 4096])
@pytest.mark.parametrize(("inputs", "outputs"), [(2048, 4096), (4096, 2048), (2048, 512), (16, 32)])
def test_torchs_gemm_is_the_emulated_one(inputs: int, outputs: int, tokens: int, stored: str) -> None:
    rows = (
        torch.randn(tokens, inputs, device="cuda") * torch.logspace(-3, 2, tokens, device="cuda")[:, None]
    ).bfloat16()
    weight = torch.randn(inputs, outputs, device="cuda").bfloat16()
    weight = weight if stored == "in-out" else weight.t().contiguous().t()
    left, right = quantize_rows(rows), quantize_columns(weight[None])
    ends = torch.tensor([tokens], device="cuda", dtype=torch.int32)
    expected = fp8.grouped_product_reference(left, right, ends)
    got = fp8.mm_fp8(rows, weight)
    difference = (got.double() - expected.double()).norm(dim=1) / expected.double().norm(dim=1)
    assert difference.max() < 0.02


@pytest.mark.gpu
@hopper
def test_a_compiled_model_trains_on_a_gpu() -> None:
    with torch.device("cuda"):
        models = [loaded(), loaded(backend={"linear": "fp8", "experts": "fp8", "compile": "layers"})]
    bf16, rounded = (sgd_losses(model, [tiny_batch().cuda()] * 6, lr=0.1) for model in models)
    assert rounded == pytest.approx(bf16, rel=0.03)
