"""Multi-token prediction: loaded, trained with the model, saved under the names it came with."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import slipstream
from slipstream import hf_models
from slipstream.train.recipe import Recipe
from slipstream.train.run import run
from tests.tiny_models import tiny_batch, tiny_model

TYPES = ["deepseek_v3", "glm4_moe", "qwen3_next"]


def make_checkpoint(folder: Path, model_type: str, modules: int = 1, **changes: Any) -> dict[str, torch.Tensor]:
    """A tiny checkpoint with modules for multi-token prediction, made of a layer that the model has; its tensors."""
    model = tiny_model(model_type, None, **changes)
    first = model.config.num_hidden_layers
    if model_type != "qwen3_next":
        model.config.num_mtp_layers = modules
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    extra: dict[str, torch.Tensor] = {}
    for number in range(modules):
        prefix = "mtp.layers.0" if model_type == "qwen3_next" else f"model.layers.{first + number}"
        layer = f"model.layers.{first - 1}."
        extra |= {
            name.replace(layer, f"{prefix}."): torch.randn_like(tensor) * 0.1
            for name, tensor in tensors.items()
            if name.startswith(layer)
        }
        beside = {"enorm": 1, "hnorm": 1, "eh_proj": 2, "shared_head.norm": 1}
        if model_type == "qwen3_next":
            prefix, names = "mtp", ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
            beside = dict(zip(names, beside.values(), strict=True))
        for name, inputs in beside.items():
            size = (64, 128) if inputs == 2 else (64,)
            extra[f"{prefix}.{name}.weight"] = torch.randn(size) * 0.1 + (inputs == 1)
        if model_type == "deepseek_v3":
            extra[f"{prefix}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
            extra[f"{prefix}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors | extra


def _load(folder: Path, **kwargs: Any) -> Any:
    return slipstream.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs).train()


def _loss_by_hand(model: Any, ids: torch.Tensor, weight: float) -> torch.Tensor:
    """Token by token as the paper says: h of place i with the embedding of i + k predicts i + k + 1."""
    decoder = model.get_decoder()
    hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
    loss = F.cross_entropy(F.linear(hidden, model.lm_head.weight)[0, :-1], ids[0, 1:])
    losses = []
    for depth, layer in enumerate(model.mtp.layers, start=1):
        kept = ids.shape[1] - depth
        embedded = layer.enorm(decoder.embed_tokens(ids[:, depth:]))
        joined = layer.eh_proj(torch.cat([embedded, layer.hnorm(hidden[:, :kept])], -1))
        positions = torch.arange(kept)[None]
        out = layer.mtp_block(
            joined, position_embeddings=hf_models.rotary_embedding(model, joined, positions), position_ids=positions,
            attention_mask=hf_models.causal_mask(model, joined, None, positions), past_key_values=None,
        )  # fmt: skip
        hidden = layer.post_norm(out)
        logits = F.linear(hidden, model.lm_head.weight)
        losses.append(F.cross_entropy(logits[0, :-1], ids[0, depth + 1 :]))
    return loss + weight * torch.stack(losses).mean()


@pytest.mark.parametrize(("model_type", "modules"), [*((name, 1) for name in TYPES), ("deepseek_v3", 2)])
def test_trains_and_comes_back(tmp_path: Path, model_type: str, modules: int) -> None:
    source = make_checkpoint(tmp_path / "a", model_type, modules)
    model = _load(tmp_path / "a")
    without = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert slipstream.train_mtp(model, loss_weight=0.3) is model
    model.save_pretrained(tmp_path / "untouched")
    saved = load_file(tmp_path / "untouched" / "model.safetensors")
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in source.items())

    ids = tiny_batch(1, 16)
    reference = copy.deepcopy(model)
    expected = _loss_by_hand(reference, ids, 0.3)
    expected.backward()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if other.grad is not None:
            scale = max(other.grad.abs().max().item(), 1e-3)
            assert (parameter.grad - other.grad).abs().max().item() < 1e-4 * scale, name
    assert model.mtp.layers[0].eh_proj.weight.grad.abs().max() > 0

    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.save_pretrained(tmp_path / "b")
    saved = load_file(tmp_path / "b" / "model.safetensors")
    assert saved.keys() == source.keys()
    experts = [name for name in saved if "experts.1.up_proj" in name and name not in without]
    assert any(not torch.equal(saved[name], source[name]) for name in experts)
    again = slipstream.train_mtp(_load(tmp_path / "b"), 0.3)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_16_bits_leave_the_routers_bias_in_fp32(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "a", "glm4_moe")
    model = slipstream.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    conversions = model._weight_conversions
    assert slipstream.train_mtp(model, 0.3)._weight_conversions is conversions
    model.save_pretrained(tmp_path / "b")
    saved = load_file(tmp_path / "b" / "model.safetensors")
    in_fp32 = {name for name, tensor in saved.items() if tensor.dtype == torch.float32}
    assert "model.layers.4.mlp.gate.e_score_correction_bias" in in_fp32
    assert all(name.endswith("e_score_correction_bias") for name in in_fp32)
    assert all(torch.equal(saved[name], tensor.to(saved[name].dtype)) for name, tensor in source.items())


def test_documents_of_a_row_stay_apart(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v3")
    model = slipstream.train_mtp(_load(tmp_path), 1.0)
    one, two = tiny_batch(1, 9, seed=1), tiny_batch(1, 7, seed=2)
    labels = torch.cat([one, two], 1)
    labels[:, 9] = -100
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
    packed = model(
        input_ids=torch.cat([one, two], 1), labels=labels, position_ids=positions, num_items_in_batch=14
    ).loss
    apart = sum(model(input_ids=ids, labels=ids, num_items_in_batch=14).loss for ids in (one, two))
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=0)


def test_weight_zero_and_evaluation_leave_the_loss_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v3")
    model, ids = _load(tmp_path), tiny_batch(1, 16)
    plain = model(input_ids=ids, labels=ids).loss
    slipstream.train_mtp(model, 0.0)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, plain)
    slipstream.train_mtp(model, 0.5)
    assert model(input_ids=ids, labels=ids).loss > plain
    assert torch.equal(model.eval()(input_ids=ids, labels=ids).loss, plain)


def test_what_is_refused(tmp_path: Path) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path / "none")
    model = _load(tmp_path / "none")
    with pytest.raises(ValueError, match="has no modules for multi-token prediction"):
        slipstream.train_mtp(model)
    make_checkpoint(tmp_path / "a", "deepseek_v3")
    model = _load(tmp_path / "a")
    with pytest.raises(ValueError, match="loss_weight=-1"):
        slipstream.train_mtp(model, -1)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("4.hnorm.weight")}
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    model = _load(tmp_path / "a")
    with pytest.raises(ValueError, match=r"lacks mtp\.layers\.0\.hnorm\.weight"):
        slipstream.train_mtp(model)
    assert not any(name.startswith("mtp") for name, _ in model.named_parameters())


def test_from_a_recipe(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", "glm4_moe", vocab_size=512)
    (tmp_path / "rows.jsonl").write_text('{"text": "one two three four"}\n' * 4)
    sections = {
        "model": {"name_or_path": str(tmp_path / "model"), "tokenizer": "bytes"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 32},
        "train": {"output_dir": str(tmp_path / "out"), "max_steps": 1, "mtp_loss_weight": 0.3, "bf16": False},
    }
    run(Recipe.model_validate(sections))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == source.keys()
    assert not torch.equal(saved["model.layers.4.eh_proj.weight"], source["model.layers.4.eh_proj.weight"])
    with pytest.raises(ValueError, match="does not go together with lora"):
        Recipe.model_validate({**sections, "lora": {}})
    with pytest.raises(ValueError, match=r"does not go together with distributed\.tp_size"):
        Recipe.model_validate({**sections, "distributed": {"tp_size": 2}})
