"""QLoRA: adapters beside experts in 4 bits train as beside the same numbers in whole weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import slipstream
from slipstream import AutoModelForCausalLM, hf
from slipstream.adapters import all_experts
from slipstream.compilation import compile_layers
from slipstream.moe.experts import projection_names
from slipstream.moe.packed import Placeholder, unpacked
from slipstream.quantization import quantize_experts
from tests.tiny_models import tiny_batch, tiny_config, tiny_model

ROWS = tiny_batch(batch=3, length=16)
# gated; interleaved, transposed and with biases; ungated
MODELS = ["qwen3_moe", "gpt_oss", "nemotron_h"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function: the folder of a tiny checkpoint."""
    root = tmp_path_factory.mktemp("models")

    def make(model_type: str, **changes: Any) -> Path:
        folder = root / f"{model_type}{changes or ''}"
        if not folder.exists():
            tiny_model(model_type, None, **changes).save_pretrained(folder)
        return folder

    return make


def adapt(model: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(
        model,
        LoraConfig(r=4, target_modules=["q_proj"], target_parameters=all_experts(model), init_lora_weights=False),
    )


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True, **options).train()


def whole(folder: Path, **options: Any) -> Any:
    """The model with the experts' numbers of 4 bits in whole weights."""
    packed, model = loaded(folder, **options), AutoModelForCausalLM.from_pretrained(folder, **options).train()
    for (_, of), (_, to) in zip(hf.experts_modules(packed), hf.experts_modules(model), strict=True):
        for name in projection_names(to):
            getattr(to, name).data.copy_(unpacked(of, name))
    return model


def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(input_ids=ROWS, labels=ROWS).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    assert got[1].keys() == expected[1].keys()
    assert sum(".experts." in name for name in got[1]) >= 4
    for name, grad in expected[1].items():
        assert grad.abs().max() > 0, name
        assert (got[1][name] - grad).abs().max() <= 1e-5 * grad.abs().max(), name


@pytest.mark.parametrize("model_type", MODELS)
def test_gradients_are_those_of_the_same_numbers_in_whole_weights(folders: Any, model_type: str) -> None:
    model = adapt(loaded(folders(model_type)))
    expected = step(adapt(whole(folders(model_type))))
    assert_same(step(model), expected)
    plain = AutoModelForCausalLM.from_pretrained(folders(model_type)).train()
    assert not torch.equal(step(adapt(plain))[0], expected[0])
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert sum(isinstance(p, Placeholder) for p in frozen) == 2 * len(list(hf.experts_modules(model)))
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize(
    ("mode", "compiled"),
    [("full", False), ("selective", False), ("full", True), pytest.param("none", True, marks=pytest.mark.slow)],
)
def test_checkpointed_and_compiled_layers(folders: Any, mode: str, compiled: bool) -> None:
    folder = folders("qwen3_moe", num_hidden_layers=2)
    model = loaded(folder, distributed_setup={"activation_checkpointing": mode})
    adapted = adapt(model)
    if compiled:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        compile_layers(model, "aot_eager")
    assert_same(step(adapted), step(adapt(whole(folder))))
    if compiled:
        assert not torch._dynamo.utils.counters["graph_break"]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
        torch.compiler.reset()


def test_backward_keeps_bytes_not_weights(folders: Any) -> None:
    """What autograd saves of an experts module: the packed bytes, and nothing of a weight's size."""
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    model = loaded(folders("qwen3_moe"))
    _, experts = next(hf.experts_modules(model))
    x_TH = torch.randn(4, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts(x_TH, torch.zeros(4, 2, dtype=torch.long), torch.ones(4, 2))
    buffers = {id(buffer) for buffer in experts.buffers()}
    assert len(buffers & {id(tensor) for tensor in saved}) == 2
    largest = max(tensor.numel() for tensor in saved if id(tensor) not in buffers)
    assert largest < experts.gate_up_proj.numel() // 8


def test_bytes_of_the_experts(folders: Any) -> None:
    model = loaded(folders("qwen3_moe"), dtype=torch.bfloat16)
    for _, experts in hf.experts_modules(model):
        weights = sum(parameter.numel() for parameter in experts.parameters())
        assert sum(p.untyped_storage().nbytes() for p in experts.parameters() if not isinstance(p, Placeholder)) == 0
        assert sum(buffer.nbytes for buffer in experts.buffers()) == weights * 4.5 / 8
        assert unpacked(experts, "down_proj").dtype == torch.bfloat16
    assert not any(name.endswith("_nf4") for name in model.state_dict())
    assert slipstream.describe(model)["expert weights"].chosen == "nf4"
    assert slipstream.describe(model).parameters == sum(p.numel() for p in tiny_model("qwen3_moe", None).parameters())


def test_never_more_than_one_whole_weight_while_loading(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from slipstream import quantization

    counts, original = [], quantization.pack

    def counted(experts: Any, name: str) -> Any:
        counts.append(sum(p.device.type != "meta" and not isinstance(p, Placeholder)
                          for e in known for p in e.parameters()))  # fmt: skip
        return original(experts, name)

    known: list[Any] = []
    built = hf.is_experts

    def remember(module: Any) -> bool:
        found = built(module)
        if found and not any(module is one for one in known):
            known.append(module)
        return found

    monkeypatch.setattr(quantization, "pack", counted)
    monkeypatch.setattr(quantization.hf, "is_experts", remember)
    loaded(folders("qwen3_moe"))
    assert counts == [1] * 8


def test_random_weights_copies_and_moves() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), load_in_4bit=True)
    with torch.no_grad():
        expected = model(ROWS).logits + 0
        moved = copy.deepcopy(model)
        torch.testing.assert_close(moved(ROWS).logits + 0, expected)
    moved.to("meta")
    _, experts = next(hf.experts_modules(moved))
    assert {tensor.device.type for tensor in (*experts.parameters(), *experts.buffers())} == {"meta"}
    assert experts.down_proj.shape == (8, 64, 32)
    assert isinstance(experts.down_proj, torch.nn.Parameter)


