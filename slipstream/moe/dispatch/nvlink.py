"""Tokens travel by stores into the memory of the GPUs that hold their experts: no collective, nothing waits for sizes.

This is the general form, a dispatch and a combine around any experts. `nvlink_experts` puts both into one operator
with Slipstream's own.

Dims: see base.py; M most tokens of any rank, R = P * M.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from slipstream.kernels.nvlink_combine import combine_rows
from slipstream.kernels.nvlink_dispatch import dispatch_rows
from slipstream.kernels.nvlink_window import Layout
from slipstream.moe.dispatch.base import Dispatched, Dispatcher, check_inputs
from slipstream.moe.dispatch.peers import Peers, peers_of


class NvlinkDispatcher(Dispatcher):
    """Rows at `[source rank][token]`, zero where a token has no expert here.

    The host never waits for the device. It waits for the other hosts once per dispatch, to learn the most tokens that
    any rank has. If a gradient reaches `combine`'s result, it has to go on to what `dispatch` was given, unless that
    requires none.

    Raises (from `dispatch`):
        NoPeerAccessError: the group's ranks can't reach each other's memory.
        RuntimeError: a rank did not answer; or exchanges that are not in turn, see `Peers.enter`.
    """

    def dispatch(self, x_TH: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor) -> Dispatched:
        """See `Dispatcher.dispatch`."""
        check_inputs(x_TH, idx_TK, weights_TK)
        peers = peers_of(self.group, x_TH.device)
        most = max(1, *peers.agree(x_TH.shape[0]))
        idx_TK = idx_TK.contiguous()
        rows_RH, idx_RK, weights_RK = _Dispatch.apply(x_TH, weights_TK, idx_TK, most, self.num_local_experts, peers)
        way_back = (idx_TK, idx_RK, most, self.num_local_experts, peers, rows_RH.requires_grad)
        return Dispatched(rows_RH, idx_RK.to(torch.int64), weights_RK, None, way_back)

    def combine(self, rows_RH: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """See `Dispatcher.combine`."""
        return _Combine.apply(rows_RH, *dispatched.way_back)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        idx_TK: torch.Tensor,
        most: int,
        num_local_experts: int,
        peers: Peers,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = peers.ranks * most
        rows_RH = x_TH.new_zeros(rows, x_TH.shape[1])
        idx_RK = torch.empty(rows, idx_TK.shape[1], dtype=torch.int32, device=x_TH.device)
        weights_RK = torch.empty(idx_RK.shape, dtype=torch.float32, device=x_TH.device)
        at = _layout(peers, most, x_TH, idx_TK)
        peers.enter("dispatch")
        dispatch_rows(
            peers.window, at, x_TH.contiguous(), idx_TK, rows_RH, num_local_experts,
            weights_TK=weights_TK.contiguous(), idx_NK=idx_RK, weights_NK=weights_RK,
        )  # fmt: skip
        ctx.save_for_backward(idx_TK, idx_RK)
        ctx.most, ctx.num_local_experts, ctx.peers, ctx.dtype = most, num_local_experts, peers, weights_TK.dtype
        ctx.mark_non_differentiable(idx_RK)
        return rows_RH, idx_RK, weights_RK.to(weights_TK.dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_RH: torch.Tensor, _: None, grad_weights_RK: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        idx_TK, idx_RK = ctx.saved_tensors
        need_x, need_weights, *_rest = ctx.needs_input_grad
        grad_x_TH = grad_RH.new_empty(idx_TK.shape[0], grad_RH.shape[1])
        grad_weights_TK = torch.empty(idx_TK.shape, dtype=ctx.dtype, device=idx_TK.device)
        at = _layout(ctx.peers, ctx.most, grad_RH, idx_TK)
        row_R1 = _own_row(idx_RK, ctx.num_local_experts)
        ctx.peers.enter("combine")
        combine_rows(
            ctx.peers.window, at, idx_TK, ctx.num_local_experts, rows_RH=grad_RH.contiguous(), row_NS=row_R1,
            out_TH=grad_x_TH, grads_NK=grad_weights_RK.float().contiguous(), grads_TK=grad_weights_TK,
        )  # fmt: skip
        return grad_x_TH if need_x else None, grad_weights_TK if need_weights else None, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RH: torch.Tensor,
        idx_TK: torch.Tensor,
        idx_RK: torch.Tensor,
        most: int,
        num_local_experts: int,
        peers: Peers,
        goes_on: bool,
    ) -> torch.Tensor:
        out_TH = rows_RH.new_empty(idx_TK.shape[0], rows_RH.shape[1])
        at = _layout(peers, most, rows_RH, idx_TK)
        peers.enter("combine")
        combine_rows(
            peers.window, at, idx_TK, num_local_experts, rows_RH=rows_RH.contiguous(),
            row_NS=_own_row(idx_RK, num_local_experts), out_TH=out_TH,
        )  # fmt: skip
        # Saved here too, so that activation checkpointing runs again up to here, not only up to the dispatch.
        ctx.save_for_backward(idx_TK, idx_RK)
        ctx.most, ctx.num_local_experts, ctx.peers, ctx.goes_on = most, num_local_experts, peers, goes_on
        return out_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        idx_TK, idx_RK = ctx.saved_tensors
        grad_RH = grad_TH.new_zeros(idx_RK.shape[0], grad_TH.shape[1])
        at = _layout(ctx.peers, ctx.most, grad_TH, idx_TK)
        ctx.peers.enter("dispatch")
        dispatch_rows(
            ctx.peers.window, at, grad_TH.contiguous(), idx_TK, grad_RH, ctx.num_local_experts, idx_NK=idx_RK
        )  # fmt: skip
        if not ctx.goes_on:
            ctx.peers.enter("combine")
            combine_rows(ctx.peers.window, at, idx_TK, ctx.num_local_experts, rows_RH=None, row_NS=idx_RK, out_TH=None)
        return grad_RH, None, None, None, None, None, None


def _layout(peers: Peers, most: int, rows: torch.Tensor, idx_TK: torch.Tensor) -> Layout:
    return peers.layout(most, rows.shape[1], idx_TK.shape[1], rows.dtype)


def _own_row(idx_RK: torch.Tensor, num_local_experts: int) -> torch.Tensor:
    """`[R, 1]`: a token's own row, where its experts' sum is, or R if it has no expert here."""
    rows = idx_RK.shape[0]
    came_R = (idx_RK < num_local_experts).any(dim=1)
    own_R = torch.arange(rows, dtype=torch.int32, device=idx_RK.device)
    return own_R.masked_fill_(~came_R, rows)[:, None]
