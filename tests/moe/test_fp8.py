"""Experts in FP8: what e4m3 loses, what it must not, and where it is refused.

On a CPU the GEMMs are computed on what FP8 operands stand for, which users cannot have: `emulated` lifts the refusal.
"""

import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import slipstream
from slipstream import AutoModelForCausalLM, fp8, hf
from slipstream.adapters import all_experts
from slipstream.compilation import compile_layers
from slipstream.kernels.fp8 import LARGEST, Operand, quantize_columns, quantize_rows
from slipstream.moe import grouped_mlp as module
from slipstream.moe.activation import register
from slipstream.moe.grouped_mlp import grouped_mlp
from slipstream.moe.lora import low_rank
from tests.moe.test_grouped_mlp import FUSED, SHAPES, layouts, oracle, problem, run
from tests.tiny_models import sgd_losses, tiny_batch, tiny_config, tiny_model

# Rounding to e4m3 moves a value by 2.6 % (root mean square over a binade), so a product of two rounded operands by
# 3.7 %. Two or three GEMMs behind each other add up to what an MLP and its gradients may lose.
ONE_GEMM, AN_MLP = 0.045, 0.08

hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "obstacle", lambda device: None)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def check_training(models: list[Any], compiled: bool) -> None:
    """The second of two models, in FP8 and `compiled` as one graph or not, learns as the first one does in bf16."""
    if compiled:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        compile_layers(models[1], "aot_eager")
    bf16, rounded = (sgd_losses(model, [tiny_batch()] * 6, lr=0.1) for model in models)
    assert rounded[-1] < rounded[0] - 0.5
    assert rounded == pytest.approx(bf16, rel=0.03)
    assert rounded != bf16
    if compiled:
        assert not torch._dynamo.utils.counters["graph_break"]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        torch.compiler.reset()


def experts(tokens: int = 64, activation: str = "swiglu", biased: bool = False, transposed: bool = False) -> Any:
    """Ids, inputs in bf16 that fit together in size, and the activation."""
    SHAPES["fp8"] = (tokens, 128, 64, 8, 2)
    idx, inputs, function = problem("fp8", activation, biased, transposed, torch.bfloat16)
    return idx, {name: t * 0.2 if t.dim() == 3 else t for name, t in inputs.items()}, function


def in_fp8(idx: torch.Tensor, inputs: dict[str, torch.Tensor], activation: Any, **options: Any) -> torch.Tensor:
    name = register(activation.__name__, FUSED[activation])
    return grouped_mlp(idx_TK=idx, activation=name, fp8=True, **inputs, **options)


def exact(idx: torch.Tensor, inputs: dict[str, torch.Tensor], function: Any, grad: torch.Tensor) -> Any:
    return run(oracle, idx, {name: tensor.double() for name, tensor in inputs.items()}, grad, activation=function)


def assert_close(got: Any, expected: Any, tolerance: float = AN_MLP) -> None:
    (out, grads), (expected_out, expected_grads) = got, expected
    assert error(out, expected_out) < tolerance
    for name, grad in expected_grads.items():
        assert error(grads[name], grad) < tolerance, name


