"""The exchange and the experts' MLP as one operator: what `grouped_mlp` is for one rank, over the ranks of a group.

Forward is a dispatch, the MLP on what came, and a combine, which contains the sum over a token's local experts.
Backward mirrors it with the same layout: gradients are dispatched, and combined while the weights' gradients, which
nobody waits for, are computed. Opaque to torch.compile, so that a decoder layer compiles around it; the number
of rows depends on the other ranks, so it is a size that the compiler does not know.

Kept for backward: the tokens that came, the pre-activation and the routing.

Dims: T tokens of this rank, N = P * M tokens that came (see kernels/nvlink_window.py), H hidden, K experts per token,
E experts of this rank, R rows sorted by expert, I intermediate, W = I, or 2I where gate and up are fused, r rank of an
adapter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slipstream.kernels.gather_rows import gather_rows
from slipstream.kernels.nvlink_combine import combine_rows
from slipstream.kernels.nvlink_dispatch import dispatch_rows
from slipstream.moe.activation import function_named
from slipstream.moe.dispatch.peers import peers_named
from slipstream.moe.grouped_mlp import (
    TENSORS,
    activation_gradients,
    bias_products,
    empty_gradients,
    mlp_of_rows,
    needed_gradients,
    projection_grads,
    transposed,
    weights_by_expert,
)
from slipstream.moe.grouped_mm import bias_grad
from slipstream.moe.lora import LowRank, project
from slipstream.moe.routing import Routing, sort_by_expert

# Whatever the routing, no more than K rows of each token can come. Room for all of them needs no look at the device,
# but is P times what comes on average, kept for backward. Beyond these bytes of pre-activation a layer the host waits
# for the real number instead, 50-100 us in which it does not run ahead.
WORST_CASE_BYTES = 256 * 2**20
_room = 0.0  # what `room_for_worst_cases` allows

_INPUTS = (
    "Tensor weights_TK, Tensor idx_TK, Tensor up_EHW, Tensor down_EIH, Tensor? up_bias_EW, Tensor? down_bias_EH, "
    "Tensor? up_a_EHr, Tensor? up_b_ErW, Tensor? down_a_EIr, Tensor? down_b_ErH, "
    "str activation, bool fp8, str peers, float divisor"
)
torch.library.define(
    "slipstream::experts_nvlink",
    f"(Tensor x_TH, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "slipstream::experts_nvlink_backward",
    f"(Tensor grad_TH, {_INPUTS}, Tensor[] saved, bool[] needs) -> Tensor[]",
)


def nvlink_experts(
    x_TH: Tensor,
    weights_TK: Tensor,
    idx_TK: Tensor,
    up_EHW: Tensor,
    down_EIH: Tensor,
    activation: str,
    up_bias_EW: Tensor | None = None,
    down_bias_EH: Tensor | None = None,
    *,
    up_lora: LowRank | None = None,
    down_lora: LowRank | None = None,
    peers: str,
    divisor: float = 1.0,
    fp8: bool = False,
) -> Tensor:
    """`grouped_mlp` over all experts of a group, of which the weights here are this rank's.

    Args:
        idx_TK: int64 experts of all ranks.
        up_lora, down_lora, fp8: as in `grouped_mlp`; the adapters are of the experts here.
        peers: the name of the group's `Peers`.
        divisor: what the gradients of the weights and adapters here, sums over the tokens of all ranks, are divided by.
    """
    factors = (*(up_lora or (None, None)), *(down_lora or (None, None)))
    return torch.ops.slipstream.experts_nvlink(
        x_TH, weights_TK, idx_TK, up_EHW, down_EIH, up_bias_EW, down_bias_EH, *factors, activation, fp8, peers, divisor
    )[0]


def run_experts(
    x_TH: Tensor,
    weights_TK: Tensor,
    idx_TK: Tensor,
    up_EHW: Tensor,
    down_EIH: Tensor,
    up_bias_EW: Tensor | None,
    down_bias_EH: Tensor | None,
    up_a_EHr: Tensor | None,
    up_b_ErW: Tensor | None,
    down_a_EIr: Tensor | None,
    down_b_ErH: Tensor | None,
    activation: str,
    fp8: bool,
    peers: str,
    divisor: float,
) -> tuple[Tensor, ...]:
    """The output; for backward the tokens, weights and ids that came, the pre-activation and the routing."""
    mine = peers_named(peers)
    (tokens, hidden), top_k, experts = x_TH.shape, idx_TK.shape[1], up_EHW.shape[0]
    counts = mine.agree(tokens)
    at = mine.layout(max(1, *counts), hidden, top_k, x_TH.dtype)
    came, device = at.ranks * at.most, x_TH.device
    x_TH, weights_TK, idx_TK = x_TH.contiguous(), weights_TK.contiguous(), idx_TK.contiguous()
    # Rows of tokens that did not come are never read.
    rows_NH = torch.empty(came, hidden, dtype=x_TH.dtype, device=device)
    idx_NK = torch.empty(came, top_k, dtype=torch.int32, device=device)
    weights_NK = torch.empty(came, top_k, dtype=torch.float32, device=device)
    mine.enter("dispatch")
    dispatch_rows(
        mine.window, at, x_TH, idx_TK, rows_NH, experts, weights_TK=weights_TK, idx_NK=idx_NK, weights_NK=weights_NK
    )

    # The sort is queued before the host may have to wait, as its outputs are small at any size.
    room = sort_by_expert(idx_NK, experts, max(1, sum(counts) * top_k))
    rows = _num_rows(room, up_EHW)
    routing = room._replace(slot_R=room.slot_R[:rows], expert_R=room.expert_R[:rows])
    weights = (up_EHW, down_EIH, up_bias_EW, up_a_EHr, up_b_ErW, down_a_EIr, down_b_ErH)
    y_RH, hidden_RW = mlp_of_rows(rows_NH, routing, *weights, activation, fp8)
    out_TH = torch.empty_like(x_TH)
    mine.enter("combine")
    combine_rows(
        mine.window, at, idx_TK, experts, rows_RH=y_RH, row_NS=routing.row_TK, out_TH=out_TH, weights_NS=weights_NK,
        bias_LH=None if down_bias_EH is None else down_bias_EH.contiguous(), expert_NS=idx_NK,
    )  # fmt: skip
    if rows < room.slot_R.shape[0]:  # keep no more than what is used, copied behind all that the GPU has to do first
        routing = routing._replace(slot_R=routing.slot_R.clone(), expert_R=routing.expert_R.clone())
    return out_TH, rows_NH, weights_NK, idx_NK, hidden_RW, *routing


@contextmanager
def room_for_worst_cases(layer_bytes: float) -> Iterator[None]:
    """Inside, the host waits for no number of rows whose pre-activation takes up to so many bytes."""
    global _room
    before, _room = _room, layer_bytes
    try:
        yield
    finally:
        _room = before


def _num_rows(room: Routing, up_EHW: Tensor) -> int:
    """Of the rows that there is `room` for, those to compute; never 0, which grouped GEMMs need not take."""
    most = room.slot_R.shape[0]
    if most * up_EHW.shape[2] * up_EHW.element_size() > max(WORST_CASE_BYTES, _room):
        most = max(1, int(room.ends_E[-1]))
    return most


@torch.library.register_fake("slipstream::experts_nvlink")
def _(
    x_TH: Tensor,
    weights_TK: Tensor,
    idx_TK: Tensor,
    up_EHW: Tensor,
    down_EIH: Tensor,
    up_bias_EW: Tensor | None,
    down_bias_EH: Tensor | None,
    up_a_EHr: Tensor | None,
    up_b_ErW: Tensor | None,
    down_a_EIr: Tensor | None,
    down_b_ErH: Tensor | None,
    activation: str,
    fp8: bool,
    peers: str,
    divisor: float,
) -> tuple[Tensor, ...]:
    return empty_outputs(x_TH, idx_TK, up_EHW.shape[0], up_EHW.shape[2], up_EHW.dtype)


def empty_outputs(x_TH: Tensor, idx_TK: Tensor, experts: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What a fake `run_experts` returns, where the pre-activation has that `width` and `dtype`."""
    size: Any = torch.library.get_ctx().new_dynamic_size
    came, rows, top_k = size(min=1), size(min=1), idx_TK.shape[1]

    def int32(*shape: Any) -> Tensor:
        return idx_TK.new_empty(shape, dtype=torch.int32)

    return (
        x_TH.new_empty(x_TH.shape),
        x_TH.new_empty(came, x_TH.shape[1]),
        x_TH.new_empty(came, top_k, dtype=torch.float32),
        int32(came, top_k),
        x_TH.new_empty(rows, width, dtype=dtype),
        *Routing(int32(rows), int32(came, top_k), int32(experts), int32(rows)),
    )


