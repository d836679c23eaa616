"""Each token travels once to every rank that owns at least one of its experts, and one row per rank comes back.

The deduplication is DeepEP's (DeepSeek-AI, github.com/deepseek-ai/DeepEP): for top-8 of 128 experts a quarter of the
bytes of one row per (token, expert) at 2 ranks, two thirds at 8.

Dims: see base.py, but P counts peers. D = min(K, P) of them that a token can go to at most, S rows sent (pairs of a
token and a peer).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from slipstream.kernels.sum_rows import sum_rows
from slipstream.moe.dispatch.base import Dispatched, Dispatcher, check_inputs, keep_local, pack_routes, unpack_routes


class AllToAllDispatcher(Dispatcher):
    """All-to-all with as many rows as there are.

    The host waits for the device once per dispatch, for the sizes; never in combine or backward.

    With `peers`, ascending ranks of the group, this rank only exchanges with those, and expert e is on
    `peers[e // L]`; each of them has to name the same peers. An id of L*P belongs to no expert of theirs.
    """

    def __init__(
        self, num_local_experts: int, group: ProcessGroup | None = None, peers: Sequence[int] | None = None
    ) -> None:
        """`peers` are all ranks of the group by default."""
        super().__init__(num_local_experts, group)
        self.peers = range(dist.get_world_size(group)) if peers is None else peers

    def dispatch(self, x_TH: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor) -> Dispatched:
        """See `Dispatcher.dispatch`."""
        check_inputs(x_TH, idx_TK, weights_TK)
        plan = _plan(idx_TK, self.num_local_experts, self.group, self.peers)
        rows_RH, idx_RK, weights_RK = _Dispatch.apply(x_TH, weights_TK, idx_TK, plan)
        return Dispatched(rows_RH, idx_RK, weights_RK, plan.sizes.num_slots, plan)

    def combine(self, rows_RH: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """See `Dispatcher.combine`."""
        return sum_at_origin(rows_RH, dispatched.way_back)


def sum_at_origin(rows_RH: torch.Tensor, way_back: Any) -> torch.Tensor:
    """`AllToAllDispatcher.combine` from the `way_back` of its `Dispatched` alone."""
    return _Combine.apply(rows_RH, way_back)


class _Sizes(NamedTuple):
    """Rows per rank of the group that go out and come in, and expert choices that come in, known to the host."""

    sent: list[int]
    received: list[int]
    num_slots: int
    num_local_experts: int
    group: ProcessGroup | None


class _Plan(NamedTuple):
    """Which rows go where. Example: P = 2 ranks with L = 2 experts each, idx_TK = [[3, 0], [1, 0], [2, 3]] give

    token_S = [0, 1, 0, 2]   rows sent, by rank, then by token; S = 4
    peer_S  = [0, 0, 1, 1]   their ranks
    row_TD  = [[0, 2], [1, 4], [3, 4]]   rows of a token by rank; S means none
    row_TK  = [[2, 0], [1, 1], [3, 3]]   the row in which each expert choice travels; S for an id of no expert
    """

    token_S: torch.Tensor
    peer_S: torch.Tensor
    row_TD: torch.Tensor
    row_TK: torch.Tensor
    sizes: _Sizes


def _plan(idx_TK: torch.Tensor, num_local_experts: int, group: ProcessGroup | None, peers: Sequence[int]) -> _Plan:
    """Ask the peers how many rows they send, and lay out this rank's. The one host synchronisation."""
    ranks, (tokens, top_k) = len(peers), idx_TK.shape
    owner_TK = idx_TK // num_local_experts
    slots_TP = torch.zeros(tokens, ranks + 1, dtype=torch.int64, device=idx_TK.device)
    slots_TP = slots_TP.scatter_add_(1, owner_TK, torch.ones_like(owner_TK))[:, :ranks]
    goes_TP = slots_TP > 0
    sent_P2 = torch.stack([goes_TP.sum(dim=0), slots_TP.sum(dim=0)], dim=1)
    received_P2 = torch.empty_like(sent_P2)
    ones = _by_rank([1] * ranks, peers, group)
    dist.all_to_all_single(received_P2, sent_P2, ones, ones, group=group)
    (sent, _), (received, slots) = torch.stack([sent_P2.t(), received_P2.t()]).tolist()

    # A pair's row is the number of pairs before it; nonzero() would synchronise again.
    total = sum(sent)
    goes_N = goes_TP.t().flatten()
    row_N = (goes_N.cumsum(0) - 1).masked_fill(~goes_N, total)
    pair_S = torch.empty(total + 1, dtype=torch.int64, device=idx_TK.device)
    pair_S = pair_S.scatter_(0, row_N, torch.arange(row_N.numel(), device=idx_TK.device))[:total]
    row_TP = row_N.view(ranks, tokens).t()
    row_TD = row_TP.sort(dim=1).values[:, : min(top_k, ranks)].contiguous()
    peer_S, token_S = pair_S // max(tokens, 1), pair_S % max(tokens, 1)
    row_TK = F.pad(row_TP, (0, 1), value=total).gather(1, owner_TK)
    sent, received = (_by_rank(rows, peers, group) for rows in (sent, received))
    sizes = _Sizes(sent, received, sum(slots), num_local_experts, group)
    return _Plan(token_S, peer_S, row_TD, row_TK, sizes)


