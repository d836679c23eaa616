"""Merged checkpoints against PEFT's own merge, in the base's files; and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slipstream.adapters import all_experts
from slipstream.checkpoint import merge as module
from slipstream.checkpoint.merge import merge
from slipstream.checkpoint.untie import record
from slipstream.cli import main
from slipstream.shared_adapters import share_experts
from tests.tiny_models import tiny_batch, tiny_model

IDS = tiny_batch(2, 16)
SOME_EXPERT = "model.layers.1.mlp.experts.1.up_proj.weight"
ATTENTION = {"target_modules": ["q_proj", "o_proj"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "experts by name in the checkpoint": ("qwen3_moe", {**ATTENTION, "use_rslora": True}),
    "fused, transposed, biased": ("gpt_oss", {**ATTENTION, "rank_pattern": {"gate_up_proj": 6}}),
    "ungated": ("nemotron_h", {"target_modules": ["q_proj"]}),
    "all-linear, the router too": ("mixtral", {"target_modules": "all-linear"}),
    "a shared expert": ("deepseek_v3", {"target_modules": "all-linear"}),
    "one pair for all experts": ("qwen3_moe", {"share_experts": True}),
    "dense, embedding and whole head": (
        "llama",
        {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    ),
}


def make(folder: Path, model_type: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Path, Path]:
    """A base in several files, and an adapter that plain PEFT saved."""
    base, adapter = folder / "base", folder / "adapter"
    tied = {"tie_word_embeddings": True} if changes.pop("tied", False) else {}
    tiny_model(model_type, None, **tied).to(dtype).save_pretrained(base, max_shard_size="200KB")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    torch.manual_seed(1)
    values = {"r": 4, "target_parameters": all_experts(model) or None, "init_lora_weights": False, **changes}
    shared = values.pop("share_experts", False)
    adapted = get_peft_model(model, share_experts(LoraConfig(**values), shared))
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            parameter.data.mul_(1.1)
    adapted.save_pretrained(adapter)
    return base, adapter


def keys(folder: Path) -> dict[str, list[str]]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found[path.name] = list(file.keys())
    return found


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


@pytest.mark.parametrize("case", CASES)
def test_the_same_as_peft(case: str, tmp_path: Path) -> None:
    model_type, changes = CASES[case]
    base, adapter = make(tmp_path, model_type, **changes)
    (base / "notes.txt").write_text("of the base")
    (adapter / "tokenizer.json").write_text("{}")
    done = merge(str(adapter), str(base), tmp_path / "merged", verify=True)
    assert done.logit_error is not None
    assert done.logit_error < 1e-5 < 1e-2 < (done.adapter_effect or 0)
    assert keys(tmp_path / "merged") == keys(base)
    assert done.files == len(keys(base)) > 1
    assert 0 < done.changed < done.tensors
    with torch.no_grad():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        torch.testing.assert_close(logits(tmp_path / "merged"), model(IDS).logits, rtol=1e-5, atol=1e-5)
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "notes.txt", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert not any(name.startswith(("adapter", ".")) for name in names)


def test_16_bits_stay_16_bits(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "qwen3_moe", torch.bfloat16, **ATTENTION)
    done = merge(str(adapter), str(base), tmp_path / "merged", verify=True)
    assert done.logit_error is not None
    assert 0 < done.logit_error < module.BOUND_OF_16_BITS
    for name in keys(base):
        assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / name).values()} == {torch.bfloat16}


def test_one_file_at_a_time_and_experts_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = make(tmp_path, "qwen3_moe", target_modules=[])
    sizes: list[int] = []
    convert = module._converted

    def watched(*args: Any) -> Any:
        made = convert(*args)
        sizes.append(sum(tensor.nbytes for tensor in made.values()))
        return made

    monkeypatch.setattr(module, "_converted", watched)
    monkeypatch.setattr("slipstream.checkpoint.export_plan.PART_BYTES", 2 * 64 * 64 * 4)
    merge(str(adapter), str(base), tmp_path / "merged")
    assert max(sizes) == 2 * 64 * 64 * 4  # two experts of eight
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "merged"), expected(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Do not write to them."""
    return make(tmp_path_factory.mktemp("made"), "qwen3_moe", **ATTENTION)


def refused(adapter: Path | str, base: Path | str, output: Path, **options: Any) -> str:
    before = sorted(output.parent.rglob("*"))
    with pytest.raises((ValueError, OSError)) as caught:
        merge(str(adapter), str(base), output, **options)
    assert sorted(output.parent.rglob("*")) == before
    return str(caught.value)


def changed(adapter: Path, folder: Path, **values: Any) -> Path:
    """A copy of `adapter` whose config has other values."""
    folder.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text()) | values
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    return folder


