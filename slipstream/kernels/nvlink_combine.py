"""A token's results on one rank, summed there in fp32, sent to where it came from as one row, and summed over ranks.

It lands at `[owner rank][token]`. Dims, order and reuse: see nvlink_window.py.
"""

import torch

from slipstream.kernels import HAS_TRITON
from slipstream.kernels.nvlink_window import Layout, Window


def combine_rows(
    window: Window,
    at: Layout,
    idx_TK: torch.Tensor,
    num_local_experts: int,
    *,
    rows_RH: torch.Tensor | None,
    row_NS: torch.Tensor,
    out_TH: torch.Tensor | None,
    weights_NS: torch.Tensor | None = None,
    bias_LH: torch.Tensor | None = None,
    expert_NS: torch.Tensor | None = None,
    grads_NK: torch.Tensor | None = None,
    grads_TK: torch.Tensor | None = None,
    scale: float = 1.0,
    send: bool = True,
    receive: bool = True,
) -> None:
    """One row for each token that came, to where it came from, and the sum over the owners of this rank's tokens.

    Sent for token n: `sum over s of weights[n, s] * (rows[row[n, s]] + bias[expert[n, s]])`, if any `row[n, s] < R`.

    Args:
        idx_TK: what `dispatch_rows` was given.
        rows_RH: or None, for nothing but the handshake that has to follow each dispatch (with `out_TH` None).
        out_TH: gets the sums, times `scale`, added in the order of the ranks.
        grads_NK: fp32, a number for each (token, slot) that came; it goes back to the slot's origin, `grads_TK`,
            times `scale`.
        send, receive: only one half of it.
    """
    none = idx_TK
    for halves in window.launches(send, receive):
        _combine_kernel[(window.programs,)](
            none if rows_RH is None else rows_RH,
            row_NS,
            none if weights_NS is None else weights_NS,
            none if bias_LH is None else bias_LH,
            none if expert_NS is None else expert_NS,
            none if grads_NK is None else grads_NK,
            idx_TK,
            none if out_TH is None else out_TH,
            none if grads_TK is None else grads_TK,
            *window.arguments(),
            idx_TK.shape[0],
            at.most,
            at.hidden,
            num_local_experts,
            0 if rows_RH is None else rows_RH.shape[0],
            at.combine_rows,
            at.combine_grads,
            scale,
            S=row_NS.shape[1],
            K=at.top_k,
            ROWS=out_TH is not None,
            GRADS=grads_TK is not None,
            WEIGHTED=weights_NS is not None,
            BIASED=bias_LH is not None,
            SCALED=scale != 1.0,
            **halves,
            **window.constants(at),
        )


def combine_rows_reference(sums_PNH: list[torch.Tensor], counts: list[int], most: int) -> list[torch.Tensor]:
    """For each rank `out_TH` from each rank's sum for every token, zero for those that did not come."""
    total_NH = torch.stack([sums.float() for sums in sums_PNH]).sum(dim=0)
    return [total_NH[rank * most : rank * most + count] for rank, count in enumerate(counts)]


