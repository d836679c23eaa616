"""The product with an adapter's second factor, added to what the experts' weights gave, in one pass over it.

A grouped GEMM and an addition would write the product, as wide as the rows, and read it back.

Dims: R rows sorted by expert, E experts, B the width of a projection's output, r rank.
"""

import torch

from slipstream.kernels import HAS_TRITON, runs_on

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def add_low_rank_(
    out_RB: torch.Tensor, low_Rr: torch.Tensor, b_ErB: torch.Tensor, expert_R: torch.Tensor, ends_E: torch.Tensor
) -> torch.Tensor:
    """`out[row] += low[row] @ b[expert[row]]`, in place, summed in fp32 and rounded once; returns `out`.

    All three in one dtype. Rows from `ends_E[-1]` on are left alone, whatever `low` has there. On a GPU without a host
    synchronisation.

    Example: out [[1, 1], [1, 1]], low [[2], [3]], b [[[1, 0]], [[0, 1]]], expert [0, 1], ends [1, 2] ->
    [[3, 1], [1, 4]].
    """
    if not (runs_on(out_RB) and out_RB.dtype in _DTYPES):
        return add_low_rank_reference_(out_RB, low_Rr, b_ErB, expert_R, ends_E)
    (rows, width), rank = out_RB.shape, low_Rr.shape[1]
    assert out_RB.stride(1) == 1
    assert low_Rr.dtype == b_ErB.dtype == out_RB.dtype
    if rows:
        low_Rr = low_Rr.contiguous()
        step = 8 if width % 8 == out_RB.stride(0) % 8 == 0 else 1
        block_r, block_b = 64, 256 // out_RB.element_size()
        _add_low_rank_kernel[(-(-rows // block_r) * -(-width // block_b),)](
            out_RB,
            low_Rr,
            b_ErB.contiguous(),
            expert_R,
            ends_E,
            ends_E.shape[0],
            width // step,
            out_RB.stride(0) // step,
            RANK=rank,
            BLOCK_R=block_r,
            BLOCK_B=block_b,
            BLOCK_K=min(64, max(16, 1 << (rank - 1).bit_length())),  # tensor cores take no fewer than 16
            STEP=step,
            WIDEN=not out_RB.is_cuda,  # the interpreter multiplies no bf16
        )
    return out_RB


def add_low_rank_reference_(
    out_RB: torch.Tensor, low_Rr: torch.Tensor, b_ErB: torch.Tensor, expert_R: torch.Tensor, ends_E: torch.Tensor
) -> torch.Tensor:
    """What `add_low_rank_` computes, an expert at a time."""
    ends, wide = ends_E.tolist(), torch.promote_types(out_RB.dtype, torch.float32)
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        product = low_Rr[start:end].to(wide) @ b_ErB[expert].to(wide)
        out_RB[start:end] = out_RB[start:end] + product
    return out_RB


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _add_low_rank_kernel(
        out,
        low,
        b,
        expert,
        ends,
        experts,
        width,
        out_stride,
        RANK: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_B: tl.constexpr,
        BLOCK_K: tl.constexpr,
        STEP: tl.constexpr,
        WIDEN: tl.constexpr,
    ):
        # Products, so that the compiler sees what divides them and moves 16 bytes at once.
        width, out_stride = width * STEP, out_stride * STEP
        # Programs that run together lie beside each other in memory.
        blocks = tl.cdiv(width, BLOCK_B)
        start = tl.program_id(0) // blocks * BLOCK_R
        column = tl.program_id(0) % blocks * BLOCK_B + tl.arange(0, BLOCK_B)
        stop = tl.minimum(start + BLOCK_R, tl.load(ends + experts - 1))
        if start < stop:
            row = start + tl.arange(0, BLOCK_R)
            offset = row.to(tl.int64)
            place = out + offset[:, None] * out_stride + column[None, :]
            inside = (row < stop)[:, None] & (column < width)[None, :]
            total = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            # From expert to expert that has rows in this block: a jump over those that have none.
            first = start
            while first < stop:
                owner = tl.load(expert + first).to(tl.int64)
                end = tl.load(ends + owner)
                owned = (row >= first) & (row < end)
                for k in tl.static_range(0, RANK, BLOCK_K):
                    inner = k + tl.arange(0, BLOCK_K)
                    left = tl.load(
                        low + offset[:, None] * RANK + inner[None, :],
                        mask=owned[:, None] & (inner < RANK)[None, :],
                        other=0.0,
                    )
                    right = tl.load(
                        b + (owner * RANK + inner)[:, None] * width + column[None, :],
                        mask=(inner < RANK)[:, None] & (column < width)[None, :],
                        other=0.0,
                    )
                    if WIDEN:
                        left, right = left.to(tl.float32), right.to(tl.float32)
                    total = tl.dot(left, right, total, input_precision="ieee")  # fp32 would lose 13 bits as tf32
                first = end
            tl.store(place, total.to(out.dtype.element_ty), mask=inside)