def test_the_adapter_is_plain_peft_s(folders: Any, tmp_path: Path) -> None:
    adapted = adapt(loaded(folders("qwen3_moe")))
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(loaded(folders("qwen3_moe")), tmp_path)
    with torch.no_grad():
        expected = adapted(ROWS).logits + 0
        torch.testing.assert_close(again(ROWS).logits + 0, expected)
        plain = PeftModel.from_pretrained(whole(folders("qwen3_moe")), tmp_path)
        torch.testing.assert_close(plain(ROWS).logits + 0, expected, rtol=1e-5, atol=1e-5)
        with adapted.disable_adapter():
            bare = whole(folders("qwen3_moe"))(ROWS).logits + 0
            torch.testing.assert_close(adapted(ROWS).logits + 0, bare, rtol=1e-5, atol=1e-5)


def test_what_needs_values_is_refused(folders: Any, tmp_path: Path) -> None:
    adapted = adapt(loaded(folders("qwen3_moe")))
    with pytest.raises(ValueError, match=r"stored in 4 bits.*slipstream merge"):
        adapted.merge_and_unload()
    model = loaded(folders("qwen3_moe"))
    with pytest.raises(ValueError, match=r"cannot be saved whole.*slipstream merge"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"float32.*stored in 4 bits"):
        model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="cannot train"):
        model.requires_grad_(True)
    with pytest.raises(ValueError, match="cannot train"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["experts"]))


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("llama", {}, "describes a dense model"),
        ("qwen3_moe", {"backend": {"experts": "transformers"}}, "use experts='auto'"),
        ("qwen3_moe", {"experts_implementation": "eager"}, "use experts='auto'"),
        ("jetmoe", {}, "does not call its experts through the interface"),
        ("dbrx", {}, "DbrxExperts keeps its weights in a form of its own"),
        ("longcat_flash", {}, "LongcatFlashExperts keeps its weights in a form of its own"),
    ],
)
def test_models_that_it_does_not_fit(model_type: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"load_in_4bit: .*{message}"):
        AutoModelForCausalLM.from_config(tiny_config(model_type), load_in_4bit=True, **options)


def test_an_activation_that_trains_is_refused() -> None:
    model = tiny_model("qwen3_moe", None)
    for _, experts in hf.experts_modules(model):
        experts.act_fn = torch.nn.PReLU()
    with pytest.raises(ValueError, match="Qwen3MoeExperts has parameters between or behind its projections"):
        quantize_experts(slipstream.accelerate(model))


def test_quantised_twice_is_refused(folders: Any) -> None:
    with pytest.raises(ValueError, match="leave one out"):
        loaded(folders("qwen3_moe"), quantization_config={"load_in_4bit": True})


def test_ranks_with_the_same_experts_are_refused(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for setup in ({"ep_size": 2}, {}, {"ep_size": 4, "param_dtype": "bfloat16"}, {"ep_size": 2, "dp_replicate": 2}):
        with pytest.raises(ValueError, match=r"on 4 ranks use ep_size=4 with dp_replicate=1"):
            loaded(folders("qwen3_moe"), distributed_setup=setup)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"device_map": "cuda"}], ids=["moved there", "loaded there"])
def test_on_a_gpu(folders: Any, options: dict[str, Any]) -> None:
    """In bf16, with the kernel; both sides with the same GEMMs."""
    folder, results = folders("qwen3_moe"), []
    for made in (loaded, whole):
        model = adapt(made(folder, dtype=torch.bfloat16, **options)).to("cuda")
        loss = model(input_ids=ROWS.to("cuda"), labels=ROWS.to("cuda")).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
        if made is loaded:
            chosen = {choice.operation: choice.chosen for choice in slipstream.describe(model).choices}
            assert chosen["compile"] == "layers"
            assert all(b.is_cuda for _, experts in hf.experts_modules(model) for b in experts.buffers())
    (loss, grads), (expected_loss, expected) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-2, atol=0)
    assert sum(".experts." in name for name in grads) >= 4
    for name, grad in expected.items():
        assert (grads[name] - grad).norm() <= 2e-2 * grad.norm(), name
