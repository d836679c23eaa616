"""Every rank of the group receives every token, and partial sums go back: static shapes, little to go wrong.

For top-8 of 128 experts it moves 0.3 % more bytes than the all-to-all at 2 ranks, 10 % more at 4, 50 % more at 8.

Dims: see base.py. M most tokens that a rank of the group has; shorter ranks are padded. R = P * M.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from slipstream.moe.dispatch.base import Dispatched, Dispatcher, check_inputs, keep_local, pack_routes, unpack_routes


class AllGatherDispatcher(Dispatcher):
    """All-gather on the way out, reduce-scatter on the way back.

    The host waits for the device once per dispatch, for the token counts of the ranks; never in combine or backward.
    """

    def dispatch(self, x_TH: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor) -> Dispatched:
        """See `Dispatcher.dispatch`."""
        check_inputs(x_TH, idx_TK, weights_TK)
        count_1 = torch.full((1,), x_TH.shape[0], device=x_TH.device)
        # Never empty, because grouped GEMMs need not take empty input.
        most = max(1, *_all_gather(count_1, self.group).tolist())
        rows_RH, idx_RK, weights_RK = _Dispatch.apply(
            x_TH, weights_TK, idx_TK, most, self.num_local_experts, self.group
        )
        return Dispatched(rows_RH, idx_RK, weights_RK, None, x_TH.shape[0])

    def combine(self, rows_RH: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """See `Dispatcher.combine`."""
        return _Combine.apply(rows_RH, dispatched.way_back, self.group)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        idx_TK: torch.Tensor,
        most: int,
        num_local_experts: int,
        group: ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows_RH = _all_gather(_pad(x_TH, most), group)
        routes_M = _pad(pack_routes(idx_TK, weights_TK), most, value=-1)  # -1 belongs to no rank
        idx_RK, weights_RK = unpack_routes(_all_gather(routes_M, group), weights_TK.dtype)
        first_expert = dist.get_rank(group) * num_local_experts
        idx_RK, weights_RK = keep_local(idx_RK, weights_RK, first_expert, num_local_experts)
        ctx.save_for_backward(idx_RK)
        ctx.group, ctx.tokens, ctx.num_local_experts = group, x_TH.shape[0], num_local_experts
        ctx.mark_non_differentiable(idx_RK)
        return rows_RH, idx_RK, weights_RK

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_RH: torch.Tensor, _: None, grad_weights_RK: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        need_x, need_weights, *_rest = ctx.needs_input_grad
        (idx_RK,) = ctx.saved_tensors
        grad_x_TH = grad_weights_TK = None
        if need_x:
            grad_x_TH = _reduce_scatter(grad_RH, ctx.group)[: ctx.tokens]
        if need_weights:
            # The rank that owns the expert is the only one whose term is not 0.
            grad_weights_RK = grad_weights_RK.masked_fill(idx_RK == ctx.num_local_experts, 0)
            grad_weights_TK = _reduce_scatter(grad_weights_RK, ctx.group)[: ctx.tokens]
        return grad_x_TH, grad_weights_TK, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RH: torch.Tensor, tokens: int, group: ProcessGroup | None) -> torch.Tensor:
        ctx.group, ctx.most = group, rows_RH.shape[0] // dist.get_world_size(group)
        return _reduce_scatter(rows_RH, group)[:tokens]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _all_gather(_pad(grad_TH, ctx.most), ctx.group), None, None


def _pad(rows: torch.Tensor, most: int, value: int = 0) -> torch.Tensor:
    """`rows [T, …]` with rows of `value` behind them up to `most`; as they are where none is missing."""
    missing = most - rows.shape[0]
    return F.pad(rows, (0, 0, 0, missing), value=value) if missing else rows


def _all_gather(rows: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """`rows [M, …]` of every rank in the order of the ranks, `[P*M, …]`."""
    out = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(out, rows.contiguous(), group=group)
    return out


def _reduce_scatter(rows: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """The sum over the ranks of this rank's part of `rows [P*M, …]`, `[M, …]`.

    As an all-to-all with a sum behind it: the bytes of a reduce-scatter, but added in fp32 and in the order of the
    ranks whatever the dtype, which neither NCCL's nor gloo's does.
    """
    parts = torch.empty_like(rows, memory_format=torch.contiguous_format)
    dist.all_to_all_single(parts, rows.contiguous(), group=group)
    by_rank = parts.view(dist.get_world_size(group), -1, *rows.shape[1:])
    return by_rank.sum(dim=0, dtype=torch.float32).to(rows.dtype)
