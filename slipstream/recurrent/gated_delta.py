"""The gated delta rule (Yang et al. 2024, arXiv 2412.06464) over packed documents, for where fla is missing.

The chunked form of the paper, with a mask for tokens of different documents in each of its products.

Dims: B rows, S tokens of a row, C chunks of L tokens, G key heads, H value heads, K key width, V value width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


# A compiled layer stops here and goes on: traced with a dynamic length, the chunks cost minutes of compiling.
@torch.compiler.disable
def gated_delta_rule(
    query_BSGK: Tensor,
    key_BSGK: Tensor,
    value_BSHV: Tensor,
    decay_BSH: Tensor,
    beta_BSH: Tensor,
    document_BS: Tensor,
    normalize: bool,
) -> Tensor:
    """`o[t] = S[t] q[t] / sqrt(K)`, `S[t] = R + beta[t] (v[t] - R k[t]) k[t]^T` and `R = exp(decay[t]) S[t-1]`, as
    `[B, S, H, V]` in the queries' dtype.

    Args:
        document_BS: ids that never fall along a row; S starts at zero where the id changes.
        normalize: divide queries and keys by their lengths first.

    Oracle: `gated_delta_rule_reference`.
    """
    rows, length = value_BSHV.shape[:2]
    pad = -length % CHUNK
    query, key = (_prepared(x, value_BSHV.shape[2], normalize) for x in (query_BSGK, key_BSGK))

    def chunks(tensor: Tensor) -> Tensor:
        """`[B, S, H, …]` as `[B, H, C, L, …]` in fp32, with tokens that do nothing behind the last."""
        padded = F.pad(tensor.float(), (0, 0) * (tensor.dim() - 2) + (0, pad))
        return padded.reshape(rows, -1, CHUNK, *tensor.shape[2:]).movedim(3, 1)

    q, k, v, g, beta = map(chunks, (query * query.shape[-1] ** -0.5, key, value_BSHV, decay_BSH, beta_BSH))
    document_BCL = torch.cat([document_BS, document_BS[:, -1:].expand(-1, pad)], 1).reshape(rows, 1, -1, CHUNK)
    ends_BC = document_BCL[..., -1]
    same = document_BCL[..., :, None] == document_BCL[..., None, :]
    before = torch.cat([ends_BC[..., :1], ends_BC[..., :-1]], -1)  # the first chunk begins with nothing anyway
    goes_on, stays = document_BCL == before[..., None], document_BCL == ends_BC[..., None]

    total = g.cumsum(-1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(~(same & _lower(q.device)), float("-inf")).exp()
    system = (k * beta[..., None]) @ k.transpose(-1, -2) * between
    into = total.exp() * goes_on  # of a state from before the chunk
    ours = torch.linalg.solve_triangular(system, v * beta[..., None], upper=False, unitriangular=True)
    theirs = torch.linalg.solve_triangular(system, k * (beta * into)[..., None], upper=False, unitriangular=True)
    scores = q @ k.transpose(-1, -2) * between
    out_of = k * ((total[..., -1:] - total).exp() * stays)[..., None]
    carried = total[..., -1].exp() * (ends_BC == before)

    state = value_BSHV.new_zeros(rows, v.shape[1], k.shape[-1], v.shape[-1], dtype=torch.float32)
    outs = []
    for chunk in range(v.shape[2]):
        new = ours[:, :, chunk] - theirs[:, :, chunk] @ state
        outs.append((q[:, :, chunk] * into[:, :, chunk, :, None]) @ state + scores[:, :, chunk] @ new)
        state = state * carried[:, :, chunk, None, None] + out_of[:, :, chunk].transpose(-1, -2) @ new
    return torch.stack(outs, 2).movedim(1, 3).reshape(rows, -1, *value_BSHV.shape[2:])[:, :length].to(query_BSGK.dtype)


def gated_delta_rule_reference(
    query_BSGK: Tensor,
    key_BSGK: Tensor,
    value_BSHV: Tensor,
    decay_BSH: Tensor,
    beta_BSH: Tensor,
    document_BS: Tensor,
    normalize: bool,
) -> Tensor:
    """What `gated_delta_rule` computes, token by token."""
    query, key = (_prepared(x, value_BSHV.shape[2], normalize) for x in (query_BSGK, key_BSGK))
    state = value_BSHV.new_zeros(*value_BSHV[:, 0].shape[:2], key.shape[-1], value_BSHV.shape[-1])
    outs = []
    for t in range(value_BSHV.shape[1]):
        if t > 0:
            state = state * (document_BS[:, t] == document_BS[:, t - 1])[:, None, None, None]
        state = state * decay_BSH[:, t].exp()[..., None, None]
        known = (state * key[:, t, :, :, None]).sum(2)
        delta = (value_BSHV[:, t] - known) * beta_BSH[:, t, :, None]
        state = state + key[:, t, :, :, None] * delta[:, :, None]
        outs.append((state * query[:, t, :, :, None]).sum(2) * query.shape[-1] ** -0.5)
    return torch.stack(outs, 1)


def _prepared(x: Tensor, heads: int, normalize: bool) -> Tensor:
    x = x.repeat_interleave(heads // x.shape[2], 2)
    return x * torch.rsqrt((x.float() ** 2).sum(-1, keepdim=True) + 1e-6) if normalize else x


def _lower(device: torch.device) -> Tensor:
    return torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=device).tril()
