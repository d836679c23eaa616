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

MAX_PARAMETERS = 5_600_000_000  # at 8 bytes each, beside the activations of 4096 tokens
DEPTHS = (4, 3, 2)
EXPERTS = (128, 64, 32, 16, 8, 4)
_PRESET = {"qwen3_moe": "qwen3-30b-a3b", "nemotron_h": "nemotron-3-nano-30b-a3b", "gpt_oss": "gpt-oss-20b",
           "olmoe": "olmoe-1b-7b", "qwen3": "qwen3-8b", "llama": "llama-3.2-1b"}  # fmt: skip
# Depths at which every kind of layer is there.
_DEEPER = {"jamba": 6}
# Published sizes, where the defaults make no model with experts, or none at all.
_SIZES: dict[str, dict[str, Any]] = {
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
    "longcat_flash": {"n_routed_experts": 64, "zero_expert_num": 32, "expert_ffn_hidden_size": 2048},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
}  # fmt: skip
_NO_MORE = "it has no more experts to leave out"
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")


def timed_config(model_type: str) -> PretrainedConfig:
    """The config to time `model_type` at.

    Raises: ValueError when it does not come down to `MAX_PARAMETERS`.
    """
    if model_type in _PRESET:
        preset = _PRESET[model_type]
        return build_config(preset, min(8, PRESETS[preset].layers) if model_type == "nemotron_h" else 4)
    errors = []
    for experts in (None, *EXPERTS):
        for depth in (_DEEPER[model_type],) if model_type in _DEEPER else DEPTHS:
            try:
                config = _cut(model_type, depth, experts)
                size = parameters(config)
            except (ValueError, TypeError, KeyError, IndexError, AssertionError) as error:
                errors.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
                continue
            if size <= MAX_PARAMETERS:
                return config
            errors.append(f"{size / 1e9:.1f} B parameters at {depth} layers and {experts or 'all'} experts")
    raise ValueError(f"{model_type} does not come down to a size for one GPU: {min(errors, key=_NO_MORE.__eq__)}")


def _cut(model_type: str, depth: int, experts: int | None) -> PretrainedConfig:
    config_class = CONFIG_MAPPING[model_type]
    sizes = dict(_SIZES.get(model_type, {}))
    defaults = config_class()
    if hasattr(defaults, "per_layer_config"):
        defaults.allow_global_per_layer_attribute_access = True
    fields = {**defaults.to_dict(), **sizes}
    aliases = getattr(config_class, "attribute_map", {})
    full = next(getattr(defaults, name) for name in _LAYERS if isinstance(getattr(defaults, name, None), int))
    changes: dict[str, Any] = {"use_cache": False}
    # A list with an entry a layer: take those of each kind first, in their order.
    lists = {name: value for name, value in fields.items() if isinstance(value, list) and len(value) == full > 1}
    kept = _one_of_each_kind(list(zip(*lists.values(), strict=True)), depth) if lists else list(range(depth))
    changes |= {name: [value[layer] for layer in kept] for name, value in lists.items()}
    if "layer_types" in sizes:
        depth = len(sizes["layer_types"])
    if "layers_block_type" not in lists:
        changes |= {name: depth for name in _LAYERS if name in fields and name not in aliases}
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


def _one_of_each_kind(kinds: list[tuple[Any, ...]], depth: int) -> list[int]:
    seen: dict[str, int] = {}
    for layer, kind in enumerate(kinds):
        seen.setdefault(repr(kind), layer)
    kept = sorted(seen.values())[:depth]
    last = [layer for layer in range(len(kinds)) if layer not in kept]
    return sorted([*kept, *last[: depth - len(kept)]])


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
    return ", ".join([*words, f"{parameters(config) / 1e9:.1f} B"])
