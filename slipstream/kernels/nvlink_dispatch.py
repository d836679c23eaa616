"""Each token's row to the ranks that own one of its experts: read once, stored once into the memory of each.

It lands at `[source rank][token]`. Dims, order and reuse: see nvlink_window.py.
"""

import torch

from slipstream.kernels import HAS_TRITON
from slipstream.kernels.nvlink_window import Layout, Window


def dispatch_rows(
    window: Window,
    at: Layout,
    x_TH: torch.Tensor,
    idx_TK: torch.Tensor,
    rows_NH: torch.Tensor,
    num_local_experts: int,
    *,
    weights_TK: torch.Tensor | None = None,
    idx_NK: torch.Tensor | None = None,
    weights_NK: torch.Tensor | None = None,
    scale: float = 1.0,
    send: bool = True,
    receive: bool = True,
) -> None:
    """Every token's row, times `scale`, to the ranks of its experts, and theirs to here.

    Args:
        idx_TK: int64 experts of all ranks; expert e belongs to rank e // num_local_experts.
        rows_NH: gets row `source * M + token` for each token with an expert here; others stay as they are. Without
            `idx_NK` it is this rank's own area, as a tensor, where the rows arrive anyway.
        weights_TK: the ids and these weights travel too, into `weights_NK` (fp32) and `idx_NK`.
        idx_NK: int32 ids of local experts, L for "not on this rank"; without `weights_TK` as an earlier call left them.
        send, receive: only one half of it.
    """
    routes, copies = weights_TK is not None, idx_NK is not None
    for halves in window.launches(send, receive):
        _dispatch_kernel[(window.programs,)](
            x_TH,
            idx_TK,
            weights_TK if routes else x_TH,
            rows_NH,
            idx_NK if copies else idx_TK,
            weights_NK if routes else x_TH,
            *window.arguments(),
            x_TH.shape[0],
            at.most,
            at.hidden,
            num_local_experts,
            at.rows,
            at.ids,
            at.weights,
            scale,
            K=at.top_k,
            ROUTES=routes,
            COPIES=copies,
            SCALED=scale != 1.0,
            **halves,
            **window.constants(at),
        )


