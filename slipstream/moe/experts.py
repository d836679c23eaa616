"""The expert path: one forward for every experts module that follows Transformers' experts interface.

Registered there as "slipstream", "slipstream_fp8" (its GEMMs in FP8), and each with "_balanced" behind it for
benchmarks, so a model takes it by name.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from slipstream import hf
from slipstream.kernels.expert_activation import Activation
from slipstream.moe import foreign
from slipstream.moe.activation import activation_name, function_named, own_function
from slipstream.moe.grouped_mlp import grouped_mlp, grouped_mlp_autograd
from slipstream.moe.grouped_mlp_4bit import Packed, grouped_mlp_4bit
from slipstream.moe.lora import LowRank
from slipstream.moe.packed import is_packed, packed
from slipstream.moe.routing import balanced_index
from slipstream.numerics import compute_dtype
from slipstream.parallel.units import class_of

# On an experts module with adapters: what gives those of projections (by name, in a dtype), None for one without.
ADAPTERS = "_slipstream_adapters"
Adapters = Callable[[Sequence[str], torch.dtype], Sequence[LowRank | None]]


def implementation(fp8: bool = False, balanced: bool = False) -> str:
    """The name that an implementation of ours has in Transformers' registry."""
    return "slipstream" + "_fp8" * fp8 + "_balanced" * balanced


def is_balanced(name: str) -> bool:
    """Whether an `implementation` takes a uniform choice of experts instead of the router's."""
    return name in (implementation(fp8, balanced=True) for fp8 in (False, True))


def is_fp8(name: str) -> bool:
    """Whether an `implementation` has its GEMMs in FP8."""
    return name in (implementation(fp8=True, balanced=balanced) for balanced in (False, True))


def flavour(experts: Any) -> str:
    """How `experts` lays out and combines its weights, in words for a report, and whether its activation is fused."""
    name = activation_name(experts)
    words = [
        ("[gate; up]" if experts.is_concatenated else "interleaved gate and up") if experts.has_gate else "no gate",
        "transposed" if experts.is_transposed else "",
        "biases" if experts.has_bias else "",
        "post-expert norm" if experts.has_post_expert_norm else "",
        "trainable activation" if name is None else _in_words(function_named(name)),
    ]
    return ", ".join(word for word in words if word)


def _in_words(activation: Any) -> str:
    if not isinstance(activation, Activation):
        return "an activation of its own (not fused)"
    limits = f" clamped at {activation.limit:g}" if activation.limit != math.inf else ""
    return f"{activation.function}{limits}"


def experts_forward(
    experts: Any,
    x_TH: torch.Tensor,
    idx_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    num_rows: int | None = None,
    fp8: bool = False,
) -> torch.Tensor:
    """The experts interface: `x_TH [T, H]`, ids `idx_TK [T, K]` int64, `weights_TK [T, K]` -> `[T, H]`.

    Under expert parallelism an id may say 'not on this rank'; `num_rows` is how many don't, where the host knows it.

    Raises:
        ValueError: `fp8` for experts that don't run as one operator on 16-bit weights, or where no GPU can.
    """
    activation: Any = activation_name(experts)
    mlp: Any = grouped_mlp
    if not is_fused(experts):
        # Backward has to reach parameters that lie between or behind the two projections.
        post_norm = experts.post_expert_norm if experts.has_post_expert_norm else None
        mlp, activation = partial(grouped_mlp_autograd, post_norm=post_norm), own_function(experts)
    tokens = (x_TH, weights_TK, idx_TK)
    return run_mlp(experts, mlp, grouped_mlp_4bit, tokens, activation, fp8, num_rows=num_rows)


