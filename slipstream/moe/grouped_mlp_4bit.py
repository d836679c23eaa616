"""`grouped_mlp` on frozen weights that are stored in NF4 (`kernels/nf4.py`), for QLoRA (Dettmers et al. 2023, arXiv
2305.14314).

An operator of its own around the same steps: both weights of a layer are dequantised before its GEMMs, in forward and
again in backward, and freed behind them. Backward keeps the 4 bits.

Dims: those of `grouped_mlp`; P bytes of an expert's packed weight.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slipstream.kernels.nf4 import dequantize_nf4
from slipstream.moe.grouped_mlp import (
    empty_gradients,
    empty_outputs,
    register_autograd,
    run_experts,
    run_experts_backward,
)
from slipstream.moe.lora import LowRank


class Packed(NamedTuple):
    """An experts' weight in 4 bits: its bytes `[E, P]`, and the two inner dims of the weight in its own layout."""

    bytes_EP: Tensor
    inner: tuple[int, int]


INPUTS = (
    "(Tensor x_TH, Tensor weights_TK, Tensor idx_TK, Tensor up_EP, Tensor down_EP, "
    "Tensor? up_bias_EN, Tensor? down_bias_EH, "
    "Tensor? up_a_EHr, Tensor? up_b_ErN, Tensor? down_a_EIr, Tensor? down_b_ErH, str activation, "
    "SymInt[] up_inner, SymInt[] down_inner, bool transposed, ScalarType dtype"
)


def grouped_mlp_4bit(
    x_TH: Tensor,
    weights_TK: Tensor,
    idx_TK: Tensor,
    up: Packed,
    down: Packed,
    activation: str,
    up_bias_EN: Tensor | None = None,
    down_bias_EH: Tensor | None = None,
    num_rows: int | None = None,
    up_lora: LowRank | None = None,
    down_lora: LowRank | None = None,
    *,
    transposed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """As `grouped_mlp`, with packed weights, which get no gradient.

    Args:
        transposed: weights are stored `[E, in, out]`, not `[E, out, in]`.
        dtype: what the weights become, and the GEMMs run in; that of the biases and adapters.
    """
    factors = (*(up_lora or (None, None)), *(down_lora or (None, None)))
    return torch.ops.slipstream.experts_4bit(
        x_TH, weights_TK, idx_TK, up.bytes_EP, down.bytes_EP, up_bias_EN, down_bias_EH, *factors, activation,
        up.inner, down.inner, transposed, dtype, num_rows,
    )[0]  # fmt: skip


torch.library.define(
    "slipstream::experts_4bit", f"{INPUTS}, SymInt? num_rows) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
torch.library.define(
    "slipstream::experts_4bit_backward",
    f"(Tensor grad_TH, {INPUTS[1:]}, Tensor hidden_RN, Tensor[] routing, bool[] needs) -> Tensor[]",
)


def dequantized(packed_EP: Tensor, inner: Sequence[int], transposed: bool, dtype: torch.dtype) -> Tensor:
    """The weight as an `[E, in, out]` view."""
    weight = dequantize_nf4(packed_EP, (packed_EP.shape[0], *inner), dtype)
    return weight if transposed else weight.transpose(1, 2)


def _forward(x_TH: Tensor, weights_TK: Tensor, idx_TK: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    up_EP, down_EP, *others, activation, up_inner, down_inner, transposed, dtype, num_rows = rest
    weights = both(up_EP, down_EP, up_inner, down_inner, transposed, dtype)
    arguments = (x_TH, weights_TK, idx_TK, *weights, *others, activation, False, num_rows)
    return run_experts(*arguments)


def _gradients(grad_TH: Tensor, x_TH: Tensor, weights_TK: Tensor, idx_TK: Tensor, *rest: Any) -> list[Tensor]:
    """Those that `needs` asks for, in the order of `run_experts_backward`; never the weights'."""
    up_EP, down_EP, *others, activation, up_inner, down_inner, transposed, dtype, hidden_RN, routing, needs = rest
    weights = both(up_EP, down_EP, up_inner, down_inner, transposed, dtype)
    inputs = (x_TH, weights_TK, idx_TK, *weights, *others)
    arguments = (grad_TH, *inputs, activation, False, hidden_RN, routing, needs)
    return run_experts_backward(*arguments)


def both(
    up_EP: Tensor, down_EP: Tensor, up_inner: Sequence[int], down_inner: Sequence[int], transposed: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Up and down, `dequantized`."""
    return dequantized(up_EP, up_inner, transposed, dtype), dequantized(down_EP, down_inner, transposed, dtype)


@torch.library.register_fake("slipstream::experts_4bit")
def _(x_TH: Tensor, weights_TK: Tensor, idx_TK: Tensor, up_EP: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, up_inner, _, transposed, dtype, num_rows = rest
    width = up_inner[1] if transposed else up_inner[0]
    return empty_outputs(x_TH, idx_TK, up_EP.shape[0], width, dtype, num_rows)


@torch.library.register_fake("slipstream::experts_4bit_backward")
def _(grad_TH: Tensor, x_TH: Tensor, weights_TK: Tensor, idx_TK: Tensor, *rest: Any) -> list[Tensor]:
    return empty_gradients((x_TH, weights_TK, *rest[:8]), rest[-1])


torch.library.impl("slipstream::experts_4bit", "default", _forward)
torch.library.impl("slipstream::experts_4bit_backward", "default", _gradients)
register_autograd("experts_4bit")
