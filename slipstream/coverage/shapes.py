"""The sizes an architecture is timed at: those of its default config, cut to a few layers that one GPU holds.

Most config classes have a published model's sizes as their defaults. The kinds of layers stay; where two layers of all
experts are still too much, there are fewer experts.
"""

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

from slipstream import hf
from slipstream.bench.presets import PRESETS, build_config

# At 8 bytes each (weights, gradients and AdamW's states in bf16), beside the activations of 4096 tokens, on 80 GB.
MAX_PARAMETERS = 5_600_000_000
# Without kernels of other packages Transformers loops over tokens in Python here, or keeps much for each.
_FEWER_TOKENS = {
    "big_bird": 1024, "blenderbot": 2048, "falcon_mamba": 1024, "jamba": 1024, "kimi_linear": 2048, "mamba": 1024,
    "prophetnet": 512, "recurrent_gemma": 1024, "rwkv": 512, "seed_oss": 2048, "zamba": 256,
}  # fmt: skip
DEPTHS = (4, 3, 2)
EXPERTS = (128, 64, 32, 16, 8, 4)
_PRESET = {"qwen3_moe": "qwen3-30b-a3b", "nemotron_h": "nemotron-3-nano-30b-a3b", "gpt_oss": "gpt-oss-20b",
           "olmoe": "olmoe-1b-7b", "qwen3": "qwen3-8b", "llama": "llama-3.2-1b"}  # fmt: skip
# Published sizes, where the defaults make no model with experts, or none at all.
_SIZES: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 4096, "n_head": 32},
    "cohere2_moe": {"num_experts": 4, "vocab_size": 32768},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 4,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "dbrx": {
        "d_model": 6144, "n_heads": 48, "vocab_size": 100352,
        "attn_config": {"kv_n_heads": 8, "rope_theta": 500000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 6144, "ffn_hidden_size": 10752, "moe_num_experts": 8, "moe_top_k": 4},
    },
    "deepseek_v2": {
        "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
    },
    "dots1": {
        "n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
        "intermediate_size": 10944, "hidden_size": 4096,
    },
    "gemma4_text": {
        "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704,
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
    },
    "granitemoehybrid": {
        "hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 512,
        "shared_intermediate_size": 1024, "num_local_experts": 64, "num_experts_per_tok": 6, "mamba_n_heads": 48,
        "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "vocab_size": 100352,
        "layer_types": ["mamba", "attention", "mamba", "mamba"],
    },
    "hunyuan_v1_moe": {
        "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_experts": 64,
        "moe_topk": 8, "intermediate_size": 3072, "moe_intermediate_size": 3072, "vocab_size": 128167,
    },
    "hunyuan_v1_dense": {"head_dim": 128},
    # Each eighth layer has attention, each other one experts: all kinds within 4 layers.
    "jamba": {"attn_layer_offset": 1},
    "longcat_flash": {"n_routed_experts": 64, "zero_expert_num": 32, "expert_ffn_hidden_size": 2048},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 2048,
        "indexer_compress_ratio": 64,
    },
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention"] * 2},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "linear_attention"],
        "hybrid_layer_ids": [1],
        "n_mamba_heads": 80,  # of 64 channels; the default is 8 of 640
    },
}  # fmt: skip
_NO_MORE = "it has no more experts to leave out"
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")


def timed_config(model_type: str, seq_len: int = 4096) -> PretrainedConfig:
    """The config to time `model_type` at, with positions for rows of `seq_len` tokens.

    Raises: ValueError when it does not come down to `MAX_PARAMETERS`.
    """
    if model_type in _PRESET:
        preset = _PRESET[model_type]
        return build_config(preset, min(8, PRESETS[preset].layers) if model_type == "nemotron_h" else 4)
    errors = []
    for experts in (None, *EXPERTS):
        for depth in DEPTHS:
            try:
                config = _cut(model_type, depth, experts, seq_len)
                size = parameters(config)
            except (ValueError, TypeError, KeyError, IndexError, AssertionError) as error:
                errors.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
                continue
            if size <= MAX_PARAMETERS:
                return config
            errors.append(f"{size / 1e9:.1f} B parameters at {depth} layers and {experts or 'all'} experts")
    raise ValueError(f"{model_type} does not come down to a size for one GPU: {min(errors, key=_NO_MORE.__eq__)}")


