"""Weights for multi-token prediction come through loading and saving, on one rank and several."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import slipstream
from slipstream.checkpoint import passthrough
from tests.distributed.harness import run_ranks
from tests.tiny_models import tiny_batch, tiny_model


def _with_mtp(folder: Path, model_type: str, sharded: bool = False) -> dict[str, torch.Tensor]:
    """A checkpoint of `model_type` with made-up tensors for multi-token prediction; all that it holds."""
    model = tiny_model(model_type, None)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    layer = f"model.layers.{model.config.num_hidden_layers}"
    names = {
        "deepseek_v3": (f"{layer}.enorm.weight", f"{layer}.eh_proj.weight", f"{layer}.mlp.experts.3.up_proj.weight"),
        "qwen3_next": ("mtp.fc.weight", "mtp.layers.0.mlp.experts.1.up_proj.weight", "mtp.norm.weight"),
        "nemotron_h": ("mtp.layers.0.eh_proj.weight", "mtp.layers.1.mixer.experts.0.up_proj.weight"),
        "llama": (),
    }[model_type]
    extra = {name: torch.randn(6, 10, dtype=torch.bfloat16) for name in names}
    if sharded:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        save_file(extra, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
        places = {name: f"model-0000{1 + (name in extra)}-of-00002.safetensors" for name in (*tensors, *extra)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    else:
        save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors | extra


def _same(folder: Path, expected: dict[str, torch.Tensor]) -> bool:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


@pytest.mark.parametrize(
    ("model_type", "sharded"), [("deepseek_v3", True), ("qwen3_next", False), ("nemotron_h", True), ("llama", False)]
)
def test_nothing_is_lost(tmp_path: Path, model_type: str, sharded: bool) -> None:
    expected = _with_mtp(tmp_path / "a", model_type, sharded)
    model = slipstream.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    ids = tiny_batch(1, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    model.save_pretrained(tmp_path / "b")
    assert _same(tmp_path / "b", expected)
    model.save_pretrained(tmp_path / "a", max_shard_size="50KB")  # over its own source, twice
    model.save_pretrained(tmp_path / "a", max_shard_size="60KB")
    assert _same(tmp_path / "a", expected)
    again = slipstream.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_lost_source_is_said(tmp_path: Path) -> None:
    expected = _with_mtp(tmp_path / "a", "deepseek_v3", sharded=True)
    model = slipstream.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    (tmp_path / "a" / "model-00002-of-00002.safetensors").unlink()
    with pytest.warns(UserWarning, match="is gone, and with it 3 tensors"):
        model.save_pretrained(tmp_path / "b")
    trained = {name: tensor for name, tensor in expected.items() if "layers.4." not in name}
    assert _same(tmp_path / "b", trained)


def test_layers_that_the_config_leaves_out_are_not_kept(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3", None)
    model.save_pretrained(tmp_path)
    model.config.num_hidden_layers, model.config.num_mtp_layers = 2, 1
    found = passthrough.find(str(tmp_path), model.config)
    assert {name.split(".")[2] for name in found} == {"2"}
    model.config.num_mtp_layers = 0
    assert passthrough.find(str(tmp_path), model.config) == {}


def _load_and_save(source: Path, target: Path) -> None:
    setup = {"ep_size": 2}
    model = slipstream.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, distributed_setup=setup)
    model.save_pretrained(target, max_shard_size="50KB")


def test_nothing_is_lost_over_ranks(tmp_path: Path) -> None:
    expected = _with_mtp(tmp_path / "a", "deepseek_v3", sharded=True)
    run_ranks(_load_and_save, 2, tmp_path / "a", tmp_path / "b")
    assert _same(tmp_path / "b", expected)