def test_another_base(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    out = tmp_path / "merged"
    other = tmp_path / "other"
    tiny_model("qwen3_moe", None, seed=5).save_pretrained(other)
    assert f"trained on {base}; give that, or --any-base" in refused(adapter, other, out)
    merge(str(adapter), str(other), tmp_path / "on-purpose", any_base=True)
    tiny_model("qwen3_moe", None, num_experts=4).save_pretrained(tmp_path / "fewer" / "base")
    assert "does not fit this base: " in refused(adapter, tmp_path / "fewer" / "base", out)
    tiny_model("qwen3_moe", None, num_hidden_layers=2).save_pretrained(tmp_path / "shorter" / "base")
    assert "does not fit this base, which has no model.layers." in refused(adapter, tmp_path / "shorter" / "base", out)
    tiny_model("qwen3_moe", None, num_hidden_layers=6).save_pretrained(tmp_path / "longer" / "base")
    assert "is missing" in refused(adapter, tmp_path / "longer" / "base", out)


def test_what_is_not_merged(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    out = tmp_path / "merged"
    for number, values in enumerate(({"use_dora": True}, {"init_lora_weights": "pissa"}, {"peft_type": "IA3"})):
        said = refused(changed(adapter, tmp_path / str(number), **values), base, out)
        assert str(next(iter(values.values()))) in said or next(iter(values)) in said
    assert "no such folder" in refused(tmp_path / "nowhere", base, out)
    assert "name a folder that PEFT saved" in refused(base, base, out)
    assert "is where the model comes from" in refused(adapter, base, base)
    for overwrite in (False, True):
        assert "is where the model comes from" in refused(adapter, base, adapter, overwrite=overwrite)
    quantised = tmp_path / "q" / "base"
    quantised.mkdir(parents=True)
    (quantised / "config.json").write_text('{"quantization_config": {}}')
    assert "quantised" in refused(adapter, quantised, out)
    incomplete = tmp_path / "i" / "base"
    incomplete.mkdir(parents=True)
    (incomplete / "config.json").write_text((base / "config.json").read_text())
    assert "model.safetensors is missing" in refused(adapter, incomplete, out)


def test_damaged_files_are_named(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = made
    out = tmp_path / "merged"
    for name, told in (("adapter_model.safetensors", "ADAPTER: "), ("adapter_config.json", "ADAPTER: ")):
        broken = changed(adapter, tmp_path / name)
        (broken / name).write_bytes((broken / name).read_bytes()[:-100])
        assert refused(broken, base, out).startswith(f"{told}{broken / name} is damaged (")
    for name in ("model-00001-of-*", "*.index.json", "config.json"):
        broken = Path(shutil.copytree(base, tmp_path / name[:5] / "base"))
        (file,) = broken.glob(name)
        file.write_bytes(file.read_bytes()[:-10])
        assert refused(adapter, broken, out, any_base=True).startswith(f"--into: {file} is damaged (")
    for number, key in enumerate(("lm_head.weight", SOME_EXPERT)):
        broken = Path(shutil.copytree(base, tmp_path / str(number) / "base"))
        (file,) = [broken / file for file, names in keys(base).items() if key in names]
        save_file(load_file(file) | {key: torch.zeros(3, 2)}, file, metadata={"format": "pt"})
        assert "lacks weights of some layers, or has them in other shapes" in refused(adapter, broken, out)


@pytest.mark.parametrize(
    ("changes", "unties"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"target_modules": ["lm_head"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, False),
        ({"target_modules": ["q_proj"]}, False),
    ],
)
def test_a_tied_head(changes: dict[str, Any], unties: bool, tmp_path: Path) -> None:
    """PEFT's own merge changes the shared weight in place, so the model before it is the measure."""
    base, adapter = make(tmp_path, "llama", tied=True, **changes)
    done = merge(str(adapter), str(base), tmp_path / "merged", verify=True)
    assert done.untied == (("lm_head.weight",) if unties else ())
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is not unties
    with torch.no_grad():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        expected = model(IDS).logits
    assert (logits(done.output) - expected).norm() < 1e-5 * expected.norm()
    before, after = (json.loads((path / "model.safetensors.index.json").read_text()) for path in (base, done.output))
    assert after["weight_map"].keys() - before["weight_map"].keys() == set(done.untied)
    assert after["metadata"]["total_size"] - before["metadata"]["total_size"] == unties * 256 * 64 * 4
    assert {key for names in keys(done.output).values() for key in names} == after["weight_map"].keys()


def test_a_nested_config_is_untied_too(tmp_path: Path) -> None:
    config = {"text_config": {"model_type": "a"}, "audio_config": {"tie_word_embeddings": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    record(tmp_path, {}, {})
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "tie_word_embeddings": False,
        "text_config": {"model_type": "a", "tie_word_embeddings": False},
        "audio_config": {"tie_word_embeddings": True},
    }


def test_a_base_without_its_head(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "llama", target_modules=["lm_head"])
    weights = {}
    for name in keys(base):
        weights |= load_file(base / name)
        (base / name).unlink()
    (base / "model.safetensors.index.json").unlink()
    del weights["lm_head.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert "changes lm_head.weight [256, 64], and the checkpoint has no such tensor" in refused(
        adapter, base, tmp_path / "merged"
    )


def test_a_failed_check_leaves_nothing(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = made
    monkeypatch.setattr(module, "_converted", lambda *args: {})
    assert "nothing was written" in refused(adapter, base, tmp_path / "merged", verify=True)


def test_the_command(made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = made
    arguments = ["merge", str(adapter), "--into", str(base), "--output", str(tmp_path / "merged")]
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--verify"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert "tensors changed, in " in out
    assert "verified: logits within " in out
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 1
    assert "pass --overwrite" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--overwrite"])
    assert left.value.code == 0