def per_row(product: torch.Tensor, expected: torch.Tensor, columns: torch.Tensor) -> float:
    """The largest error of a row, relative to that row, where columns are of these sizes."""
    product, expected = product.double() / columns, expected.double() / columns
    return ((product - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("stored", ["in-out", "out-in"])
def test_a_gemm_loses_no_more_than_rounding(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every row, however small beside the others: which one scale for all would lose."""
    rows = (torch.randn(40, 256) * torch.logspace(-5, 0, 40)[:, None]).bfloat16()
    columns = torch.logspace(-3, 0, 128)
    weight = (torch.randn(3, 256, 128) * columns).bfloat16()
    weight = weight if stored == "in-out" else weight.transpose(1, 2).contiguous().transpose(1, 2)
    ends = torch.tensor([7, 7, 40], dtype=torch.int32)
    expected = F.grouped_mm(rows.float(), weight.float(), offs=ends)
    assert per_row(fp8.grouped_mm_fp8(rows, weight, ends), expected, columns) < ONE_GEMM

    def one_scale(rows_RA: torch.Tensor, ends_E: torch.Tensor) -> Operand:
        scale = rows_RA.float().abs().max() / LARGEST
        return Operand((rows_RA / scale).to(torch.float8_e4m3fn), scale.expand(len(rows_RA)))

    monkeypatch.setattr(fp8, "quantize_rows", one_scale)
    assert per_row(fp8.grouped_mm_fp8(rows, weight, ends), expected, columns) > 2 * ONE_GEMM


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_forward_and_gradients(activation: str, biased: bool, transposed: bool) -> None:
    idx, inputs, function = experts(activation=activation, biased=biased, transposed=transposed)
    grad = torch.randn(inputs["x_TH"].shape).bfloat16()
    got = run(in_fp8, idx, inputs, grad, activation=function)
    assert_close(got, exact(idx, inputs, function, grad))
    assert error(got[0], exact(idx, inputs, function, grad)[0]) > 0.01, "this is not FP8"


@pytest.mark.usefixtures("emulated")
def test_weights_gradients_are_not_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the same gradients and activations, they are those of 16 bits; only four GEMMs are in FP8."""
    calls: list[tuple[int, ...]] = []
    original = fp8.grouped_mm_fp8

    def counted(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(weight.shape))
        return original(rows, weight, ends)

    monkeypatch.setattr("slipstream.moe.grouped_mm.grouped_mm_fp8", counted)
    idx, inputs, function = experts()
    run(in_fp8, idx, inputs, torch.randn(inputs["x_TH"].shape), activation=function)
    assert calls == [(8, 128, 128), (8, 64, 128), (8, 128, 64), (8, 128, 128)]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("counted", [False, True], ids=["unknown number", "known number"])
def test_rows_of_other_ranks_contribute_nothing(counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where what lies behind the last row is no number."""
    idx, inputs, function = experts(biased=True)
    absent = torch.rand(idx.shape) < 0.5
    idx = idx.masked_fill(absent, 8)
    inputs["weights_TK"] = inputs["weights_TK"].masked_fill(absent, 0.0)
    grad = torch.randn(inputs["x_TH"].shape).bfloat16()
    expected = exact(idx, inputs, function, grad)
    original = module.gather_rows

    def poisoned(x: torch.Tensor, slot: torch.Tensor, top_k: int, ends: torch.Tensor, dtype: Any) -> torch.Tensor:
        rows = original(x, slot, top_k, ends, dtype)
        rows[ends[-1] :] = float("nan")
        return rows

    monkeypatch.setattr(module, "gather_rows", poisoned)
    known = int((~absent).sum()) if counted else None
    assert_close(run(in_fp8, idx, inputs, grad, activation=function, num_rows=known), expected)


@pytest.mark.usefixtures("emulated")
def test_no_tokens() -> None:
    idx, inputs, function = experts(tokens=0)
    out, grads = run(in_fp8, idx, inputs, torch.zeros(0, 128), activation=function)
    assert out.shape == (0, 128)
    assert grads["up_EHN"].count_nonzero() == 0


@pytest.mark.usefixtures("emulated")
def test_adapters_keep_16_bits_beside_fp8() -> None:
    """With weights of zero the adapters are all there is, and nothing of them is rounded to e4m3."""
    idx, inputs, function = experts()
    inputs["up_EHN"], inputs["down_EIH"] = (torch.zeros_like(inputs[name]) for name in ("up_EHN", "down_EIH"))
    lora = {}
    for name, weight in (("up_lora", inputs["up_EHN"]), ("down_lora", inputs["down_EIH"])):
        count, wide, out = weight.shape
        lora[name] = low_rank([(torch.randn(count, 8, wide) / 8, torch.randn(out, 8, count) / 4, 1.0)], torch.bfloat16)
    delta = {"up_EHN": lora["up_lora"], "down_EIH": lora["down_lora"]}
    whole = inputs | {name: (pair.a_EAr.double() @ pair.b_ErB.double()) for name, pair in delta.items()}
    grad = torch.randn(inputs["x_TH"].shape)
    expected = exact(idx, whole, function, grad)
    got = run(in_fp8, idx, inputs, grad, activation=function, **lora)
    assert error(got[0], expected[0]) < 0.02
    assert error(got[1]["x_TH"], expected[1]["x_TH"]) < 0.02


@pytest.mark.usefixtures("emulated")
def test_what_the_compiler_is_told_is_true() -> None:
    idx, inputs, function = experts()
    tensors = [inputs["x_TH"], inputs["weights_TK"], idx, inputs["up_EHN"], inputs["down_EIH"]]
    arguments = (*tensors, *[None] * 6, register(function.__name__, FUSED[function]), True)
    out = torch.ops.slipstream.experts(*arguments, None)
    backward = (inputs["x_TH"], *arguments, out[1], list(out[2:]), [True] * 4 + [False] * 6)
    grads = torch.ops.slipstream.experts_backward(*backward)
    with FakeTensorMode() as mode:
        fake = tree_map_only(torch.Tensor, mode.from_tensor, (arguments, backward))
        assert layouts(torch.ops.slipstream.experts(*fake[0], None)) == layouts(out)
        assert layouts(torch.ops.slipstream.experts_backward(*fake[1])) == layouts(grads)


def loaded(**options: Any) -> Any:
    torch.manual_seed(0)
    config = tiny_config("qwen3_moe", num_hidden_layers=2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **options)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    "compiled", [pytest.param(False, id="eager"), pytest.param(True, id="compiled", marks=pytest.mark.slow)]
)
def test_a_model_trains(compiled: bool) -> None:
    models = [loaded(), loaded(backend={"experts": "fp8"})]
    row = slipstream.describe(models[1])["experts"]
    assert row.chosen == "slipstream_fp8"
    assert row.why.endswith("forward and input gradients in FP8, weight gradients in bf16")
    check_training(models, compiled)


@pytest.mark.usefixtures("emulated")
def test_adapters_of_a_model_train() -> None:
    model = loaded(backend={"experts": "fp8"})
    lora = LoraConfig(r=4, target_modules=[], target_parameters=all_experts(model), init_lora_weights=False)
    losses = sgd_losses(get_peft_model(model, lora), [tiny_batch()] * 4)
    assert losses[-1] < losses[0]


@pytest.mark.usefixtures("emulated")
def test_balanced_gate() -> None:
    with pytest.warns(UserWarning, match="meaningless"):
        model = loaded(backend={"experts": "fp8", "gate": "balanced"})
    assert slipstream.describe(model)["experts"].chosen == "slipstream_fp8_balanced"
    ids = tiny_batch()
    model(input_ids=ids, labels=ids).loss.backward()
    touched = [p.grad.flatten(1).abs().amax(1) for n, p in model.named_parameters() if n.endswith("down_proj")]
    assert all((grad > 0).all() for grad in touched)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"experts='fp8'\): FP8 GEMMs need a Hopper GPU, and .* cpu; use experts='auto'"
    ):
        loaded(backend={"experts": "fp8"})


def test_a_model_that_never_left_the_cpu_is_refused_at_its_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "device_obstacle", lambda weight: None)  # as where there is a Hopper GPU to move to
    model = loaded(backend={"experts": "fp8"})
    with pytest.raises(ValueError, match=r"experts='fp8'\): FP8 GEMMs need a Hopper GPU, and .* cpu; or use"):
        model(tiny_batch())


def test_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    problem = fp8.obstacle.__wrapped__(torch.device("cuda"))  # not remembered
    assert problem == "FP8 GEMMs need a Hopper GPU (compute capability 9.0), and NVIDIA A100 has 8.0"


@pytest.mark.usefixtures("emulated")
def test_models_that_it_does_not_fit() -> None:
    def refuse(message: str, model: Any) -> None:
        with pytest.raises(ValueError, match=message):
            slipstream.accelerate(model, backend={"experts": "fp8"})

    refuse("a dense model; use experts='auto'", tiny_model("llama", None))
    refuse(r"multiples of 16, not .*24", tiny_model("qwen3_moe", None, moe_intermediate_size=24))
    trained = tiny_model("qwen3_moe", None)
    for _, one in hf.experts_modules(trained):
        one.act_fn = torch.nn.PReLU()
    refuse("parameters between or behind its projections", trained)
    with pytest.raises(ValueError, match="load_in_4bit: experts='fp8'"):
        loaded(backend={"experts": "fp8"}, load_in_4bit=True)


@pytest.mark.usefixtures("emulated")
def test_other_dtypes_are_refused_but_autocast_is_not() -> None:
    model = slipstream.accelerate(tiny_model("qwen3_moe", None), backend={"experts": "fp8"})
    with pytest.raises(ValueError, match=re.escape("compute for bfloat16, not torch.float32; load with dtype=")):
        model(tiny_batch())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=tiny_batch(), labels=tiny_batch()).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for _, e in hf.experts_modules(model)
               for p in e.parameters())  # fmt: skip


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("stored", ["in-out", "out-in"])
@pytest.mark.parametrize("sizes", [(256, 0, 1, 77, 300, 15, 0, 130), (0, 0, 0, 1), (4096,), (3, 2, 1)], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(2048, 1536), (768, 2048), (16, 32)])
def test_torchs_gemm_is_the_emulated_one(inputs: int, outputs: int, sizes: tuple[int, ...], stored: str) -> None:
    """Groups of any size, empty ones too, and rows behind the last that are no numbers."""
    ends, count = torch.tensor(sizes, device="cuda").cumsum(0).int(), sum(sizes)
    rows = torch.randn(count + 9, inputs, device="cuda") * torch.logspace(-3, 2, count + 9, device="cuda")[:, None]
    rows[count:] = float("nan")
    columns = torch.logspace(-2, 1, outputs, device="cuda")
    rows, weight = rows.bfloat16(), (torch.randn(len(sizes), inputs, outputs, device="cuda") * columns).bfloat16()
    weight = weight if stored == "in-out" else weight.transpose(1, 2).contiguous().transpose(1, 2)
    got = fp8.grouped_mm_fp8(rows, weight, ends)[:count]
    expected = fp8.grouped_product_reference(quantize_rows(rows, ends), quantize_columns(weight), ends)[:count]
    assert per_row(got, expected, columns) < 0.02


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
def test_forward_and_gradients_on_a_gpu(transposed: bool) -> None:
    idx, inputs, function = experts(tokens=700, biased=True, transposed=transposed)
    idx, inputs = idx.cuda(), {name: tensor.cuda() for name, tensor in inputs.items()}
    grad = torch.randn(inputs["x_TH"].shape, device="cuda").bfloat16()
    assert_close(run(in_fp8, idx, inputs, grad, activation=function), exact(idx, inputs, function, grad))


@pytest.mark.gpu
@hopper
def test_a_compiled_model_trains_on_a_gpu_and_does_not_wait() -> None:
    with torch.device("cuda"):
        models = [loaded(), loaded(backend={"experts": "fp8", "compile": "layers"})]
    bf16, rounded = (sgd_losses(model, [tiny_batch().cuda()] * 6, lr=0.1) for model in models)
    assert rounded == pytest.approx(bf16, rel=0.03)
    idx, inputs, function = experts()
    idx, inputs = idx.cuda(), {name: tensor.cuda() for name, tensor in inputs.items()}
    step = partial(run, in_fp8, idx, inputs, torch.randn(64, 128, device="cuda"), activation=function)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
