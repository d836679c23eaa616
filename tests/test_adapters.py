"""PEFT's adapters on experts: on our models as on Transformers' own, and each side's files on the other."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.config import PeftConfigMixin
from torch import nn

import slipstream
from slipstream.adapters import all_experts, check
from slipstream.compilation import compile_layers
from slipstream.shared_adapters import share_experts
from tests.tiny_models import tiny_batch, tiny_model

ROWS = tiny_batch(batch=3, length=16)
# gated; interleaved, transposed and with biases; ungated; with experts of another name in old checkpoints
MODELS = ["qwen3_moe", "gpt_oss", "nemotron_h", "mixtral"]


def config_for(model: nn.Module, **changes: Any) -> LoraConfig:
    chosen = {"r": 4, "target_modules": ["q_proj"], "target_parameters": all_experts(model), "init_lora_weights": False}
    return LoraConfig(**{**chosen, **changes})


def adapt(model: nn.Module, seed: int = 0, **changes: Any) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(model, config_for(model, **changes))


@pytest.fixture
def no_delta(monkeypatch):
    """Calling it makes PEFT's own way, which puts `W + delta` in the weight's place, an error."""

    def forbid() -> None:
        monkeypatch.setattr(nn.utils.parametrize, "register_parametrization", None)

    return forbid


def pair(model_type: str) -> tuple[Any, Any]:
    plain = tiny_model(model_type, "grouped_mm")
    return plain, slipstream.accelerate(copy.deepcopy(plain))


def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(input_ids=ROWS, labels=ROWS).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("model_type", MODELS)
def test_as_on_plain_transformers(model_type, no_delta, tmp_path) -> None:
    plain, ours = (adapt(model, use_rslora=True) for model in pair(model_type))
    expected_loss, expected = step(plain)
    plain.save_pretrained(tmp_path / "plain")
    expected_logits = plain(ROWS).logits
    no_delta()
    loss, grads = step(ours)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert grads.keys() == expected.keys()
    assert sum(".experts." in name for name in grads) >= 4
    for name, grad in expected.items():
        error = (grads[name] - grad).abs().max() / grad.abs().max()
        assert error < 1e-4, name
    assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)
    loaded = PeftModel.from_pretrained(pair(model_type)[1], tmp_path / "plain")
    torch.testing.assert_close(loaded(ROWS).logits.as_subclass(torch.Tensor), expected_logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", MODELS)
def test_what_we_save_loads_in_plain_peft(model_type, tmp_path) -> None:
    plain, ours = pair(model_type)
    adapted = adapt(ours)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(loaded(ROWS).logits, adapted(ROWS).logits + 0, rtol=1e-5, atol=1e-5)


def test_adapters_that_are_switched_merged_and_removed(no_delta) -> None:
    plain, ours = pair("qwen3_moe")
    bare = ours(ROWS).logits + 0
    expected, adapted = adapt(plain), adapt(ours)
    for model in (expected, adapted):
        torch.manual_seed(1)
        model.add_adapter("second", config_for(model, r=6, lora_alpha=3))
        model.base_model.set_adapter(["default", "second"])
    both = expected(ROWS).logits
    no_delta()
    torch.testing.assert_close(adapted(ROWS).logits + 0, both, rtol=1e-4, atol=1e-4)
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(ROWS).logits + 0, bare)
    one = adapted(ROWS).logits + 0
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ROWS).logits + 0, one, rtol=1e-4, atol=1e-4)


def test_accelerated_after_peft(no_delta) -> None:
    plain, _ = pair("qwen3_moe")
    adapted = adapt(plain)
    expected = adapted(ROWS).logits
    slipstream.accelerate(adapted)
    no_delta()
    torch.testing.assert_close(adapted(ROWS).logits + 0, expected, rtol=1e-5, atol=1e-5)


def test_a_rank_of_its_own(no_delta) -> None:
    """PEFT 0.21 warns that such a key "did not match any targeted module"; it does count, on both sides."""
    plain, ours = pair("qwen3_moe")
    with pytest.warns(RuntimeWarning, match="rank_pattern"):
        expected = adapt(plain, rank_pattern={"gate_up_proj": 6})(ROWS).logits
    with pytest.warns(RuntimeWarning, match="rank_pattern"):
        adapted = adapt(ours, rank_pattern={"gate_up_proj": 6})
    shapes = {name: tuple(p.shape) for name, p in adapted.named_parameters() if "layers.0.mlp.experts" in name}
    assert {shape[0] for name, shape in shapes.items() if "lora_A" in name} == {8 * 4, 8 * 6}
    no_delta()
    torch.testing.assert_close(adapted(ROWS).logits + 0, expected, rtol=1e-5, atol=1e-5)


def test_biases_keep_peft_s_way() -> None:
    results = []
    for model in pair("gpt_oss"):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=[], init_lora_weights=False,
                            target_parameters=["experts.down_proj", "experts.down_proj_bias"])  # fmt: skip
        results.append(step(get_peft_model(model, config)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_compiled_layers_share_their_graphs() -> None:
    results = []
    for compiled in (False, True):
        model = slipstream.accelerate(
            tiny_model("qwen3_moe", None, num_hidden_layers=2), distributed_setup={"activation_checkpointing": "full"}
        )
        adapted = adapt(model)
        if compiled:
            torch.compiler.reset()
            torch._dynamo.utils.counters.clear()
            compile_layers(model, "aot_eager")
        results.append(step(adapted))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]
    # What enters the first layer needs no gradient.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    torch.compiler.reset()


def test_trained_weights_beside_adapters() -> None:
    """`modules_to_save` and a base that is not frozen: the operator gives both gradients."""
    results = []
    for model in pair("qwen3_moe"):
        adapted = adapt(model)
        for name, parameter in adapted.named_parameters():
            if name.endswith("experts.base_layer.base_layer.down_proj"):
                parameter.requires_grad_(True)
        results.append(step(adapted))
    assert any(name.endswith(".down_proj") for name in results[0][1])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_one_pair_for_all_experts(model_type: str, no_delta: Any, tmp_path: Path) -> None:
    """As a pair for each expert, all the same, whose gradients are summed; there and back through plain PEFT."""
    plain, ours = pair(model_type)
    torch.manual_seed(0)
    shared = get_peft_model(ours, share_experts(config_for(ours, use_rslora=True)))
    shared.save_pretrained(str(tmp_path))
    tied = plain_peft(plain, tmp_path)
    tied.train()
    expected_loss, each = step(tied)
    expected_logits = tied(ROWS).logits
    transformers_too = PeftModel.from_pretrained(pair(model_type)[0], tmp_path)
    torch.testing.assert_close(transformers_too(ROWS).logits, expected_logits, rtol=1e-5, atol=1e-5)
    loss, grads = step(shared)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert grads.keys() == each.keys()
    experts = {name: grad for name, grad in grads.items() if ".experts." in name}
    assert len(experts) >= 4
    for name, grad in grads.items():
        want = each[name]
        if name in experts:
            assert grad.numel() * 8 == want.numel(), name
            want = want.view(8, 4, -1).sum(0) if "lora_A" in name else want.view(-1, 4, 8).sum(2)
        assert (grad - want).abs().max() / want.abs().max() < 1e-4, name
    again = PeftModel.from_pretrained(pair(model_type)[1], tmp_path, is_trainable=True)
    for (name, parameter), other in zip(again.named_parameters(), shared.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    no_delta()
    torch.testing.assert_close(again(ROWS).logits + 0, expected_logits, rtol=1e-5, atol=1e-5)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(ROWS).logits + 0, expected_logits, rtol=1e-4, atol=1e-4)


def plain_peft(model: nn.Module, folder: Path) -> PeftModel:
    """What PEFT by itself makes of a folder: it has no use for the mark, and a pair for each expert."""
    saved = json.loads((folder / "adapter_config.json").read_text())
    with pytest.warns(UserWarning, match=r"slipstream_share_experts.*ignored"):
        config: Any = PeftConfigMixin.from_peft_type.__func__.__wrapped__(LoraConfig, **saved)  # type: ignore[attr-defined]
    return PeftModel.from_pretrained(model, folder, config=config, is_trainable=True)


def test_what_cannot_be_shared(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no experts"):
        share_experts(LoraConfig(target_modules=["q_proj"]))
    adapt(pair("qwen3_moe")[0]).save_pretrained(str(tmp_path))
    config = share_experts(LoraConfig.from_pretrained(str(tmp_path)))
    with pytest.raises(ValueError, match="the experts' factors differ"):
        PeftModel.from_pretrained(pair("qwen3_moe")[1], tmp_path, config=config)


@pytest.mark.parametrize("changes", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_peft_has_only_for_linear_layers_is_refused(changes) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=rf"lora.{name}=.*linear layers only.*experts.down_proj.*name linear layers"):
        check(LoraConfig(target_parameters=["experts.down_proj"], **changes))
    check(LoraConfig(**changes))
    # Also where PEFT makes experts of "all-linear".
    with pytest.raises(ValueError, match="linear layers only"):
        get_peft_model(pair("qwen3_moe")[1], LoraConfig(target_modules="all-linear", **changes))


def test_any_other_module_is_left_to_peft(tmp_path) -> None:
    adapted = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_peft_imported_later_is_told_too() -> None:
    """Our import does not load PEFT; looking whether it is there does not count as importing it."""
    script = """
import sys, importlib.util
from tests.tiny_models import tiny_model
import slipstream
slipstream.accelerate(tiny_model("qwen3_moe", None))
assert "peft" not in sys.modules
assert importlib.util.find_spec("peft") is not None
import peft
from peft.tuners.lora.layer import ParamWrapper
print(ParamWrapper.forward.__code__.co_filename)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.stdout.strip().endswith("slipstream/adapters.py"), ran.stderr
