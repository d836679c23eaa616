"""The expert path: one forward for every experts module that follows Transformers' experts interface.

Registered there as "slipstream" (and "slipstream_balanced" for benchmarks), so a model takes it by name.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from slipstream import hf
from slipstream.moe.grouped_mlp import grouped_mlp, grouped_mlp_autograd
from slipstream.moe.routing import balanced_index, sort_by_expert
from slipstream.numerics import compute_dtype


@dataclass(frozen=True)
class Flavour:
    """How an experts module lays out and combines its weights, read from the flags Transformers sets on it."""

    gated: bool
    interleaved: bool
    transposed: bool
    biased: bool
    default_gate: bool
    post_norm: bool
    trainable_activation: bool

    @classmethod
    def of(cls, experts: Any) -> "Flavour":
        activation = getattr(experts, "act_fn", None)
        return cls(
            gated=experts.has_gate,
            interleaved=not experts.is_concatenated,
            transposed=experts.is_transposed,
            biased=experts.has_bias,
            default_gate=experts.has_gate and hf.has_default_gate(experts),
            post_norm=experts.has_post_expert_norm,
            trainable_activation=isinstance(activation, nn.Module) and any(True for _ in activation.parameters()),
        )

    @property
    def needs_autograd(self) -> bool:
        """Whether backward must reach parameters that lie between or behind the two projections."""
        return self.post_norm or self.trainable_activation

    def __str__(self) -> str:
        words = [
            ("interleaved gate and up" if self.interleaved else "[gate; up]") if self.gated else "no gate",
            "transposed" if self.transposed else "",
            "biases" if self.biased else "",
            "own gate function" if self.gated and not self.default_gate else "",
            "post-expert norm" if self.post_norm else "",
            "trainable activation" if self.trainable_activation else "",
        ]
        return ", ".join(word for word in words if word)


def experts_forward(
    experts: Any, x_TH: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor, num_rows: int | None = None
) -> torch.Tensor:
    """The experts interface: `x_TH [T, H]`, ids `idx_TK [T, K]` int64, `weights_TK [T, K]` -> `[T, H]`.

    Under expert parallelism an id may say 'not on this rank'; `num_rows` is how many don't, where the host knows it.
    """
    flavour = Flavour.of(experts)
    if flavour.gated:
        up, up_bias, activation = experts.gate_up_proj, "gate_up_proj_bias", experts._apply_gate
    else:
        up, up_bias, activation = experts.up_proj, "up_proj_bias", experts.act_fn
    dtype = compute_dtype(up)
    routing = sort_by_expert(idx_TK, up.shape[0], num_rows)
    mlp = grouped_mlp
    if flavour.needs_autograd:
        mlp = partial(grouped_mlp_autograd, post_norm=experts.post_expert_norm if flavour.post_norm else None)
    return mlp(
        x_TH,
        weights_TK,
        routing,
        _in_out(up.to(dtype), flavour),
        _in_out(experts.down_proj.to(dtype), flavour),
        activation,
        up_bias_EN=getattr(experts, up_bias).to(dtype) if flavour.biased else None,
        down_bias_EH=experts.down_proj_bias.to(dtype) if flavour.biased else None,
        unowned_rows=num_rows is None and hf.is_expert_parallel(experts),
    )


def balanced_experts_forward(
    experts: Any, x_TH: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """`experts_forward` on a uniform choice of experts instead of the router's. The model's output is meaningless."""
    return experts_forward(experts, x_TH, balanced_index(idx_TK, experts.num_experts), weights_TK)


def _in_out(weight: torch.Tensor, flavour: Flavour) -> torch.Tensor:
    """`weight` as an `[E, in, out]` view."""
    return weight if flavour.transposed else weight.transpose(1, 2)


hf.register_experts("slipstream", experts_forward)
hf.register_experts("slipstream_balanced", balanced_experts_forward)