def run_experts_backward(
    grad_TH: Tensor,
    weights_TK: Tensor,
    idx_TK: Tensor,
    up_EHW: Tensor,
    down_EIH: Tensor,
    up_bias_EW: Tensor | None,
    down_bias_EH: Tensor | None,
    up_a_EHr: Tensor | None,
    up_b_ErW: Tensor | None,
    down_a_EIr: Tensor | None,
    down_b_ErH: Tensor | None,
    activation: str,
    fp8: bool,
    peers: str,
    divisor: float,
    saved: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, weights, up, down, the biases and the adapters' factors: those that `needs` asks for, in the
    order of the arguments."""
    need_x, need_weights, need_up, need_down, need_up_bias, need_down_bias, *need_factors = needs
    of_up, of_down = (need_up, *need_factors[:2]), (need_down, *need_factors[2:])
    rows_NH, weights_NK, idx_NK, hidden_RW, *routing = saved
    route, top_k, experts, mine = Routing(*routing), idx_TK.shape[1], up_EHW.shape[0], peers_named(peers)
    grad_TH, idx_TK = grad_TH.contiguous(), idx_TK.contiguous()
    at = mine.layout(rows_NH.shape[0] // mine.ranks, grad_TH.shape[1], top_k, grad_TH.dtype)
    grads: dict[int, Any] = {}

    grad_NH = mine.rows(at, grad_TH.dtype)  # read where it arrives, until the combine begins
    mine.enter("dispatch")
    dispatch_rows(mine.window, at, grad_TH, idx_TK, grad_NH, experts, scale=1 / divisor)
    grad_RH = gather_rows(grad_NH, route.slot_R, top_k, route.ends_E, down_EIH.dtype)
    # Unweighted: the weights enter after the product with the activation, so one GEMM serves both gradients.
    grad_act_RI, low_grad_Rr = project(grad_RH, *transposed(down_EIH, down_b_ErH, down_a_EIr), route, fp8)
    through = activation_gradients(function_named(activation), hidden_RW, up_bias_EW, route, grad_act_RI, weights_NK)
    del grad_act_RI
    grads_NK = through.weights_TK
    if down_bias_EH is not None:
        # What lies in rows of tokens that did not come is old, and 0 times old need not be 0.
        grad_NH = grad_NH.masked_fill((idx_NK >= experts).all(dim=1, keepdim=True), 0)
        local_NK = idx_NK.long()
        grads_NK = grads_NK + bias_products(grad_NH, down_bias_EH, local_NK).to(grads_NK.dtype)
        if need_down_bias:
            grads[5] = weights_by_expert(weights_NK, local_NK, down_EIH).t() @ grad_NH.to(down_EIH.dtype)

    grad_x_TH = torch.empty_like(grad_TH) if need_x or need_weights else None
    grad_weights_TK = torch.empty_like(weights_TK, memory_format=torch.contiguous_format) if need_weights else None
    grad_rows_RH, low_hidden_Rr = None, None
    if grad_x_TH is not None:
        grad_rows_RH, low_hidden_Rr = project(through.hidden_RN, *transposed(up_EHW, up_b_ErW, up_a_EHr), route, fp8)

    return_rows = partial(
        combine_rows, mine.window, at, idx_TK, experts, rows_RH=grad_rows_RH, row_NS=route.row_TK, out_TH=grad_x_TH,
        grads_NK=grads_NK if need_weights else None, grads_TK=grad_weights_TK, scale=divisor,
    )  # fmt: skip
    mine.enter("combine")
    return_rows(receive=False)
    # The peers' rows are under way; nothing here waits for them before these GEMMs are queued.
    grads[3], grads[8], grads[9] = projection_grads(
        of_down, through.weighted_RI, grad_RH, low_grad_Rr, down_EIH, down_a_EIr, down_b_ErH, route.ends_E
    )
    del grad_RH
    if any(of_up):
        rows_RH = gather_rows(rows_NH, route.slot_R, top_k, route.ends_E, up_EHW.dtype)
        grads[2], grads[6], grads[7] = projection_grads(
            of_up, rows_RH, through.hidden_RN, low_hidden_Rr, up_EHW, up_a_EHr, up_b_ErW, route.ends_E
        )
    if need_up_bias:
        grads[4] = bias_grad(through.hidden_RN, route.ends_E)
    return_rows(send=False)
    grads[0], grads[1] = grad_x_TH, grad_weights_TK
    return [grads[position] for position, need in enumerate(needs) if need]


@torch.library.register_fake("slipstream::experts_nvlink_backward")
def _(
    grad_TH: Tensor,
    weights_TK: Tensor,
    idx_TK: Tensor,
    up_EHW: Tensor,
    down_EIH: Tensor,
    up_bias_EW: Tensor | None,
    down_bias_EH: Tensor | None,
    up_a_EHr: Tensor | None,
    up_b_ErW: Tensor | None,
    down_a_EIr: Tensor | None,
    down_b_ErH: Tensor | None,
    activation: str,
    fp8: bool,
    peers: str,
    divisor: float,
    saved: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    inputs = (grad_TH, weights_TK, up_EHW, down_EIH, up_bias_EW, down_bias_EH,
              up_a_EHr, up_b_ErW, down_a_EIr, down_b_ErH)  # fmt: skip
    return empty_gradients(inputs, needs)


def register_autograd(name: str) -> None:
    """Let autograd follow the operator `slipstream::NAME` by `NAME_backward`: inputs and outputs as `run_experts` has
    them, what is no tensor last."""
    operator = getattr(torch.ops.slipstream, f"{name}_backward")

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        (_, *tensors), ctx.settings = inputs[:TENSORS], inputs[TENSORS:]
        _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *saved)

    def backward(ctx: Any, grad_TH: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # read once: a checkpoint unpacks each only once
        tensors, saved = kept[: TENSORS - 1], kept[TENSORS - 1 :]

        def gradients(needs: list[bool]) -> list[Tensor]:
            found: list[Tensor] = operator(grad_TH, *tensors, *ctx.settings, saved, needs)
            return found

        return needed_gradients(ctx, grad_TH, gradients)

    torch.library.register_autograd(f"slipstream::{name}", backward, setup_context=save)


torch.library.impl("slipstream::experts_nvlink", "default", run_experts)
torch.library.impl("slipstream::experts_nvlink_backward", "default", run_experts_backward)
register_autograd("experts_nvlink")