if HAS_TRITON:
    import triton
    import triton.language as tl

    from slipstream.kernels.nvlink_window import VARYING, at_rank, signal, wait_for

    @triton.jit
    def _row_from(rows_in, peer, owner, token, most, hidden, column):
        """What `peer` sent for these tokens, 0 where it has none of their experts."""
        sent = tl.max((owner == peer).to(tl.int32), 1)[:, None] > 0
        place = (tl.cast(peer, tl.int64) * most + token) * hidden + column
        return tl.load(rows_in + place, mask=sent & (column < hidden), other=0.0).to(tl.float32)

    @triton.jit(do_not_specialize=VARYING)
    def _combine_kernel(
        y, row, weights, bias, expert, grads_here, idx, out, grads, peers, turns, clock, failed, report, timeout, rank,
        count, most, hidden, num_local_experts, num_rows, rows_at, grads_at, scale,
        RANKS: tl.constexpr, S: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, GRADS: tl.constexpr,
        WEIGHTED: tl.constexpr, BIASED: tl.constexpr, SCALED: tl.constexpr, SEND: tl.constexpr, RECEIVE: tl.constexpr,
        TIMED: tl.constexpr, POLLS: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, ENTRIES: tl.constexpr,
    ):  # fmt: skip
        program, programs = tl.program_id(0), tl.num_programs(0)
        slots = tl.arange(0, triton.next_power_of_2(K))[None, :]
        fp32_pointer = tl.zeros((), tl.int64).to(tl.pointer_type(tl.float32))
        if SEND:
            if ROWS or GRADS:
                all_rows = tl.arange(0, triton.next_power_of_2(S))[None, :]
                tiles = tl.cdiv(most, TOKENS)
                for job in range(program, RANKS * tiles, programs):
                    # Each program goes round the ranks, itself among them, so that links and memory are busy together.
                    tile = job // RANKS
                    peer = (rank + job + tile * RANKS // programs) % RANKS
                    # One-dimensional where a token has one number: with a second dimension of size 1 each thread would
                    # load it as often as it has columns.
                    token_T = tile * TOKENS + tl.arange(0, TOKENS)
                    valid_T = token_T < most
                    first_T = (peer * most + token_T) * S
                    token = token_T[:, None]
                    valid = token < most
                    came = peer * most + token
                    place = tl.cast(rank, tl.int64) * most + token
                    sources = tl.load(row + came * S + all_rows, mask=valid & (all_rows < S), other=num_rows)
                    here = tl.min(sources, 1)[:, None] < num_rows
                    if GRADS:
                        has_slot = here & (slots < K)
                        grad = tl.load(grads_here + came * K + slots, mask=has_slot)
                        tl.store(at_rank(peers, peer, grads_at, fp32_pointer) + place * K + slots, grad, mask=has_slot)
                    if ROWS:
                        for start in range(0, hidden, BLOCK):
                            column = start + tl.arange(0, BLOCK)[None, :]
                            total = tl.zeros((TOKENS, BLOCK), tl.float32)
                            for slot in tl.static_range(S):
                                source = tl.load(row + first_T + slot, mask=valid_T, other=num_rows)
                                source = source[:, None].to(tl.int64)
                                mask = (source < num_rows) & (column < hidden)
                                values = tl.load(y + source * hidden + column, mask=mask, other=0.0).to(tl.float32)
                                if BIASED:
                                    of = tl.load(expert + first_T + slot, mask=valid_T, other=0)[:, None].to(tl.int64)
                                    values += tl.load(bias + of * hidden + column, mask=mask, other=0.0).to(tl.float32)
                                if WEIGHTED:
                                    weight = tl.load(weights + first_T + slot, mask=valid_T, other=0.0)
                                    values *= weight[:, None].to(tl.float32)
                                total += values
                            target = at_rank(peers, peer, rows_at, out) + place * hidden + column
                            tl.store(target, total.to(out.dtype.element_ty), mask=here & (column < hidden))
            signal(peers, rank, RANKS, 1)
        if RECEIVE:
            turn = tl.load(turns + programs + program) + 1
            for step in range(RANKS):
                source = (rank + step) % RANKS
                wait_for(peers, rank, source, turn * programs, clock, failed, report, timeout, 1, TIMED, POLLS)
            if ROWS:
                rows_in = at_rank(peers, rank, rows_at, out)
                for tile in range(program, tl.cdiv(count, TOKENS), programs):
                    token = (tile * TOKENS + tl.arange(0, TOKENS))[:, None]
                    valid = token < count
                    expert_id = tl.load(idx + token * K + slots, mask=valid & (slots < K), other=-1)
                    owner = tl.where(expert_id < 0, -1, expert_id // num_local_experts).to(tl.int32)
                    for start in range(0, hidden, BLOCK):
                        column = start + tl.arange(0, BLOCK)[None, :]
                        total = tl.zeros((TOKENS, BLOCK), tl.float32)
                        if RANKS <= 8:  # all loads under way at once
                            for peer in tl.static_range(RANKS):
                                total += _row_from(rows_in, peer, owner, token, most, hidden, column)
                        else:
                            for peer in range(RANKS):
                                total += _row_from(rows_in, peer, owner, token, most, hidden, column)
                        if SCALED:
                            total *= scale
                        place = token.to(tl.int64) * hidden + column
                        tl.store(out + place, total.to(out.dtype.element_ty), mask=valid & (column < hidden))
            if GRADS:
                grads_in = at_rank(peers, rank, grads_at, fp32_pointer)
                for job in range(program, tl.cdiv(count * K, ENTRIES), programs):
                    entry = job * ENTRIES + tl.arange(0, ENTRIES)
                    inside = entry < count * K
                    of = tl.load(idx + entry, mask=inside, other=-1)
                    origin = tl.where(of < 0, RANKS, of // num_local_experts)
                    grad = tl.load(grads_in + origin * most * K + entry, mask=inside & (origin < RANKS), other=0.0)
                    if SCALED:
                        grad *= scale
                    tl.store(grads + entry, grad.to(grads.dtype.element_ty), mask=inside)
            tl.store(turns + programs + program, turn)