def timed_tokens(model_type: str, seq_len: int) -> int:
    """Of a row; fewer than `seq_len` for a few architectures."""
    return min(seq_len, _FEWER_TOKENS.get(model_type, seq_len))


def _cut(model_type: str, depth: int, experts: int | None, seq_len: int) -> PretrainedConfig:
    config_class = CONFIG_MAPPING[model_type]
    sizes = dict(_SIZES.get(model_type, {}))
    defaults = config_class()
    if hasattr(defaults, "per_layer_config"):
        defaults.allow_global_per_layer_attribute_access = True
    fields = {**defaults.to_dict(), **sizes}
    aliases = getattr(config_class, "attribute_map", {})
    full = next(getattr(defaults, name) for name in _LAYERS if isinstance(getattr(defaults, name, None), int))
    changes: dict[str, Any] = {"use_cache": False}
    # Lists with an entry a layer.
    lists = {name: value for name, value in fields.items() if isinstance(value, list) and len(value) == full > 1}
    kept = _layers_of_all_kinds(list(lists.values()), depth) if lists else list(range(depth))
    changes |= {name: [value[layer] for layer in kept] for name, value in lists.items()}
    depth = next((len(sizes[name]) for name in ("layer_types", "layers_block_type") if name in sizes), depth)
    changes |= {name: depth for name in _LAYERS if name in fields and name not in aliases}
    # Some count from their padding's id on; past its table's end a position is an error that ends the process.
    enough = seq_len + 8
    changes |= {name: enough for name in _POSITIONS if isinstance(fields.get(name), int) and fields[name] < enough}
    for name in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"):
        if fields.get(name):
            changes[name] = 1
    for name in ("num_kv_shared_layers", "num_nextn_predict_layers"):
        if fields.get(name):
            changes[name] = 0
    if experts is not None:
        found = [name for name in hf.NUM_EXPERTS if name in fields and name not in aliases]
        if not found or all((fields[name] or 0) <= experts for name in found):
            raise ValueError(_NO_MORE)
        changes |= dict.fromkeys(found, experts)
        sizes = {name: value for name, value in sizes.items() if name not in found}
    if fields.get("n_group") and fields["n_group"] > (experts or fields["n_group"]):
        changes["n_group"] = 1
    return config_class(**{**changes, **sizes})


def _layers_of_all_kinds(lists: list[list[Any]], depth: int) -> list[int]:
    """The layers to keep: with every kind of attention and of MLP among them, then as many combinations as there is
    room for, then the first.

    Raises: ValueError when `depth` is too little for the kinds.
    """
    layers = list(zip(*lists, strict=True))
    words = {value for values in lists for value in values if isinstance(value, str)}
    kept: list[int] = []
    while missing := words - {value for layer in kept for value in layers[layer] if isinstance(value, str)}:
        kept.append(max(range(len(layers)), key=lambda layer: len(missing.intersection(map(str, layers[layer])))))
    if len(kept) > depth:
        raise ValueError(f"its kinds of layers take {len(kept)}")
    firsts = {repr(kind): layer for layer, kind in reversed(list(enumerate(layers)))}
    rest = [layer for layer in (*sorted(firsts.values()), *range(len(layers))) if layer not in kept]
    return sorted([*kept, *list(dict.fromkeys(rest))[: depth - len(kept)]])


def parameters(config: PretrainedConfig) -> int:
    """How many the model of `config` has."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def in_words(config: PretrainedConfig) -> str:
    """Layers, width, experts and parameters, for the table."""
    text = config.get_text_config()
    experts = hf.num_routed_experts(config)
    words = [f"{getattr(text, 'num_hidden_layers', '?')} layers", f"width {getattr(text, 'hidden_size', '?')}"]
    words += [f"{experts} experts"] if experts else []
    if text.vocab_size < type(text)().vocab_size:
        words.append(f"vocabulary {text.vocab_size}")
    return ", ".join([*words, f"{parameters(config) / 1e9:.1f} B"])
