"""What slipstream/hf_models.py relies on in Transformers. A failure here means that upstream moved something."""

import copy
import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import core_model_loading

from slipstream import hf_models
from slipstream.moe import foreign
from tests.tiny_models import tiny_batch, tiny_config, tiny_model


def test_what_causal_lm_classes_take() -> None:
    found = {name: hf_models.takes_positions(tiny_config(name)) for name in ("llama", "bart", "mamba2")}
    assert found == {"llama": True, "bart": False, "mamba2": False}
    found = {name: hf_models.takes_experts_implementation(tiny_config(name)) for name in ("qwen3_moe", "jetmoe")}
    assert found == {"qwen3_moe": True, "jetmoe": False}


def test_experts_are_split_as_their_own_plans_say() -> None:
    for name in ("qwen3_moe", "gpt_oss", "nemotron_h", "granitemoe"):
        model = tiny_model(name)
        found = hf_models.experts_plan(model)
        assert found
        assert found.items() <= model.ep_plan.items(), name
    llama4 = tiny_model("llama4_text", None)
    assert foreign.adapt(llama4)
    assert set(hf_models.experts_plan(llama4).values()) == {"ep_dispatch_experts", "grouped_gemm"}
    dbrx = tiny_model("dbrx", None)
    assert foreign.adapt(dbrx)
    with pytest.raises(ValueError, match="leave ep_size out"):
        hf_models.experts_plan(dbrx)


def test_experts_that_a_spread_model_is_given() -> None:
    """Their plan gets layer numbers; the meshes and the exchange are those of the model."""
    model = tiny_model("qwen3_moe")
    model.add_module("more", torch.nn.ModuleList([copy.deepcopy(model.model.layers[0])]))
    plan = {f"more.*.mlp.experts.{key}": "grouped_gemm" for key in ("gate_up_proj", "down_proj")}
    plan["more.*.mlp.experts"] = "ep_dispatch_experts"
    numbered = {name.replace("*", "0"): style for name, style in plan.items()}
    assert model._expand_parallel_plan(plan) == numbered
    names = inspect.signature(hf_models.apply_expert_parallelism).parameters
    assert list(names) == ["model", "ep_mesh", "tp_mesh", "plan", "ep_implementation"]
    assert hf_models.meshes(model) is None
    assert hf_models.split_experts(model, {}) == {}


def test_prediction_layers_have_the_dtypes_of_the_model() -> None:
    model = tiny_model("glm4_moe").bfloat16()
    layers = hf_models.prediction_layers(model, 2)
    tensors = layers.state_dict()
    assert all(tensor.is_meta for tensor in tensors.values())
    in_fp32 = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert in_fp32 == {f"{layer}.mtp_block.mlp.gate.e_score_correction_bias" for layer in range(2)}


def test_parameters_are_seen_one_after_the_other_while_they_are_read(tmp_path: Path, monkeypatch) -> None:
    tiny_model("qwen3_moe", None).save_pretrained(tmp_path)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "0")
    seen, ahead = [], []

    def observe(model: Any, name: str) -> None:
        seen.append(name)
        assert model.get_parameter(name).device.type == "cpu"
        ahead.append(sum(parameter.device.type != "meta" for parameter in model.parameters()) - len(seen))

    with hf_models.observing_loaded(observe):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sorted(seen) == sorted(name for name, _ in model.named_parameters())
    assert set(ahead) == {0}
    assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "0"
    count = len(seen)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(seen) == count
    source = inspect.getsource(core_model_loading.convert_and_load_state_dict_in_model)
    assert 'is_env_variable_true("HF_DEACTIVATE_ASYNC_LOAD")' in source


def test_merged_parameters() -> None:
    assert hf_models.merged_along_dim0(tiny_model("qwen3_moe")) == set()
    found = hf_models.merged_along_dim0(tiny_model("kimi_linear"))
    assert "model.layers.0.self_attn.conv1d.weight" in found
    assert all(name.endswith(".conv1d.weight") for name in found)


def test_outputs_are_recorded_outside_of_layers() -> None:
    """As Transformers' own hooks record them, for whom a model asks; these are still there for all else."""
    options = {"output_router_logits": True, "output_attentions": True, "output_hidden_states": True}
    ids = tiny_batch(2, 8)
    for name in ("qwen3_moe", "gpt_oss"):
        plain, ours = tiny_model(name), tiny_model(name)
        for model in (plain, ours):
            model.set_attn_implementation("eager")
        for _ in range(2):  # once is enough
            hf_models.record_outside(ours, list(ours.model.layers))
        recorded = hf_models._RECORDED
        assert [len(layer.__dict__[recorded]) for layer in ours.model.layers] == [2] * len(ours.model.layers)
        for _ in range(2):
            expected, found = plain(input_ids=ids, **options), ours(input_ids=ids, **options)
            for key in ("router_logits", "attentions", "hidden_states"):
                torch.testing.assert_close(found[key], expected[key])
        assert all(one.value is None for layer in ours.model.layers for one in layer.__dict__[recorded])
        assert ours(input_ids=ids).router_logits is None
