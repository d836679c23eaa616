"""Every touch of a part of Transformers that is not public API, in one place.

Checked against Transformers 5.23.0. Each name used here has a test in tests/test_hf.py that fails when upstream moves
it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.loss.loss_utils import ForCausalLMLoss

ExpertsForward = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

causal_lm_loss = ForCausalLMLoss

# What architectures call the number of routed experts.
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


def register_experts(name: str, forward: ExpertsForward) -> None:
    """Make `forward(module, x_TH, idx_TK, weights_TK) -> x_TH` selectable as `experts_implementation=name`."""
    ALL_EXPERTS_FUNCTIONS.register(name, forward)


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The (name, module) pairs of `model` whose forward goes through the experts interface.

    `use_experts_implementation` sets these flags on every class that it decorates.
    """
    for name, module in model.named_modules():
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
            yield name, module


def experts_implementation(model: Any) -> str:
    """The name of the experts forward that `model` uses now."""
    return model.config.get_text_config()._experts_implementation


def attention_implementation(model: Any) -> str:
    """The name of the attention forward that `model` uses now."""
    return model.config.get_text_config()._attn_implementation


def has_default_gate(experts: Any) -> bool:
    """Whether the gate of `experts` is `act_fn(gate) * up` on `[gate; up]`, the interface's default."""
    return type(experts)._apply_gate is _default_apply_gate


def is_expert_parallel(experts: Any) -> bool:
    """Whether Transformers' own expert parallelism may hand `experts` the id `num_experts` for 'not on this rank'."""
    return experts._is_expert_parallel


def uses_causal_lm_loss(model: PreTrainedModel) -> bool:
    """Whether `model.loss_function` is the ordinary shifted cross-entropy over the vocabulary."""
    return model.loss_function is causal_lm_loss


def distributed_config(ranks: int, ep_size: int) -> DistributedConfig:
    """Dense weights sharded over all `ranks`, experts exchanged within groups of `ep_size`."""
    return DistributedConfig(fsdp_size=ranks, ep_size=ep_size, ep_implementation="all_to_all")


def is_distributed(model: PreTrainedModel) -> bool:
    """Whether Transformers sharded `model` while loading it."""
    return getattr(model.config, "distributed_config", None) is not None


def num_routed_experts(config: PretrainedConfig) -> int | None:
    """The number of routed experts a layer of this architecture has, or None for a dense one."""
    config = config.get_text_config()
    for place in (config, getattr(config, "ffn_config", None)):  # DBRX has a section of its own
        for name in _NUM_EXPERTS:
            if (value := getattr(place, name, None)) is not None:
                return int(value)
    return None
