import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from slipstream.checkpoint import upcycle as module
from slipstream.checkpoint.upcycle import TEXT, check_fits, upcycle

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = ["<pad>", "<s>", "</s>", *BYTES]
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte tokenizer, a chat template and a generation config."""
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(VOCABULARY)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (2, 1), (3, 3)])
def test_reloads_in_transformers_with_the_dense_logits(
    dense_folder: Path, tmp_path: Path, experts: int, top_k: int
) -> None:
    report = upcycle(dense_folder, tmp_path / "moe", experts=experts, top_k=top_k, dtype="float32")

    dense = AutoModelForCausalLM.from_pretrained(dense_folder)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not any(loading.values())
    assert type(model).__name__ == "MixtralForCausalLM"
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (experts, top_k)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(dense_folder).chat_template
    assert model.generation_config.temperature == 0.7

    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-5, rtol=0)
    assert report.max_logit_difference < 1e-5
    assert report.dense_parameters == dense.num_parameters()
    assert report.parameters == model.num_parameters()
    mlps = 2 * 3 * 32 * 48
    routers = 2 * 32 * experts
    assert report.active_parameters == dense.num_parameters() + (top_k - 1) * mlps + routers


def test_the_seed_decides_the_routers(dense_folder: Path, tmp_path: Path) -> None:
    name = "model.layers.1.block_sparse_moe.gate.weight"
    routers = []
    for run, seed in enumerate((0, 0, 1)):
        upcycle(dense_folder, tmp_path / str(run), seed=seed)
        routers.append(load_file(tmp_path / str(run) / "model.safetensors")[name])
    assert routers[0].dtype == torch.bfloat16
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])


@pytest.mark.parametrize(
    ("config", "culprit"),
    [
        (Qwen3Config(**SIZES, head_dim=8), "self_attn.q_norm.weight"),
        (Qwen2Config(**SIZES), "self_attn.q_proj.bias"),
        (LlamaConfig(**SIZES, attention_bias=True), "self_attn.o_proj.bias"),
        (LlamaConfig(**SIZES, mlp_bias=True), "mlp.up_proj.bias"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "activation 'gelu'"),
        (MistralConfig(**SIZES, sliding_window=16), "sliding-window"),
        (AutoConfig.for_model("gemma2", **SIZES, head_dim=8), "pre_feedforward_layernorm.weight"),
        (AutoConfig.for_model("mixtral", **SIZES), "mlp.experts.gate_up_proj"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_a_decoder_that_does_not_fit_is_refused_by_name(config: LlamaConfig, culprit: str) -> None:
    with pytest.raises(ValueError, match="does not fit Mixtral exactly") as error:
        check_fits(config)
    assert culprit in str(error.value)


def test_fitting_decoders_pass() -> None:
    check_fits(MistralConfig(**SIZES, sliding_window=None))
    check_fits(LlamaConfig(**SIZES, tie_word_embeddings=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 1}, "experts=1 is too few"),
        ({"experts": 4, "top_k": 5}, "top_k=5 is out of range; with experts=4 use 1 to 4"),
        ({"top_k": 0}, "top_k=0 is out of range"),
        ({"dtype": "float16"}, "dtype='float16' is unknown; use bfloat16 or float32"),
    ],
)
def test_values_out_of_range(dense_folder: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle(dense_folder, tmp_path / "moe", **options)
    assert not any(tmp_path.iterdir())


def test_unlike_logits_write_nothing(dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "max_logit_difference", lambda *_: float("nan"))
    with pytest.raises(ValueError, match="nothing was written"):
        upcycle(dense_folder, tmp_path / "moe")
    assert not any(tmp_path.iterdir())


def test_an_existing_output_folder_is_kept_unless_told(dense_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "moe"
    output.mkdir()
    notes = output / "notes.txt"
    notes.write_text("mine")
    upcycle(dense_folder, output)
    before = (output / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"already holds a model.*--overwrite"):
        upcycle(dense_folder, output, experts=2)
    assert (output / "config.json").read_bytes() == before
    upcycle(dense_folder, output, experts=2, overwrite=True)
    assert json.loads((output / "config.json").read_text())["num_local_experts"] == 2
    assert notes.read_text() == "mine"
    assert not (output / ".incomplete").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_the_source_is_never_replaced(dense_folder: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in dense_folder.iterdir()}
    with pytest.raises(ValueError, match="is where the model comes from"):
        upcycle(dense_folder, dense_folder, overwrite=True)
    assert {path.name: path.stat().st_mtime_ns for path in dense_folder.iterdir()} == before


def test_a_failed_save_leaves_the_old_model(
    dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "moe"
    upcycle(dense_folder, output)

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        upcycle(dense_folder, output, experts=2, overwrite=True)
    assert json.loads((output / "config.json").read_text())["num_local_experts"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_missing_and_damaged_sources(dense_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder or file"):
        upcycle(tmp_path / "nowhere", tmp_path / "moe")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"no config.json and 0 \.gguf files"):
        upcycle(empty, tmp_path / "moe")

    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in dense_folder.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    weights = load_file(damaged / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, the first model.layers.1.mlp.up_proj.weight"):
        upcycle(damaged, tmp_path / "moe")
    (damaged / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="damaged safetensors file"):
        upcycle(damaged, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def write_gguf(path: Path) -> None:
    """A random quantized Llama in llama.cpp's names, with a byte tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    vocabulary = [*VOCABULARY, "he"]
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_merges(["h e"])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    random = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(vocabulary), 64),
        "output_norm.weight": (64,),
        "blk.0.attn_norm.weight": (64,),
        "blk.0.ffn_norm.weight": (64,),
        "blk.0.attn_q.weight": (64, 64),
        "blk.0.attn_k.weight": (32, 64),
        "blk.0.attn_v.weight": (32, 64),
        "blk.0.attn_output.weight": (64, 64),
        "blk.0.ffn_gate.weight": (96, 64),
        "blk.0.ffn_up.weight": (96, 64),
        "blk.0.ffn_down.weight": (64, 96),
    }
    for name, shape in shapes.items():
        values = random.normal(0, 0.3, shape).astype(np.float32)
        if len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    folder.mkdir()
    write_gguf(folder / "tiny.Q8_0.gguf")
    report = upcycle(folder, tmp_path / "from-folder")
    assert report.max_logit_difference < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "from-folder").chat_template == "{{ messages[0].content }}"

    upcycle(folder / "tiny.Q8_0.gguf", tmp_path / "from-file")
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("from-folder", "from-file")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_gguf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else found(name, *rest))
    with pytest.raises(ImportError, match=r"pip install 'slipstream\[gguf\]'"):
        upcycle(tmp_path / "tiny.gguf", tmp_path / "moe")
