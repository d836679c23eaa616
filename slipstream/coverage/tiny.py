"""A tiny random model of any causal-LM architecture of the installed Transformers, from its config class alone."""

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

VOCAB_SIZE = 256

# Set on every config that has a field of this name.
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_expert_group": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "mlp_only_layers": [],
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "o_lora_rank": 16,
    "block_size": 16,
    "shared_experts_intermediate_size": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "mamba_d_state": 16,
    "chunk_size": 16,
    "mamba_chunk_size": 16,
    "router_hidden_size": 16,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 32,
    "sliding_window": 32,
    "is_decoder": True,
    # Earlier names for sizes.
    "d_inner": 96,
    "d_head": 16,
    "d_ff": 96,
    "dff": 96,
    "dim_ff": 96,
    "dim_head": 16,
    "ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "rotary_dim": 8,
    "pronunciation_vocab_size": 64,
    "shape_vocab_size": 64,
}

# Where a field's meaning differs or has to fit another one.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"head_dim": 16, "layer_group_size": 2},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 4,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
        "n_layers": 2,
        "n_heads": 4,
        "d_model": 64,
        "max_seq_len": 256,
    },
    "dots3_note_text": {"num_key_value_heads": 4, "layer_types": ["indexed_attention", "sliding_attention"] * 2},
    "gemma3n_text": {
        "intermediate_size": [96] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 0,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "top_k_experts": 2,
        "num_kv_shared_layers": 0,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_heads": 4, "window_size": 32},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
    },
    "hunyuan_v1_moe": {"moe_topk": 2},
    "jamba": {
        "attn_layer_period": 4,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_dt_rank": 8,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longcat_flash": {
        "head_dim": 8,
        "n_routed_experts": 8,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 32,
        "ffn_hidden_size": 96,
        "num_layers": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 256},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "mamba_num_heads": 8,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 32,
        "time_step_min": 1e-6,  # by which Transformers clamps, where the config's time_step_limit says 0
    },
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "indexed_attention"],
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 8,
        "heads_per_ngram": 2,
        "make_ngram_vocab_size_divisible_by": 8,
        "ngram_vocab_size_base": 512,
        "num_experts_per_tok": 2,
    },
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local"] * 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 8,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention"],
        "hybrid_layer_ids": [2],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """The architecture's own default config, shrunk to 4 layers of width 64 with 8 experts, top 2."""
    config_class = CONFIG_MAPPING[model_type]
    defaults = config_class()
    if hasattr(defaults, "per_layer_config"):
        defaults.allow_global_per_layer_attribute_access = True
    aliases = getattr(config_class, "attribute_map", {})
    known = {*defaults.to_dict(), *vars(defaults)}
    if "layers_block_type" in OVERRIDES.get(model_type, {}):
        known.discard("num_hidden_layers")
    values = {name: value for name, value in SMALL.items() if name in known and name not in aliases}
    for name, target in aliases.items():
        if name in SMALL and target not in SMALL:
            values[target] = SMALL[name]
    if getattr(defaults, "num_key_value_heads", None) == getattr(defaults, "num_attention_heads", None):
        values["num_key_value_heads"] = values.get("num_attention_heads", 4)
    if "qk_rope_head_dim" in values:
        values.pop("head_dim", None)
    changes = {aliases.get(name, name): value for name, value in changes.items()}
    return config_class(**{**values, **OVERRIDES.get(model_type, {}), **changes})


def tiny_model(
    model_type: str, experts_implementation: str | None = "eager", seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A Transformers model in fp32 with weights large enough that every expert matters."""
    torch.manual_seed(seed)
    options = {} if experts_implementation is None else {"experts_implementation": experts_implementation}
    model = transformers.AutoModelForCausalLM.from_config(
        tiny_config(model_type, **changes), dtype=torch.float32, **options
    )
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                scale = 0.4 if "experts" in name else 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.train()


def tiny_batch(batch: int = 2, length: int = 32, seed: int = 2) -> torch.Tensor:
    """Random token ids `[batch, length]` without special tokens."""
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))
