"""The experts interface for architectures whose modules don't follow it: Llama 4, DBRX and LongCat-Flash.

Parameters stay as they are, names and layout included: only forwards change. What an adapted module computes is chosen
as for any other, by the name of an experts implementation.

Dims: T tokens, H hidden, K experts per token, E experts, I intermediate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from slipstream import hf, hf_models
from slipstream.parallel.units import class_of


@dataclass
class AdaptedConfig:
    """What an adapted experts module has for a config: the implementation that it uses."""

    _experts_implementation: str = "slipstream"

    def get_text_config(self) -> "AdaptedConfig":
        return self


@dataclass(frozen=True)
class _Adapter:
    """What differs from the experts interface's default.

    Attributes:
        num_experts: the attribute with their number.
        is_transposed: the interface's flag.
        act_fn: from an experts module to its activation.
        forward: the module's, as the architecture calls it.
        block: the forward of the module around it, where that has to change too.
    """

    num_experts: str = "num_experts"
    is_transposed: bool = False
    act_fn: Callable[[Any], Any] = lambda experts: experts.act_fn
    forward: Callable[..., torch.Tensor] | None = None
    block: Callable[..., Any] | None = None


def adapt(model: nn.Module) -> bool:
    """Give the experts of `model` the interface, in place, if they lack it and are known here; whether it has such."""
    found = False
    for name, experts in list(model.named_modules()):
        adapter = _ADAPTERS.get(class_of(experts).__name__)
        if adapter is None:
            continue
        found = True
        was_pickled = "forward" not in vars(experts) and isinstance(getattr(experts, "config", None), AdaptedConfig)
        if hasattr(experts, "has_gate") and not was_pickled:
            continue
        block = model.get_submodule(name.rpartition(".")[0])
        experts.config = AdaptedConfig()
        experts.has_gate = experts.is_concatenated = True
        experts.has_bias = experts.has_post_expert_norm = experts._is_expert_parallel = False
        experts.is_transposed = adapter.is_transposed
        experts.num_experts = getattr(experts, adapter.num_experts)
        experts._apply_gate = partial(_apply_gate, experts)
        # Bound functions named forward: they survive deepcopy, and pickle restores the class's own.
        experts.forward = MethodType(adapter.forward or forward, experts)
        if adapter.block is not None:
            block.forward = MethodType(adapter.block, block)
    return found


def set_implementation(model: nn.Module, name: str) -> None:
    """Let all adapted experts of `model` use the experts implementation `name`."""
    for _, experts in hf.experts_modules(model):
        if isinstance(experts.config, AdaptedConfig):
            experts.config._experts_implementation = name


def own_projections(experts: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Up `[E, 2I, H]` and down `[E, H, I]` where a module keeps them in another form, else None."""
    kind = class_of(experts).__name__
    if kind == hf_models.DBRX_EXPERTS:
        mlp = experts.mlp
        w1, v1, w2 = (w.view(experts.num_experts, -1, experts.hidden_size) for w in (mlp.w1, mlp.v1, mlp.w2))
        return torch.cat([w1, v1], 1), w2.transpose(1, 2)
    if kind == hf_models.LONGCAT_EXPERTS:  # its gate_up_proj has rows, never used, for the experts that do nothing
        return experts.gate_up_proj[: experts.num_experts], experts.down_proj
    return None


def _apply_gate(experts: Any, hidden: torch.Tensor) -> torch.Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return _ADAPTERS[class_of(experts).__name__].act_fn(experts)(gate) * up


def forward(self: Any, x_TH: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """The experts interface."""
    return hf.experts_function(self.config._experts_implementation)(self, x_TH, idx_TK, weights_TK)


def _dbrx(self: Any, x: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    return forward(self, x.reshape(-1, self.hidden_size), idx_TK, weights_TK).view(x.shape[0], -1, self.hidden_size)


def _longcat(self: Any, x_TH: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """Ids beyond the experts stand for the identity."""
    identity_TK = idx_TK >= self.num_experts
    out_TH = forward(self, x_TH, idx_TK.clamp(max=self.num_experts), weights_TK.masked_fill(identity_TK, 0))
    return out_TH + (x_TH * (weights_TK * identity_TK).sum(1, keepdim=True)).to(x_TH.dtype)


def _llama4(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights scale what goes into an expert, not what comes out: one row for each choice of a token."""
    x_TH = hidden.reshape(-1, self.hidden_dim)
    scores_TE, logits_TE = self.router(x_TH)
    weights_TK, idx_TK = torch.topk(scores_TE, self.top_k, dim=1)
    rows_RH = (x_TH[:, None] * weights_TK[:, :, None]).flatten(0, 1)
    out_RH = self.experts(rows_RH, idx_TK.reshape(-1, 1), torch.ones_like(weights_TK).reshape(-1, 1))
    return self.shared_expert(x_TH) + out_RH.view(-1, self.top_k, self.hidden_dim).sum(1), logits_TE


for _function in (_dbrx, _longcat, _llama4):
    _function.__name__ = "forward"

_ADAPTERS = {
    hf_models.LLAMA4_EXPERTS: _Adapter(is_transposed=True, block=_llama4),
    hf_models.DBRX_EXPERTS: _Adapter(act_fn=lambda experts: experts.mlp.activation_fn, forward=_dbrx),
    hf_models.LONGCAT_EXPERTS: _Adapter(num_experts="num_routed_experts", forward=_longcat),
}
