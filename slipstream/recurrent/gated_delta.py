"""The gated delta rule (Yang et al. 2024, arXiv 2412.06464), and Kimi's with a decay for each channel (Kimi Team 2025,
arXiv 2510.26692), over packed documents, for where fla is missing.

The chunked form of the papers: what happens inside of chunks is batched GEMMs. A chunk's state is an affine function of
the one before, `S -> M S + N`, so that one GEMM a chunk is all that has to wait for the last. Nothing is kept for
backward but the inputs and a state for each segment of the row.

Dims: B rows, S tokens of a row, C chunks of L tokens, G key heads, H value heads, K key width, V value width, D decays
of a head: 1 or K.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 64
SEGMENT = 4096  # tokens of a row that are in memory at once, some 25 fp32 copies of keys and values


# A compiled layer stops here and goes on.
@torch.compiler.disable
def gated_delta_rule(
    query_BSGK: Tensor,
    key_BSGK: Tensor,
    value_BSHV: Tensor,
    decay: Tensor,
    beta_BSH: Tensor,
    document_BS: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """`o[t] = S[t] q[t] / sqrt(K)`, `S[t] = R + beta[t] (v[t] - R k[t]) k[t]^T` and `R = S[t-1] exp(decay[t])`, as
    `[B, S, H, V]` in the queries' dtype.

    Args:
        decay: `[B, S, H]`, or `[B, S, H, K]` for one of each channel; not above 0.
        document_BS: ids that never fall along a row; S starts at zero where the id changes.
        normalize: divide queries and keys by their lengths first.

    Oracle: `gated_delta_rule_reference`.
    """
    inputs = query_BSGK, key_BSGK, value_BSHV, decay if decay.ndim == 4 else decay[..., None], beta_BSH[..., None]
    state, outs = None, []
    for begin in range(0, value_BSHV.shape[1], SEGMENT):
        part = slice(begin, begin + SEGMENT)
        documents = None
        if document_BS is not None:
            documents = document_BS[:, part], document_BS[:, max(begin - 1, 0)]
        out, state = checkpoint(
            _segment, *(tensor[:, part] for tensor in inputs), documents, state, normalize,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        outs.append(out)
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def _segment(
    query_BSGK: Tensor,
    key_BSGK: Tensor,
    value_BSHV: Tensor,
    decay_BSHD: Tensor,
    beta_BSH1: Tensor,
    documents: tuple[Tensor, Tensor] | None,
    state_BHKV: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """The rule over tokens that follow on others.

    Args:
        documents: ids `[B, S]` of the tokens, and `[B]` of those before them.
        state_BHKV: behind those.

    Returns:
        The outputs, and the state behind the last token.
    """
    rows, length, heads = value_BSHV.shape[:3]
    pad = -length % CHUNK
    query, key = (_prepared(x, heads, normalize) for x in (query_BSGK, key_BSGK))

    def chunks(x: Tensor) -> Tensor:
        """`[B, S, H, …]` as `[C, B, H, L, …]` in fp32, with tokens that do nothing behind the last."""
        padded = F.pad(x.float(), (0, 0, 0, 0, 0, pad))
        return padded.unflatten(1, (-1, CHUNK)).permute(1, 0, 3, 2, 4).contiguous()

    q, k, v, g, beta = map(chunks, (query * query.shape[-1] ** -0.5, key, value_BSHV, decay_BSHD, beta_BSH1))
    total = g.cumsum(-2)
    into, to_end, carried = total.exp(), (total[..., -1:, :] - total).exp(), total[..., -1, :, None].exp()
    pairs, scores = _products(k, k, total), _products(q, k, total)
    if documents is not None:
        ids, before = documents
        ids = torch.cat([ids, ids[:, -1:].expand(-1, pad)], 1).unflatten(1, (-1, CHUNK)).transpose(0, 1)[:, :, None]
        ends = ids[..., -1:]
        before = torch.cat([before[None, :, None, None], ends[:-1]])
        same = ids[..., :, None] == ids[..., None, :]
        pairs, scores = pairs * same, scores * same
        into, to_end = into * (ids == before)[..., None], to_end * (ids == ends)[..., None]
        carried = carried * (ends == before)[..., None]
    inverse = _UnitInverse.apply(pairs * beta)
    ours, theirs = (
        inverse @ (v * beta),
        inverse @ (k * into * beta),
    )  # what a chunk adds of its own, of the state before
    leaving = (k * to_end).mT
    step = torch.eye(k.shape[-1], device=k.device) * carried - leaving @ theirs
    if state_BHKV is None:
        state_BHKV = k.new_zeros(rows, heads, k.shape[-1], v.shape[-1])
    states = _States.apply(step, leaving @ ours, state_BHKV)
    out = (q * into) @ states[:-1] + scores @ (ours - theirs @ states[:-1])
    out = out.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
    return out.to(query_BSGK.dtype), states[-1]


def _products(rows: Tensor, keys: Tensor, total: Tensor) -> Tensor:
    """`rows[i] . (keys[j] exp(total[i] - total[j]))` for j <= i and 0 for others, over the last two dims.

    With a decay for each channel by halves: both factors of `exp(total[i] - total[m]) exp(total[m] - total[j])`, m the
    second half's first token, are at most 1, where `exp(-total[j])` could overflow.
    """
    length = rows.shape[-2]
    if total.shape[-1] == 1:
        above = torch.ones(length, length, dtype=torch.bool, device=rows.device).triu(1)
        return rows @ keys.mT * (total - total.mT).masked_fill(above, float("-inf")).exp()
    if length == 1:
        return (rows * keys).sum(-1, keepdim=True)
    half = length // 2
    rows, keys, total = (x.unflatten(-2, (2, half)) for x in (rows, keys, total))
    middle = total[..., 1, :1, :]
    later = rows[..., 1, :, :] * (total[..., 1, :, :] - middle).exp()
    earlier = keys[..., 0, :, :] * (middle - total[..., 0, :, :]).exp()
    return _below(_products(rows, keys, total), later @ earlier.mT)


def _below(halves: Tensor, corner: Tensor) -> Tensor:
    """`[[halves[0], 0], [corner, halves[1]]]` over the last two dims."""
    upper, lower = halves.unbind(-3)
    return torch.cat([F.pad(upper, (0, corner.shape[-1])), torch.cat([corner, lower], -1)], -2)


def _unit_inverse(strict: Tensor) -> Tensor:
    length = strict.shape[-1]
    if length == 1:
        return torch.ones_like(strict)
    half = length // 2
    corners = torch.stack([strict[..., :half, :half], strict[..., half:, half:]], -3)
    inverses = _unit_inverse(corners)
    return _below(inverses, -inverses[..., 1, :, :] @ strict[..., half:, :half] @ inverses[..., 0, :, :])


class _UnitInverse(torch.autograd.Function):
    """The inverse of a matrix with ones on the diagonal and, below it, what is there in the argument."""

    @staticmethod
    def forward(ctx: Any, strict: Tensor) -> Tensor:
        inverse = _unit_inverse(strict)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grad @ inverse.mT).tril(-1)


class _States(torch.autograd.Function):
    """`[C + 1, B, H, K, V]`: the state before each chunk and behind the last, `S[c + 1] = step[c] S[c] + new[c]`."""

    @staticmethod
    def forward(ctx: Any, step_CBHKK: Tensor, new_CBHKV: Tensor, first_BHKV: Tensor) -> Tensor:
        steps, new = step_CBHKK.flatten(1, 2), new_CBHKV.flatten(1, 2)
        states = new.new_empty(len(new) + 1, *new.shape[1:])
        states[0] = first_BHKV.flatten(0, 1)
        for chunk in range(len(new)):
            torch.baddbmm(new[chunk], steps[chunk], states[chunk], out=states[chunk + 1])
        ctx.save_for_backward(steps, states)
        return states.view(-1, *new_CBHKV.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        steps, states = ctx.saved_tensors
        grads = grad.flatten(1, 2).clone()
        for chunk in reversed(range(len(steps))):
            grads[chunk].baddbmm_(steps[chunk].mT, grads[chunk + 1])
        of_steps = grads[1:] @ states[:-1].mT
        heads = grad.shape[1:3]
        return of_steps.unflatten(1, heads), grads[1:].unflatten(1, heads), grads[0].unflatten(0, heads)


def gated_delta_rule_reference(
    query_BSGK: Tensor,
    key_BSGK: Tensor,
    value_BSHV: Tensor,
    decay: Tensor,
    beta_BSH: Tensor,
    document_BS: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """What `gated_delta_rule` computes, token by token."""
    query, key = (_prepared(x, value_BSHV.shape[2], normalize) for x in (query_BSGK, key_BSGK))
    decay_BSHD = decay if decay.ndim == 4 else decay[..., None]
    state = value_BSHV.new_zeros(*value_BSHV[:, 0].shape[:2], key.shape[-1], value_BSHV.shape[-1])
    outs = []
    for t in range(value_BSHV.shape[1]):
        if t > 0 and document_BS is not None:
            state = state * (document_BS[:, t] == document_BS[:, t - 1])[:, None, None, None]
        state = state * decay_BSHD[:, t].exp()[..., None]
        known = (state * key[:, t, :, :, None]).sum(2)
        delta = (value_BSHV[:, t] - known) * beta_BSH[:, t, :, None]
        state = state + key[:, t, :, :, None] * delta[:, :, None]
        outs.append((state * query[:, t, :, :, None]).sum(2) * query.shape[-1] ** -0.5)
    return torch.stack(outs, 1)


def _prepared(x: Tensor, heads: int, normalize: bool) -> Tensor:
    x = x.repeat_interleave(heads // x.shape[2], 2)
    return x * torch.rsqrt((x.float() ** 2).sum(-1, keepdim=True) + 1e-6) if normalize else x
