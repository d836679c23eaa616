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
from slipstream.moe.grouped_mlp import empty_gradients, needed_gradients, run_experts, run_experts_backward
from slipstream.moe.lora import LowRank
from slipstream.moe.routing import Routing


class Packed(NamedTuple):
    """An experts' weight in 4 bits: its bytes `[E, P]`, and the two inner dims of the weight in its own layout."""

    bytes_EP: Tensor
    inner: tuple[int, int]


_INPUTS = (
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
    transposed: bool,
    dtype: torch.dtype,
    up_bias_EN: Tensor | None = None,
    down_bias_EH: Tensor | None = None,
    num_rows: int | None = None,
    up_lora: LowRank | None = None,
    down_lora: LowRank | None = None,
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
    "slipstream::experts_4bit", f"{_INPUTS}, SymInt? num_rows) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
torch.library.define(
    "slipstream::experts_4bit_backward",
    f"(Tensor grad_TH, {_INPUTS[1:]}, Tensor hidden_RN, Tensor[] routing, bool[] needs) -> Tensor[]",
)


def dequantized(packed_EP: Tensor, inner: Sequence[int], transposed: bool, dtype: torch.dtype) -> Tensor:
    """The weight as an `[E, in, out]` view."""
    weight = dequantize_nf4(packed_EP, (packed_EP.shape[0], *inner), dtype)
    return weight if transposed else weight.transpose(1, 2)


def _forward(
    x_TH: Tensor,
    weights_TK: Tensor,
    idx_TK: Tensor,
    up_EP: Tensor,
    down_EP: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *others, activation, up_inner, down_inner, transposed, dtype, num_rows = rest
    up_EHN = dequantized(up_EP, up_inner, transposed, dtype)
    down_EIH = dequantized(down_EP, down_inner, transposed, dtype)
    arguments = (x_TH, weights_TK, idx_TK, up_EHN, down_EIH, *others, activation, num_rows)
    return run_experts(*arguments)


@torch.library.register_fake("slipstream::experts_4bit")
def _(
    x_TH: Tensor,
    weights_TK: Tensor,
    idx_TK: Tensor,
    up_EP: Tensor,
    down_EP: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *_, up_inner, _, transposed, dtype, num_rows = rest
    rows = idx_TK.numel() if num_rows is None else num_rows
    width = up_inner[1] if transposed else up_inner[0]

    def int32(*size: Any) -> Tensor:
        return idx_TK.new_empty(size, dtype=torch.int32)

    routing = Routing(int32(rows), int32(*idx_TK.shape), int32(up_EP.shape[0]), int32(rows))
    return x_TH.new_empty(x_TH.shape), x_TH.new_empty((rows, width), dtype=dtype), *routing


def _gradients(
    grad_TH: Tensor,
    x_TH: Tensor,
    weights_TK: Tensor,
    idx_TK: Tensor,
    up_EP: Tensor,
    down_EP: Tensor,
    *rest: Any,
) -> list[Tensor]:
    """Those that `needs` asks for, in the order of `run_experts_backward`; never the weights'."""
    *others, activation, up_inner, down_inner, transposed, dtype, hidden_RN, routing, needs = rest
    up_EHN = dequantized(up_EP, up_inner, transposed, dtype)
    down_EIH = dequantized(down_EP, down_inner, transposed, dtype)
    inputs = (x_TH, weights_TK, idx_TK, up_EHN, down_EIH, *others)
    arguments = (grad_TH, *inputs, activation, hidden_RN, routing, needs)
    return run_experts_backward(*arguments)


@torch.library.register_fake("slipstream::experts_4bit_backward")
def _(
    grad_TH: Tensor,
    x_TH: Tensor,
    weights_TK: Tensor,
    idx_TK: Tensor,
    up_EP: Tensor,
    down_EP: Tensor,
    *rest: Any,
) -> list[Tensor]:
    return empty_gradients((x_TH, weights_TK, up_EP, down_EP, *rest[:6]), rest[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.settings = inputs[:11], inputs[11:-1]
    _, hidden_RN, *routing = output
    ctx.mark_non_differentiable(hidden_RN, *routing)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, hidden_RN, *routing)


def _backward(ctx: Any, grad_TH: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, hidden_RN, slot_R, row_TK, ends_E, expert_R = ctx.saved_tensors
    routing = [slot_R, row_TK, ends_E, expert_R]

    def gradients(needs: list[bool]) -> list[Tensor]:
        found: list[Tensor] = torch.ops.slipstream.experts_4bit_backward(
            grad_TH, *tensors, *ctx.settings, hidden_RN, routing, needs
        )
        return found

    positions = [position for position in range(len(tensors)) if position != 2]  # the ids have no gradient
    return needed_gradients(ctx, grad_TH, positions, gradients)


torch.library.impl("slipstream::experts_4bit", "default", _forward)
torch.library.impl("slipstream::experts_4bit_backward", "default", _gradients)
torch.library.register_autograd("slipstream::experts_4bit", _backward, setup_context=_save)
