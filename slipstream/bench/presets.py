"""The shapes that are measured: published models, at a depth that fits one GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PretrainedConfig

_LLAMA_3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_NEMOTRON_3 = {
    "vocab_size": 131072, "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 2, "mamba_head_dim": 64,
    "ssm_state_size": 128, "n_groups": 8, "n_shared_experts": 1, "norm_topk_prob": True,
    "max_position_embeddings": 262144,
}  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """A model's shapes: what its config changes of the architecture's defaults, and what fits one GPU of 80 GB.

    Attributes:
        model_type: the architecture's name in Transformers.
        fields: config fields at full size. `pattern` is Nemotron's own: M Mamba2, E experts, * attention.
        layers: the depth that is measured unless another is asked for, at about 8 bytes a parameter.
        experts: the number of experts that is measured, where one layer of all is too much for a GPU.
        note: what a reader has to know about these shapes.
    """

    model_type: str
    layers: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    experts: int | None = None
    note: str = ""


PRESETS: dict[str, Preset] = {
    "qwen3-30b-a3b": Preset("qwen3_moe", 8, {
        "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": True, "max_position_embeddings": 40960,
    }),
    "qwen3-235b-a22b": Preset("qwen3_moe", 2, {
        "vocab_size": 151936, "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 1536, "norm_topk_prob": True, "max_position_embeddings": 40960,
    }),
    "nemotron-3-nano-30b-a3b": Preset("nemotron_h", 13, {
        **_NEMOTRON_3, "hidden_size": 2688, "mamba_num_heads": 64, "n_routed_experts": 128, "num_experts_per_tok": 6,
        "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712, "routed_scaling_factor": 2.5,
        "pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    }),
    "nemotron-3-ultra-550b": Preset("nemotron_h", 9, {
        **_NEMOTRON_3, "hidden_size": 8192, "num_attention_heads": 64, "mamba_num_heads": 256, "n_routed_experts": 512,
        "num_experts_per_tok": 22, "moe_latent_size": 2048, "moe_intermediate_size": 5120,
        "moe_shared_expert_intermediate_size": 10240, "routed_scaling_factor": 5.0, "pattern": "MEMEMEME*" * 12,
    }, experts=32, note="derived: hidden and latent width, experts and the totals are published, the rest is not"),
    "gpt-oss-20b": Preset("gpt_oss", 6, {"num_hidden_layers": 24, "num_local_experts": 32}),
    "gpt-oss-120b": Preset("gpt_oss", 2, {"num_hidden_layers": 36, "num_local_experts": 128}),
    "deepseek-v3": Preset("deepseek_v3", 3, {"max_position_embeddings": 163840}, experts=64),
    "mixtral-8x7b": Preset("mixtral", 4),
    "olmoe-1b-7b": Preset("olmoe", 16, {"intermediate_size": 1024}),
    "qwen3-8b": Preset("qwen3", 8, {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    }),
    "llama-3.2-1b": Preset("llama", 16, {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        "max_position_embeddings": 131072, "rope_parameters": _LLAMA_3_ROPE, "rms_norm_eps": 1e-5,
    }),
}  # fmt: skip

# For --tiny: small widths for every field of these names, so that all of the code runs on a CPU in seconds.
_TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16,
    "moe_latent_size": 32, "sliding_window": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_BLOCKS = {"M": "linear_attention", "E": "moe", "*": "full_attention"}


def build_config(
    name: str,
    layers: int | None = None,
    *,
    experts: int | None = None,
    tiny: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> PretrainedConfig:
    """The config of a preset.

    Args:
        name: of a preset.
        layers: depth; None for the preset's own, 0 for the full model's. The kinds of layer stay mixed as they are.
        experts: routed experts a layer; None for the preset's own, 0 for the full model's.
        tiny: small widths, and 8 experts.
        changes: config fields that win over all of this.

    Raises:
        ValueError: no such preset or field, or a size that does not fit the model.
    """
    if name not in PRESETS:
        raise ValueError(f"--model {name}: no such preset; use one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    fields = dict(preset.fields)
    pattern = fields.pop("pattern", None)
    default = AutoConfig.for_model(preset.model_type)
    full = len(pattern) if pattern else fields.get("num_hidden_layers", default.num_hidden_layers)
    if layers is None:
        layers = min(preset.layers, 6 if pattern else 4) if tiny else preset.layers
    layers = layers or full
    if not 1 <= layers <= full:
        raise ValueError(f"--layers {layers}: {name} has {full} layers; use 1 to {full}, or 0 for all")

    if pattern:
        fields["layers_block_type"] = [_BLOCKS[letter] for letter in pattern[:layers]]
    else:
        fields["num_hidden_layers"] = layers
    if (dense := getattr(default, "first_k_dense_replace", None)) and layers < full:
        fields["first_k_dense_replace"] = max(1, round(dense * layers / full))
    if tiny:
        known = {**default.to_dict(), **fields}
        fields |= {key: value for key, value in _TINY.items() if known.get(key) is not None}
        if known.get("kv_lora_rank") is not None:
            fields.pop("head_dim", None)  # of the rotary part alone
        if default.num_key_value_heads == default.num_attention_heads and "num_key_value_heads" not in preset.fields:
            fields["num_key_value_heads"] = fields["num_attention_heads"]
    elif experts is None:
        experts = preset.experts
    if experts:
        # Some architectures have two names for it, one an alias of the other.
        keys = [key for key in _EXPERTS if key in fields] or [key for key in _EXPERTS if key in default.to_dict()]
        if not keys:
            raise ValueError(f"--experts {experts}: {name} is a dense model; leave it out")
        fields |= dict.fromkeys(keys, experts)

    changes = dict(changes or {})
    allowed = {*default.to_dict(), *vars(default), *default.attribute_map, *fields}
    if unknown := [key for key in changes if key not in allowed]:
        raise ValueError(f"--set {unknown[0]}: {type(default).__name__} has no such field")
    return AutoConfig.for_model(preset.model_type, **{**fields, "use_cache": False, **changes})
