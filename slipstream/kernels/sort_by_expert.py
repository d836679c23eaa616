"""Counting sort of (token, slot) pairs by expert: the row order that a grouped GEMM needs, made on the device.

Two launches for any number of rows: the first counts each expert's pairs in every span of pairs, the second turns the
counts into offsets and places each pair. Stable and without atomics, so the result never varies.

Dims: T tokens, K experts per token, E experts, R rows, P spans.
"""

import torch

from slipstream.kernels import HAS_TRITON, runs_on

# Spans: about as many programs as a large GPU has multiprocessors.
_SPANS = 128
# Elements of the one-hot matrix that a program holds in registers.
_ONE_HOT = 16384


def sort_by_expert(
    idx_TK: torch.Tensor, num_experts: int, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`slot_R`, `row_TK`, `ends_E`, `expert_R`, all int32; ids outside `[0, num_experts)` belong to no expert here.

    slot_R: position in `idx_TK.flatten()` that each row came from; row_TK: where each pair went, or `num_rows` if
    nowhere; ends_E: expert e owns rows `ends_E[e-1]:ends_E[e]`; expert_R: each row's expert. Rows from `ends_E[-1]` on
    hold some valid position and expert. At most `num_rows` pairs may have an expert here.

    Example: idx [[1, 0], [1, 2]], 3 experts -> slot [1, 0, 2, 3], row [[1, 0], [2, 3]], ends [1, 3, 4],
    expert [0, 1, 1, 2].
    """
    if not runs_on(idx_TK):
        return sort_by_expert_reference(idx_TK, num_experts, num_rows)
    idx_TK = idx_TK.contiguous()
    slots, device = idx_TK.numel(), idx_TK.device
    experts = max(16, 1 << (num_experts - 1).bit_length())
    block = max(16, min(128, _ONE_HOT // experts))
    span = block * -(-slots // (_SPANS * block))
    spans = -(-slots // span) if slots else 1
    counts_PE = torch.empty(spans, experts, dtype=torch.int32, device=device)
    slot_R, expert_R = (torch.empty(num_rows, dtype=torch.int32, device=device) for _ in range(2))
    row_TK = torch.empty(idx_TK.shape, dtype=torch.int32, device=device)
    ends_E = torch.empty(num_experts, dtype=torch.int32, device=device)
    sizes = {"EXPERTS": experts, "BLOCK": block}
    _count_kernel[(spans,)](idx_TK, counts_PE, slots, num_experts, span, **sizes)
    _place_kernel[(spans,)](
        idx_TK, counts_PE, slot_R, row_TK, ends_E, expert_R, slots, num_experts, num_rows, span, spans, **sizes, ROWS=16
    )
    return slot_R, row_TK, ends_E, expert_R


def sort_by_expert_reference(
    idx_TK: torch.Tensor, num_experts: int, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `sort_by_expert` computes, by a stable sort."""
    ids = idx_TK.flatten()
    ids = ids.masked_fill((ids < 0) | (ids >= num_experts), num_experts)
    expert_R, slot_R = torch.sort(ids, stable=True)
    experts_E = torch.arange(num_experts, device=ids.device, dtype=ids.dtype)
    ends_E = torch.searchsorted(expert_R, experts_E, right=True)
    row = torch.empty_like(slot_R)
    row[slot_R] = torch.arange(slot_R.numel(), device=ids.device)
    row_TK = row.masked_fill(ids == num_experts, num_rows).view_as(idx_TK)
    slot_R, expert_R = slot_R[:num_rows], expert_R[:num_rows].clamp(max=num_experts - 1)
    return tuple(tensor.to(torch.int32) for tensor in (slot_R, row_TK, ends_E, expert_R))  # type: ignore[return-value]


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _one_hot(idx, start, stop, experts_E, num_experts, BLOCK: tl.constexpr):
        slot = start + tl.arange(0, BLOCK)
        expert = tl.load(idx + slot, mask=slot < stop, other=-1)
        here = (expert >= 0) & (expert < num_experts)
        hot = ((expert[:, None] == experts_E[None, :]) & here[:, None]).to(tl.int32)
        return slot, expert, here, hot

    # Sizes that differ from step to step: a variant for those that 16 divides would be compiled amid the training.
    @triton.jit(do_not_specialize=["slots", "span"])
    def _count_kernel(idx, counts, slots, num_experts, span, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
        program = tl.program_id(0)
        experts_E = tl.arange(0, EXPERTS)
        stop = tl.minimum((program + 1) * span, slots)
        total_E = tl.zeros((EXPERTS,), tl.int32)
        for start in range(program * span, stop, BLOCK):
            _, _, _, hot = _one_hot(idx, start, stop, experts_E, num_experts, BLOCK)
            total_E += tl.sum(hot, 0)
        tl.store(counts + program * EXPERTS + experts_E, total_E)

    @triton.jit(do_not_specialize=["slots", "num_rows", "span", "spans"])
    def _place_kernel(
        idx,
        counts,
        slot_R,
        row_TK,
        ends_E,
        expert_R,
        slots,
        num_experts,
        num_rows,
        span,
        spans,
        EXPERTS: tl.constexpr,
        BLOCK: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        program = tl.program_id(0)
        experts_E = tl.arange(0, EXPERTS)
        total_E = tl.zeros((EXPERTS,), tl.int32)
        next_E = tl.zeros((EXPERTS,), tl.int32)  # where this span's next pair of each expert goes
        for first in range(0, spans, ROWS):
            row = first + tl.arange(0, ROWS)
            tile = tl.load(counts + row[:, None] * EXPERTS + experts_E[None, :], mask=row[:, None] < spans, other=0)
            total_E += tl.sum(tile, 0)
            next_E += tl.sum(tl.where(row[:, None] < program, tile, 0), 0)
        end_E = tl.cumsum(total_E, 0)
        if program == 0:
            tl.store(ends_E + experts_E, end_E, mask=experts_E < num_experts)
        next_E += end_E - total_E
        total = tl.sum(total_E, 0)
        stop = tl.minimum((program + 1) * span, slots)
        for start in range(program * span, stop, BLOCK):
            slot, expert, here, hot = _one_hot(idx, start, stop, experts_E, num_experts, BLOCK)
            place = tl.sum(hot * (next_E[None, :] + tl.cumsum(hot, 0) - 1), 1)
            next_E += tl.sum(hot, 0)
            tl.store(row_TK + slot, tl.where(here, place, num_rows), mask=slot < stop)
            fits = here & (place < num_rows)
            tl.store(slot_R + place, slot, mask=fits)
            tl.store(expert_R + place, expert.to(tl.int32), mask=fits)
            unowned = (slot >= total) & (slot < tl.minimum(num_rows, stop))
            tl.store(slot_R + slot, tl.zeros((BLOCK,), tl.int32), mask=unowned)
            tl.store(expert_R + slot, tl.zeros((BLOCK,), tl.int32), mask=unowned)
