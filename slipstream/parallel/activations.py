"""Activation checkpointing: what is computed again in backward instead of being kept.

Chen et al. 2016, arXiv 1604.06174. Transformers has the whole-layer form. The selective one here keeps what GEMMs and
attention gave and computes the cheap rest again; it leaves out the experts, whose own backward keeps little, and whose
exchange between ranks would otherwise run twice.
"""

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from slipstream import hf

# Operators whose outputs are kept: what they cost is not worth their memory.
_KEPT = {
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm", "aten::_flash_attention_forward"),
    *("aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_flash_attention"),
    *("aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_flash_attention_for_cpu"),
    *("slipstream::causal_attention", "slipstream::mm_fp8"),
}


def checkpoint_activations(model: Any, mode: str) -> None:
    """Turn `mode` on for `model`, in place.

    Args:
        mode: "none", "full" (every decoder layer runs again in backward) or "selective" (each module of a layer does,
            but for its GEMMs and attention, the experts and what holds them).

    Raises:
        ValueError: the architecture has no layers that can be checkpointed.
    """
    if mode == "none":
        return
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"activation_checkpointing={mode!r}: {type(model).__name__} does not support it; use 'none'")
    if mode == "full":
        hf.checkpoint_layers(model)
        return
    experts = {module for _, module in hf.experts_modules(model)}
    for layer in layers:
        _checkpoint_below(layer, experts)


def _checkpoint_below(parent: nn.Module, experts: set[nn.Module]) -> None:
    for child in parent.children():
        if child in experts or isinstance(child, nn.ModuleList):
            continue
        if any(module in experts for module in child.modules()):
            _checkpoint_below(child, experts)
        else:
            # Bound to a module-level function named forward, as in loss.py: survives deepcopy and pickle.
            child.forward = MethodType(forward, child)


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward, run again in backward while it trains; a cache must not be filled twice."""
    own = type(self).forward
    if not (self.training and torch.is_grad_enabled()) or kwargs.get("past_key_values") is not None:
        return own(self, *args, **kwargs)
    return checkpoint(own, self, *args, use_reentrant=False, context_fn=_contexts, **kwargs)


def _keep(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name() in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_contexts = partial(create_selective_checkpoint_contexts, _keep)