def dispatch_rows_reference(
    x_PTH: list[torch.Tensor], idx_PTK: list[torch.Tensor], num_local_experts: int, most: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each rank `rows_NH`, zero where nothing arrives, and `idx_NK`: of all ranks at once."""
    received = []
    for first in range(0, len(x_PTH) * num_local_experts, num_local_experts):
        rows, ids = [], []
        for x_TH, idx_TK in zip(x_PTH, idx_PTK, strict=True):
            here_TK = (idx_TK >= first) & (idx_TK < first + num_local_experts)
            missing = (0, 0, 0, most - len(x_TH))
            rows.append(torch.nn.functional.pad(x_TH * here_TK.any(dim=1, keepdim=True), missing))
            local_TK = (idx_TK - first).where(here_TK, num_local_experts)
            ids.append(torch.nn.functional.pad(local_TK, missing, value=num_local_experts))
        received.append((torch.cat(rows), torch.cat(ids)))
    return received


if HAS_TRITON:
    import triton
    import triton.language as tl

    from slipstream.kernels.nvlink_window import COUNTS_AT, VARYING, at_rank, signal, wait_for

    @triton.jit(do_not_specialize=VARYING)
    def _dispatch_kernel(
        x, idx, weights, rows, idx_here, weights_here, peers, turns, clock, failed, report, timeout, rank,
        count, most, hidden, num_local_experts, rows_at, ids_at, weights_at, scale,
        RANKS: tl.constexpr, K: tl.constexpr, ROUTES: tl.constexpr, COPIES: tl.constexpr, SCALED: tl.constexpr,
        SEND: tl.constexpr, RECEIVE: tl.constexpr, TIMED: tl.constexpr, POLLS: tl.constexpr, BLOCK: tl.constexpr,
        TOKENS: tl.constexpr, ENTRIES: tl.constexpr,
    ):  # fmt: skip
        program, programs = tl.program_id(0), tl.num_programs(0)
        slots = tl.arange(0, triton.next_power_of_2(K))[None, :]
        first_row = tl.cast(rank, tl.int64) * most
        int32_pointer = tl.zeros((), tl.int64).to(tl.pointer_type(tl.int32))
        fp32_pointer = tl.zeros((), tl.int64).to(tl.pointer_type(tl.float32))
        if SEND:
            for tile in range(program, tl.cdiv(count, TOKENS), programs):
                token = (tile * TOKENS + tl.arange(0, TOKENS))[:, None]
                expert = tl.load(idx + token * K + slots, mask=(token < count) & (slots < K), other=-1)
                owner = tl.where(expert < 0, -1, expert // num_local_experts).to(tl.int32)
                for start in range(0, hidden, BLOCK):
                    column = start + tl.arange(0, BLOCK)[None, :]
                    inside = (token < count) & (column < hidden)
                    values = tl.load(x + token.to(tl.int64) * hidden + column, mask=inside)
                    if SCALED:
                        values = values.to(tl.float32) * scale
                    values = values.to(rows.dtype.element_ty)
                    place = (first_row + token) * hidden + column
                    for step in range(RANKS):
                        peer = (rank + 1 + step) % RANKS  # so that the ranks don't all store into the same one
                        goes = tl.max((owner == peer).to(tl.int32), 1)[:, None] > 0
                        if peer == rank:
                            tl.store(rows + place, values, mask=inside & goes)
                        else:
                            tl.store(at_rank(peers, peer, rows_at, rows) + place, values, mask=inside & goes)
            if ROUTES:
                entries = count * K
                for job in range(program, tl.cdiv(entries, ENTRIES) * RANKS, programs):
                    peer = job % RANKS
                    entry = job // RANKS * ENTRIES + tl.arange(0, ENTRIES)
                    inside = entry < entries
                    local = (tl.load(idx + entry, mask=inside, other=0) - peer * num_local_experts).to(tl.int32)
                    local = tl.where((local >= 0) & (local < num_local_experts), local, num_local_experts)
                    place = first_row * K + entry
                    tl.store(at_rank(peers, peer, ids_at, int32_pointer) + place, local, mask=inside)
                    weight = tl.load(weights + entry, mask=inside, other=0.0).to(tl.float32)
                    tl.store(at_rank(peers, peer, weights_at, fp32_pointer) + place, weight, mask=inside)
                for peer in range(program, RANKS, programs):
                    tl.store(at_rank(peers, peer, COUNTS_AT, int32_pointer) + rank, count)
            signal(peers, rank, RANKS, 0)
        if RECEIVE:
            turn = tl.load(turns + program) + 1
            for step in range(RANKS):
                source = (rank + step) % RANKS
                wait_for(peers, rank, source, turn * programs, clock, failed, report, timeout, 0, TIMED, POLLS)
                source_row = tl.cast(source, tl.int64) * most
                tokens = most
                ids = idx_here + source_row * K
                if ROUTES:
                    # Never more than there is room for, whatever a peer that failed has left here.
                    tokens = tl.minimum(tl.load(at_rank(peers, rank, COUNTS_AT, int32_pointer) + source), most)
                    ids_in = at_rank(peers, rank, ids_at, int32_pointer) + source_row * K
                    weights_in = at_rank(peers, rank, weights_at, fp32_pointer) + source_row * K
                    for job in range(program, tl.cdiv(most * K, ENTRIES), programs):
                        entry = job * ENTRIES + tl.arange(0, ENTRIES)
                        inside = entry < most * K
                        came = entry < tokens * K
                        local = tl.load(ids_in + entry, mask=came, other=num_local_experts)
                        tl.store(ids + entry, local, mask=inside)
                        weight = tl.load(weights_in + entry, mask=came, other=0.0)
                        weight = tl.where(local < num_local_experts, weight, 0.0)
                        tl.store(weights_here + source_row * K + entry, weight, mask=inside)
                    ids = ids_in
                if COPIES:
                    tokens = tl.where(source == rank, 0, tokens)  # those are there already
                    rows_in = at_rank(peers, rank, rows_at, rows)
                    for tile in range(program, tl.cdiv(tokens, TOKENS), programs):
                        token = (tile * TOKENS + tl.arange(0, TOKENS))[:, None]
                        mask = (token < tokens) & (slots < K)
                        local = tl.load(ids + token * K + slots, mask=mask, other=num_local_experts)
                        here = tl.min(local, 1)[:, None] < num_local_experts
                        for start in range(0, hidden, BLOCK):
                            column = start + tl.arange(0, BLOCK)[None, :]
                            place = (source_row + token) * hidden + column
                            # Also rows that did not come: the load need not wait for the ids.
                            values = tl.load(rows_in + place, mask=(token < tokens) & (column < hidden))
                            tl.store(rows + place, values, mask=here & (column < hidden))
            tl.store(turns + program, turn)