def run_mlp(
    experts: Any,
    mlp: Any,
    mlp_4bit: Any,
    tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    activation: Any,
    fp8: bool,
    **settings: Any,
) -> torch.Tensor:
    """`mlp` of `tokens` (states, weights, ids) with the weights, biases and adapters of `experts`.

    Args:
        mlp, mlp_4bit: `grouped_mlp` or alike, and `grouped_mlp_4bit` or alike, for weights that are stored so.
        settings: passed on.

    Raises:
        ValueError: as `experts_forward`.
    """
    if fp8 and (problem := fp8_obstacle(experts)) is not None:
        raise ValueError(f"BackendConfig(experts='fp8'): {problem}; use experts='auto'")
    up: Any
    down: Any
    if is_packed(experts):
        up, down, up_bias, down_bias, dtype = packed_projections(experts)
        mlp = partial(mlp_4bit, transposed=experts.is_transposed, dtype=dtype)
    else:
        up, down, up_bias, down_bias = projections(experts)
        mlp, dtype = partial(mlp, fp8=True) if fp8 else mlp, up.dtype
    lora: Adapters | None = getattr(experts, ADAPTERS, None)
    up_lora, down_lora = (None, None) if lora is None else lora(projection_names(experts), dtype)
    return mlp(*tokens, up, down, activation, up_bias, down_bias, up_lora=up_lora, down_lora=down_lora, **settings)


def fp8_obstacle(experts: Any) -> str | None:
    """Why `experts` cannot run in FP8, whatever their widths and device, or None."""
    kind = class_of(experts).__name__
    if not is_fused(experts):
        return f"{kind} has parameters between or behind its projections, which run outside the experts' operator"
    return f"the weights of {kind} are stored in 4 bits" if is_packed(experts) else None


def is_fused(experts: Any) -> bool:
    """Whether the experts run as one operator: there is nothing to train but the two projections."""
    return activation_name(experts) is not None and not experts.has_post_expert_norm


def projection_names(experts: Any) -> tuple[str, str]:
    """What `experts` calls the weights of its up and down projection."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def projections(experts: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Up and down as `[E, in, out]` views in the dtype to compute in, and their biases."""
    own = foreign.own_projections(experts)
    if own is not None:
        up, down = (_in_out(weight.to(compute_dtype(weight)), experts) for weight in own)
        return up, down, None, None
    up = getattr(experts, projection_names(experts)[0])
    dtype = compute_dtype(up)
    return _in_out(up.to(dtype), experts), _in_out(experts.down_proj.to(dtype), experts), *_biases(experts, dtype)


def packed_projections(
    experts: Any,
) -> tuple[Packed, Packed, torch.Tensor | None, torch.Tensor | None, torch.dtype]:
    """Up and down as they are stored in 4 bits, their biases, and the dtype to compute in."""
    (up, stored), (down, _) = (packed(experts, name) for name in projection_names(experts))
    dtype = compute_dtype(up.bytes_EP, stored)
    return up, down, *_biases(experts, dtype), dtype


def _biases(experts: Any, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if not experts.has_bias:
        return None, None
    up_bias: torch.Tensor = getattr(experts, f"{projection_names(experts)[0]}_bias")
    return up_bias.to(dtype), experts.down_proj_bias.to(dtype)


def fp8_experts_forward(
    experts: Any, x_TH: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """`experts_forward` in FP8."""
    return experts_forward(experts, x_TH, idx_TK, weights_TK, fp8=True)


def balanced_experts_forward(
    experts: Any, x_TH: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """`experts_forward` on a uniform choice of experts instead of the router's. The model's output is meaningless."""
    return experts_forward(experts, x_TH, balanced_index(idx_TK, experts.num_experts), weights_TK)


def fp8_balanced_experts_forward(
    experts: Any, x_TH: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """`balanced_experts_forward` in FP8."""
    return experts_forward(experts, x_TH, balanced_index(idx_TK, experts.num_experts), weights_TK, fp8=True)


def _in_out(weight: torch.Tensor, experts: Any) -> torch.Tensor:
    """`weight` as an `[E, in, out]` view."""
    return weight if experts.is_transposed else weight.transpose(1, 2)


hf.register_experts(implementation(), experts_forward)
hf.register_experts(implementation(fp8=True), fp8_experts_forward)
hf.register_experts(implementation(balanced=True), balanced_experts_forward)
hf.register_experts(implementation(fp8=True, balanced=True), fp8_balanced_experts_forward)
