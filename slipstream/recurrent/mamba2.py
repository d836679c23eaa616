"""Mamba2's scan in plain PyTorch, chunk by chunk (Dao and Gu 2024, arXiv 2405.21060), for where mamba_ssm is missing.

Unlike Transformers' it keeps the documents of a packed row apart, shares B and C among the heads of a group instead of
repeating them, and saves only its inputs for backward, which runs it again: a chunk's decays, `[L, L]` for every head,
are what would fill the memory.

Dims: B rows, S tokens of a row, C chunks of L tokens, G groups, K heads of a group, H = G * K, P head width, N state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


# A compiled layer stops here and goes on: traced with a dynamic length, the chunks cost minutes of compiling.
@torch.compiler.disable
def mamba2_scan(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    chunk_size: int,
    D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    document_BS: Tensor | None = None,
) -> Tensor:
    """`y[t] = C[t] h[t] + D x[t]` with `h[t] = exp(A dt[t]) h[t-1] + dt[t] B[t] x[t]`; `[B, S, H, P]` in fp32.

    Args:
        dt_BSH: step sizes, to which `dt_bias_H` is added, then softplus applied, then the limits.
        A_H: negative.
        document_BS: ids that never fall along a row; h starts at zero where the id changes. None: a row is one.

    Oracle: `mamba2_scan_reference`.
    """
    arguments = (x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, chunk_size, D_H, dt_bias_H, dt_softplus, dt_limit, document_BS)
    if torch.is_grad_enabled():
        out: Tensor = checkpoint(_scan, *arguments, use_reentrant=False, preserve_rng_state=False)
        return out
    return _scan(*arguments)


def mamba2_scan_reference(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    chunk_size: int,
    D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    document_BS: Tensor | None = None,
) -> Tensor:
    """What `mamba2_scan` computes, token by token."""
    dt_BSH = _steps(dt_BSH, dt_bias_H, dt_softplus, dt_limit)
    heads = x_BSHP.shape[2] // B_BSGN.shape[2]
    B_BSHN, C_BSHN = (tensor.repeat_interleave(heads, 2) for tensor in (B_BSGN, C_BSGN))
    state_BHPN = x_BSHP.new_zeros(*x_BSHP[:, 0].shape, B_BSGN.shape[3])
    outs = []
    for t in range(x_BSHP.shape[1]):
        decay_BH = torch.exp(A_H * dt_BSH[:, t])
        if document_BS is not None and t > 0:
            decay_BH = decay_BH * (document_BS[:, t] == document_BS[:, t - 1])[:, None]
        new_BHPN = (dt_BSH[:, t, :, None] * x_BSHP[:, t])[..., None] * B_BSHN[:, t, :, None]
        state_BHPN = decay_BH[..., None, None] * state_BHPN + new_BHPN
        out_BHP = (state_BHPN * C_BSHN[:, t, :, None]).sum(-1)
        outs.append(out_BHP if D_H is None else out_BHP + D_H[:, None] * x_BSHP[:, t])
    return torch.stack(outs, 1)


def _steps(dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float]) -> Tensor:
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return (F.softplus(dt) if softplus else dt).clamp(*limit)


def _scan(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    chunk_size: int,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    document_BS: Tensor | None,
) -> Tensor:
    rows, length, heads, width = x_BSHP.shape
    groups, pad = B_BSGN.shape[2], -length % chunk_size
    dt_BSH = _steps(dt_BSH, dt_bias_H, dt_softplus, dt_limit).float()
    x_BSHP = x_BSHP.float()

    def chunks(tensor: Tensor, *heads: int) -> Tensor:
        """`[B, S, …]` as `[B, C, L, …]`, with tokens that do nothing behind the last; heads as groups where given."""
        padded = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, pad))
        return padded.reshape(rows, -1, chunk_size, *(heads or tensor.shape[2:]))

    by_group = groups, heads // groups
    x_BCLGKP = chunks(x_BSHP * dt_BSH[..., None], *by_group, width)
    a_BCLGK = chunks(A_H.float() * dt_BSH, *by_group)
    B_BCLGN, C_BCLGN = (chunks(tensor.float()) for tensor in (B_BSGN, C_BSGN))
    sum_BCLGK = a_BCLGK.cumsum(2)
    document_BCL = None
    if document_BS is not None:
        last = document_BS[:, -1:].expand(-1, pad)
        document_BCL = torch.cat([document_BS, last], 1).reshape(rows, -1, chunk_size)

    # Within a chunk: C[l] . B[s], decayed by what lies between.
    decay_BCLLGK = _between(a_BCLGK, 2, document_BCL, document_BCL)
    score_BCLLG = torch.einsum("bclgn,bcsgn->bclsg", C_BCLGN, B_BCLGN)
    out = torch.einsum("bclsgk,bcsgkp->bclgkp", score_BCLLG[..., None] * decay_BCLLGK, x_BCLGKP)

    # The state that a chunk leaves behind, from its last document alone.
    to_end_BCLGK = torch.exp(sum_BCLGK[:, :, -1:] - sum_BCLGK)
    ends_BC = None
    if document_BCL is not None:
        ends_BC = document_BCL[:, :, -1]
        to_end_BCLGK = to_end_BCLGK * (document_BCL == ends_BC[:, :, None])[..., None, None]
    left_BCGKPN = torch.einsum("bclgn,bclgkp->bcgkpn", B_BCLGN, x_BCLGKP * to_end_BCLGK[..., None])

    # The state that a chunk begins with: what those before it left, where the document has gone on since.
    totals_BCGK = F.pad(sum_BCLGK[:, :, -1], (0, 0, 0, 0, 1, 0))  # one chunk before the first, that leaves nothing
    ends = None if ends_BC is None else torch.cat([ends_BC[:, :1], ends_BC], 1)
    carried_BCCGK = _between(totals_BCGK, 1, ends, ends)
    left = F.pad(left_BCGKPN, (0, 0, 0, 0, 0, 0, 0, 0, 1, 0))
    begins_BCGKPN = torch.einsum("bczgk,bzgkpn->bcgkpn", carried_BCCGK, left)[:, :-1]
    into_BCLGK = torch.exp(sum_BCLGK)
    if document_BCL is not None and ends is not None:
        into_BCLGK = into_BCLGK * (document_BCL == ends[:, :-1, None])[..., None, None]
    out = out + torch.einsum("bclgn,bcgkpn->bclgkp", C_BCLGN, begins_BCGKPN) * into_BCLGK[..., None]

    out_BSHP = out.reshape(rows, -1, heads, width)[:, :length]
    return out_BSHP if D_H is None else out_BSHP + D_H[:, None] * x_BSHP


def _between(a: Tensor, dim: int, document_to: Tensor | None, document_from: Tensor | None) -> Tensor:
    """`exp(a[s + 1] + … + a[l])` for s <= l along `dim`, which becomes two, l before s; 0 for s > l, and where the two
    are of different documents. Sums of their own rather than differences of running sums, which lose digits."""
    size = a.shape[dim]
    below = torch.ones(size, size, dtype=torch.bool, device=a.device).tril()
    shape = (size, size, *[1] * (a.dim() - dim - 1))
    spread = a.unsqueeze(dim + 1).expand(*a.shape[: dim + 1], size, *a.shape[dim + 1 :])
    sums = spread.masked_fill(~below.tril(-1).view(shape), 0).cumsum(dim)
    seen = below.view(shape)
    if document_to is not None and document_from is not None:
        same = document_to.unsqueeze(-1) == document_from.unsqueeze(-2)
        seen = seen & same.view(*same.shape, *[1] * (a.dim() - dim - 1))
    return sums.masked_fill(~seen, float("-inf")).exp()
