"""`nvlink_experts` on frozen weights that are stored in 4 bits: to it what `grouped_mlp_4bit` is to `grouped_mlp`.

Dims: those of both.
"""

from typing import Any

import torch
from torch import Tensor

from slipstream.moe.dispatch.nvlink_experts import (
    empty_outputs,
    register_autograd,
    run_experts,
    run_experts_backward,
)
from slipstream.moe.grouped_mlp import empty_gradients
from slipstream.moe.grouped_mlp_4bit import INPUTS, Packed, both
from slipstream.moe.lora import LowRank


def nvlink_experts_4bit(
    x_TH: Tensor,
    weights_TK: Tensor,
    idx_TK: Tensor,
    up: Packed,
    down: Packed,
    activation: str,
    up_bias_EW: Tensor | None = None,
    down_bias_EH: Tensor | None = None,
    *,
    up_lora: LowRank | None = None,
    down_lora: LowRank | None = None,
    peers: str,
    divisor: float = 1.0,
    transposed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """As `nvlink_experts`; the rest as in `grouped_mlp_4bit`."""
    factors = (*(up_lora or (None, None)), *(down_lora or (None, None)))
    return torch.ops.slipstream.experts_nvlink_4bit(
        x_TH, weights_TK, idx_TK, up.bytes_EP, down.bytes_EP, up_bias_EW, down_bias_EH, *factors, activation,
        up.inner, down.inner, transposed, dtype, peers, divisor,
    )[0]  # fmt: skip


torch.library.define(
    "slipstream::experts_nvlink_4bit",
    f"{INPUTS}, str peers, float divisor) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "slipstream::experts_nvlink_4bit_backward",
    f"{INPUTS.replace('x_TH', 'grad_TH')}, str peers, float divisor, Tensor[] saved, bool[] needs) -> Tensor[]",
)


def _forward(x_TH: Tensor, weights_TK: Tensor, idx_TK: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    up_EP, down_EP, *others, activation, up_inner, down_inner, transposed, dtype, peers, divisor = rest
    weights = both(up_EP, down_EP, up_inner, down_inner, transposed, dtype)
    arguments = (x_TH, weights_TK, idx_TK, *weights, *others, activation, False, peers, divisor)
    return run_experts(*arguments)


def _gradients(grad_TH: Tensor, weights_TK: Tensor, idx_TK: Tensor, *rest: Any) -> list[Tensor]:
    """Those that `needs` asks for, in the order of `run_experts_backward`; never the weights'."""
    up_EP, down_EP, *others, activation, up_inner, down_inner, transposed, dtype, peers, divisor, saved, needs = rest
    weights = both(up_EP, down_EP, up_inner, down_inner, transposed, dtype)
    arguments = (grad_TH, weights_TK, idx_TK, *weights, *others, activation, False, peers, divisor, saved, needs)
    return run_experts_backward(*arguments)


@torch.library.register_fake("slipstream::experts_nvlink_4bit")
def _(x_TH: Tensor, weights_TK: Tensor, idx_TK: Tensor, up_EP: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, up_inner, _, transposed, dtype, _, _ = rest
    return empty_outputs(x_TH, idx_TK, up_EP.shape[0], up_inner[1] if transposed else up_inner[0], dtype)


@torch.library.register_fake("slipstream::experts_nvlink_4bit_backward")
def _(grad_TH: Tensor, weights_TK: Tensor, idx_TK: Tensor, *rest: Any) -> list[Tensor]:
    return empty_gradients((grad_TH, weights_TK, *rest[:8]), rest[-1])


torch.library.impl("slipstream::experts_nvlink_4bit", "default", _forward)
torch.library.impl("slipstream::experts_nvlink_4bit_backward", "default", _gradients)
register_autograd("experts_nvlink_4bit")
