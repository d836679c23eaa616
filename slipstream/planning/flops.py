"""Floating-point operations of a training step, and parameters, counted from a model's config.

Every matrix product with a weight costs 2 operations per weight and token (multiply, add); an expert's weights count
for the tokens that it gets; attention and the Mamba2 scan are added from the config's fields. Backward costs twice the
forward. Recomputation (activation checkpointing) does not count: it is not work that the step needs.

The weights are those of the model built on the meta device, so that no architecture needs a formula of its own.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from slipstream import hf

_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class Parameters:
    """How many parameters a model has.

    Attributes:
        total: all of them, tied ones once.
        active: those that one token meets: of the routed experts only its top-k.
        routed: those of the routed experts.
    """

    total: int
    active: int
    routed: int


@dataclass(frozen=True)
class ForwardFlops:
    """Operations of one forward pass, per token on average.

    Attributes:
        dense: projections, dense and shared MLPs, routers, convolutions.
        experts: the routed experts, by top-k.
        attention: the products of queries with keys and of scores with values. A causal mask's half is left out, and
            so is what lies beyond a sliding window or in another document.
        scan: Mamba2's chunked scan (its matrix form; approximate).
        head: the output head, on every token.
    """

    dense: float
    experts: float
    attention: float
    scan: float
    head: float

    @property
    def total(self) -> float:
        return self.dense + self.experts + self.attention + self.scan + self.head


def training_flops(config: PretrainedConfig, seq_len: int, document: int | None = None) -> float:
    """Operations per token of forward and backward; times the tokens of a batch, those of a step.

    Args:
        config: of a causal language model.
        seq_len: tokens a row.
        document: tokens of each document, where rows are packed with several.
    """
    return 3 * forward_flops(config, seq_len, document).total


def forward_flops(config: PretrainedConfig, seq_len: int, document: int | None = None) -> ForwardFlops:
    """Operations per token of one forward pass; see `training_flops`."""
    model = meta_model(config)
    head = model.get_output_embeddings()
    experts = {module for _, module in hf.experts_modules(model)}
    share = _active_share(config) if experts else 0.0
    dense = routed = 0.0
    for module in model.modules():
        if module is head or isinstance(module, nn.Embedding):
            continue
        # Weights of 3 dims are experts, or a depthwise convolution's; vectors (norms, biases) are not products.
        weights = [parameter.numel() for parameter in module._parameters.values() if parameter is not None
                   and parameter.ndim == (3 if module in experts or isinstance(module, nn.Conv1d) else 2)]  # fmt: skip
        if module in experts:
            routed += 2 * share * sum(weights)
        else:
            dense += 2 * sum(weights)
    return ForwardFlops(
        dense=dense,
        experts=routed,
        attention=_attention(config.get_text_config(), document or seq_len),
        scan=_scan(config.get_text_config()),
        head=0.0 if head is None else 2.0 * head.weight.numel(),
    )


def count_parameters(config: PretrainedConfig) -> Parameters:
    """The parameters of the model that `config` describes."""
    model = meta_model(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(p.numel() for _, module in hf.experts_modules(model) for p in module.parameters())
    idle = routed * (1 - _active_share(config)) if routed else 0.0
    return Parameters(total, round(total - idle), routed)


def meta_model(config: PretrainedConfig) -> Any:
    """The model of `config` on the meta device: shapes without memory. `config` stays as it is."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16)


def top_k(config: PretrainedConfig) -> int:
    """How many routed experts a token goes to.

    Raises:
        ValueError: the config names none.
    """
    text = config.get_text_config()
    for place in (text, getattr(text, "ffn_config", None)):  # DBRX has a section of its own
        for name in _TOP_K:
            if (value := getattr(place, name, None)) is not None:
                return int(value)
    raise ValueError(f"{type(config).__name__} has no field for the experts per token; known are {', '.join(_TOP_K)}")


def _active_share(config: PretrainedConfig) -> float:
    experts = hf.num_routed_experts(config)
    assert experts is not None
    return top_k(config) / experts


def _attention(config: Any, length: int) -> float:
    """Per token of a document of `length`: causal, so that a token sees half of it on average."""
    if getattr(config, "kv_lora_rank", None):  # multi-head latent attention, as DeepSeek has it
        width = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = 2 * config.num_attention_heads * head_dim
    seen = 0.0
    for kind in _layer_types(config):
        window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
        if window is None or window >= length:
            seen += length / 2 if kind in ("full_attention", "sliding_attention") else 0.0
        else:
            seen += (window * window / 2 + (length - window) * window) / length
    return 2 * width * seen


def _layer_types(config: Any) -> list[str]:
    """What mixes tokens in each layer, by Transformers' names."""
    if kinds := getattr(config, "layer_types", None):
        return list(kinds)
    # Without a list, a window holds for every layer (Mixtral).
    kind = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return [kind] * config.num_hidden_layers


def _scan(config: Any) -> float:
    """Mamba2's state-space duality (Dao and Gu 2024, arXiv 2405.21060) in chunks: scores within a chunk, causal, and
    the state in and out of it."""
    if not hasattr(config, "mamba_num_heads"):
        return 0.0
    inner, state = config.mamba_num_heads * config.mamba_head_dim, config.ssm_state_size
    layer = config.chunk_size * (config.n_groups * state + inner) + 4 * inner * state
    return float(layer * sum(kind == "linear_attention" for kind in _layer_types(config)))
