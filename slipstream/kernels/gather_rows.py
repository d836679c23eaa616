"""Each row's token, copied into the order of the experts.

Dims: T tokens, H hidden, K slots per token, E experts, R rows.
"""

import torch

from slipstream.kernels import HAS_TRITON, runs_on


def gather_rows(
    x_TH: torch.Tensor, slot_R: torch.Tensor, top_k: int, ends_E: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`out[r] = x[slot[r] // top_k]`, `[R, H]` in `dtype`; rows from `ends_E[-1]` on are undefined.

    Example: x [[1], [2]], slot [1, 3, 0], top_k 2, ends [3] -> [[1], [2], [1]].
    """
    if not runs_on(x_TH):
        return gather_rows_reference(x_TH, slot_R, top_k, ends_E, dtype)
    rows, hidden = slot_R.shape[0], x_TH.shape[1]
    out_RH = torch.empty(rows, hidden, dtype=dtype, device=x_TH.device)
    if rows and x_TH.shape[0]:
        block = min(4096, 1 << (hidden - 1).bit_length())
        _gather_rows_kernel[(rows,)](
            x_TH.contiguous(),
            slot_R,
            ends_E,
            ends_E.shape[0],
            out_RH,
            hidden,
            top_k,
            BLOCK=block,
            num_warps=max(1, block // 1024),  # few, so that many rows are under way: a row is three loads in a row
        )
    return out_RH


def gather_rows_reference(
    x_TH: torch.Tensor, slot_R: torch.Tensor, top_k: int, ends_E: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """What `gather_rows` computes."""
    return x_TH.to(dtype)[slot_R.long() // top_k]


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _gather_rows_kernel(x, slot, ends, experts, out, hidden, top_k, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        if row < tl.load(ends + experts - 1):
            token = (tl.load(slot + row) // top_k).to(tl.int64)
            for start in range(0, hidden, BLOCK):
                column = start + tl.arange(0, BLOCK)
                values = tl.load(x + token * hidden + column, mask=column < hidden)
                tl.store(out + row * hidden + column, values.to(out.dtype.element_ty), mask=column < hidden)