def _by_rank(counts: list[int], peers: Sequence[int], group: ProcessGroup | None) -> list[int]:
    """`counts` of the peers for all ranks of the group, 0 for the others."""
    every = [0] * dist.get_world_size(group)
    for peer, count in zip(peers, counts, strict=True):
        every[peer] = count
    return every


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: torch.Tensor, weights_TK: torch.Tensor, idx_TK: torch.Tensor, plan: _Plan
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        token_S, sizes = plan.token_S, plan.sizes
        first_S1 = plan.peer_S[:, None] * sizes.num_local_experts
        routes_S = pack_routes(*keep_local(idx_TK[token_S], weights_TK[token_S], first_S1, sizes.num_local_experts))
        rows_RH = _send(x_TH[token_S], sizes)
        idx_RK, weights_RK = unpack_routes(_send(routes_S, sizes), weights_TK.dtype)
        if not sum(sizes.received):
            idx_RK.fill_(sizes.num_local_experts)
        ctx.save_for_backward(plan.row_TD, plan.row_TK)
        ctx.sizes = sizes
        ctx.mark_non_differentiable(idx_RK)
        return rows_RH, idx_RK, weights_RK

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_RH: torch.Tensor, _: None, grad_weights_RK: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        need_x, need_weights, *_rest = ctx.needs_input_grad
        row_TD, row_TK = ctx.saved_tensors
        grad_x_TH = grad_weights_TK = None
        if need_x:
            grad_x_TH = sum_rows(_return(grad_RH, ctx.sizes), row_TD, None, grad_RH.dtype)
        if need_weights:
            # A slot's gradient is in the row that went to the owner of its expert; the other rows' are of no use.
            # Row S is the zeros of a slot without an expert.
            top_k = row_TK.shape[1]
            slot_K = torch.arange(top_k, device=row_TK.device)
            grad_weights_SK = F.pad(_return(grad_weights_RK, ctx.sizes), (0, 0, 0, 1))
            grad_weights_TK = grad_weights_SK.flatten()[row_TK * top_k + slot_K]
        return grad_x_TH, grad_weights_TK, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RH: torch.Tensor, plan: _Plan) -> torch.Tensor:
        ctx.save_for_backward(plan.token_S)
        ctx.sizes = plan.sizes
        return sum_rows(_return(rows_RH, plan.sizes), plan.row_TD, None, rows_RH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (token_S,) = ctx.saved_tensors
        return _send(grad_TH[token_S], ctx.sizes), None


def _send(rows_S: torch.Tensor, sizes: _Sizes) -> torch.Tensor:
    """To the owners: `[S, …] -> [R, …]`, or one row of zeros where R would be 0: grouped GEMMs need not take that."""
    total = sum(sizes.received)
    out = rows_S.new_empty(total, *rows_S.shape[1:])
    dist.all_to_all_single(out, rows_S.contiguous(), sizes.received, sizes.sent, group=sizes.group)
    return out if total else rows_S.new_zeros(1, *rows_S.shape[1:])


def _return(rows_R: torch.Tensor, sizes: _Sizes) -> torch.Tensor:
    """Back to the tokens: `[R, …] -> [S, …]`."""
    rows_R = rows_R[: sum(sizes.received)].contiguous()
    out = rows_R.new_empty(sum(sizes.sent), *rows_R.shape[1:])
    dist.all_to_all_single(out, rows_R, sizes.sent, sizes.received, group=sizes.group)
    return out
