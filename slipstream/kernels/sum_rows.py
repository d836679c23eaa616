"""Each token's K rows, gathered, weighted and summed: the end of the experts' MLP, and of its input gradient.

Reads each row once and writes each token once; fp32 inside, a fixed order, no atomics.

Dims: T tokens, K rows per token, R rows, H hidden, E experts.
"""

import torch

from slipstream.kernels import HAS_TRITON, runs_on


def sum_rows(
    rows_RH: torch.Tensor,
    row_TK: torch.Tensor,
    weights_TK: torch.Tensor | None,
    dtype: torch.dtype,
    bias_EH: torch.Tensor | None = None,
    idx_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    """`out[t] = sum over k of weights[t, k] * (rows[row[t, k]] + bias[idx[t, k]])`, `[T, H]` in `dtype`.

    Weights of 1 and biases of 0 for None. A row >= R adds nothing: the token's expert is on another rank.

    Example: rows [[1], [2], [4]], row [[0, 2]], weights [[0.5, 0.25]] -> [[1.5]].
    """
    if not runs_on(rows_RH):
        return sum_rows_reference(rows_RH, row_TK, weights_TK, dtype, bias_EH, idx_TK)
    tokens, slots = row_TK.shape
    hidden = rows_RH.shape[1]
    out_TH = torch.empty(tokens, hidden, dtype=dtype, device=rows_RH.device)
    block = min(1024, 1 << (hidden - 1).bit_length())
    if tokens:
        _sum_rows_kernel[(tokens, -(-hidden // block))](
            rows_RH.contiguous(),
            row_TK.contiguous(),
            rows_RH if weights_TK is None else weights_TK.contiguous(),
            rows_RH if bias_EH is None else bias_EH.contiguous(),
            rows_RH if idx_TK is None else idx_TK.contiguous(),
            out_TH,
            rows_RH.shape[0],
            hidden,
            K=slots,
            WEIGHTED=weights_TK is not None,
            BIASED=bias_EH is not None,
            BLOCK=block,
        )
    return out_TH


def sum_rows_reference(
    rows_RH: torch.Tensor,
    row_TK: torch.Tensor,
    weights_TK: torch.Tensor | None,
    dtype: torch.dtype,
    bias_EH: torch.Tensor | None = None,
    idx_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `sum_rows` computes, a slot at a time."""
    wide = torch.promote_types(rows_RH.dtype, torch.float32)
    out_TH = torch.zeros(row_TK.shape[0], rows_RH.shape[1], dtype=wide, device=rows_RH.device)
    last = rows_RH.shape[0] - 1
    if not len(rows_RH):
        rows_RH = torch.nn.functional.pad(rows_RH, (0, 0, 0, 1))  # for tokens without any row to point at
    for slot in range(row_TK.shape[1]):
        row_T = row_TK[:, slot]
        part_TH = rows_RH[row_T.clamp(max=max(last, 0))]
        if bias_EH is not None and idx_TK is not None:
            part_TH = part_TH.to(wide) + bias_EH[idx_TK[:, slot].clamp(max=bias_EH.shape[0] - 1)]
        part_TH = part_TH.masked_fill((row_T > last)[:, None], 0)
        out_TH = out_TH + (part_TH if weights_TK is None else part_TH * weights_TK[:, slot, None].to(wide))
    return out_TH.to(dtype)


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _sum_rows_kernel(
        rows,
        row,
        weights,
        bias,
        idx,
        out,
        num_rows,
        hidden,
        K: tl.constexpr,
        WEIGHTED: tl.constexpr,
        BIASED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < hidden
        total = tl.zeros((BLOCK,), tl.float32)
        for slot in tl.static_range(K):
            source = tl.load(row + token * K + slot).to(tl.int64)
            there = inside & (source < num_rows)
            values = tl.load(rows + source * hidden + column, mask=there, other=0.0).to(tl.float32)
            if BIASED:
                expert = tl.load(idx + token * K + slot).to(tl.int64)
                values += tl.load(bias + expert * hidden + column, mask=there, other=0.0).to(tl.float32)
            if WEIGHTED:
                values *= tl.load(weights + token * K + slot).to(tl.float32)
            total += values
        tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=inside)
