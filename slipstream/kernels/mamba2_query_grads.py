"""The gradient of the queries of Mamba2's scan, and in reverse of its keys.

A program computes a block of tokens of a group, all heads one after the other, in registers and in a fixed order.
Dims and names: `mamba2_decay.py`.
"""

import torch
from torch import Tensor

from slipstream.kernels import HAS_TRITON
from slipstream.kernels.mamba2_decay import Decay, chunked, precision_of, rows_of, takes


def query_grads(
    query_BSGN: Tensor, key_BSGN: Tensor, grad_BSHP: Tensor, states_BHCPN: Tensor, pairs_BCGLL: Tensor, decay: Decay
) -> tuple[Tensor, Tensor]:
    """The gradient of `query_BSGN`, in its dtype:
    `sum over j <= i of pairs[i, j] key[j] + sum over the heads of its group of into[i] stateᵀ grad[i]`.

    With it, fp32 `[B, H, C, L]`, the products of each head's part with the query: the gradient of `into[i]`, times it.
    """
    if not takes(grad_BSHP, query_BSGN, key_BSGN):
        return query_grads_reference(query_BSGN, key_BSGN, grad_BSHP, states_BHCPN, pairs_BCGLL, decay)
    return _launch(query_BSGN, key_BSGN, grad_BSHP, states_BHCPN, pairs_BCGLL, decay, reverse=False)


def key_grads(
    query_BSGN: Tensor, key_BSGN: Tensor, value_BSHP: Tensor, grad_states: Tensor, pairs_BCGLL: Tensor, decay: Decay
) -> tuple[Tensor, Tensor]:
    """The same for the keys:
    `sum over i >= j of pairs[i, j] query[i] + sum over the heads of to_end[j] dt[j] grad_stateᵀ value[j]`, and the
    products without `dt[j]`."""
    if not takes(value_BSHP, query_BSGN, key_BSGN):
        return key_grads_reference(query_BSGN, key_BSGN, value_BSHP, grad_states, pairs_BCGLL, decay)
    return _launch(key_BSGN, query_BSGN, value_BSHP, grad_states, pairs_BCGLL, decay, reverse=True)


def query_grads_reference(
    query_BSGN: Tensor, key_BSGN: Tensor, grad_BSHP: Tensor, states_BHCPN: Tensor, pairs_BCGLL: Tensor, decay: Decay
) -> tuple[Tensor, Tensor]:
    """What `query_grads` computes."""
    scale = torch.ones_like(decay.into_BHCL)
    return _project(query_BSGN, key_BSGN, grad_BSHP, states_BHCPN, pairs_BCGLL, decay.into_BHCL, scale)


def key_grads_reference(
    query_BSGN: Tensor, key_BSGN: Tensor, value_BSHP: Tensor, grad_states: Tensor, pairs_BCGLL: Tensor, decay: Decay
) -> tuple[Tensor, Tensor]:
    """What `key_grads` computes."""
    return _project(key_BSGN, query_BSGN, value_BSHP, grad_states, pairs_BCGLL.mT, decay.to_end_BHCL, decay.steps_BHCL)


def _project(
    query: Tensor, key: Tensor, grad: Tensor, states: Tensor, pairs: Tensor, edge: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    groups, chunk = query.shape[2], edge.shape[-1]
    query_BCLGN, key_BCLGN, grad_BCLHP = (chunked(tensor, chunk).float() for tensor in (query, key, grad))
    parts = torch.einsum("bcihp,bhcpn->bhcin", grad_BCLHP, states.float()) * edge[..., None]
    sums = torch.einsum("bgkcin,bcign->bgkci", parts.unflatten(1, (groups, -1)), query_BCLGN).flatten(1, 2)
    out = torch.einsum("bcgij,bcjgn->bcign", pairs.float(), key_BCLGN)
    out = out + (parts * scale[..., None]).unflatten(1, (groups, -1)).sum(2).permute(0, 2, 3, 1, 4)
    return out.flatten(1, 2)[:, : query.shape[1]].to(query.dtype).contiguous(), sums


def _launch(
    query_BSGN: Tensor,
    key_BSGN: Tensor,
    grad_BSHP: Tensor,
    states_BHCPN: Tensor,
    pairs_BCGLL: Tensor,
    decay: Decay,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    rows, length, heads, width = grad_BSHP.shape
    groups, state = key_BSGN.shape[2:]
    chunks, chunk = decay.steps_BHCL.shape[2:]
    query, query_strides = rows_of(query_BSGN)
    key, key_strides = rows_of(key_BSGN)
    grad, grad_strides = rows_of(grad_BSHP)
    block, block_n, warps, stages = _tile(grad.dtype, width, state, chunk)
    pieces = -(-state // block_n)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    sums = torch.empty(pieces, rows, heads, chunks, chunk, dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(grad):
        _query_grads_kernel[(chunks * (chunk // block), groups * pieces, rows)](
            query, key, grad, states_BHCPN, pairs_BCGLL, decay.to_end_BHCL if reverse else decay.into_BHCL,
            decay.steps_BHCL, out, sums, length, heads, groups, chunks, *query_strides, *key_strides, *grad_strides,
            P=width, N=state, CHUNK=chunk, BLOCK=block, BLOCK_P=1 << (width - 1).bit_length(), BLOCK_N=block_n,
            REVERSE=reverse, PRECISION=precision_of(grad), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, sums.sum(0)


def _tile(dtype: torch.dtype, width: int, state: int, chunk: int) -> tuple[int, int, int, int]:
    """Tokens of a block, columns of the state, warps and stages, by what fits into registers and shared memory."""
    block_n = min(64, 1 << (state - 1).bit_length())
    if dtype == torch.float32:
        return min(32, chunk), min(32, block_n), 4, 1
    return min(64, chunk), block_n if width <= 128 else min(32, block_n), 4, 2


if HAS_TRITON:
    import triton
    import triton.language as tl

    from slipstream.kernels.mamba2_decay import dot, load_rows

    @triton.jit
    def _query_grads_kernel(
        query,
        key,
        grad,
        states,
        pairs,
        edge,
        steps,
        out,
        sums,
        length,
        heads,
        groups,
        chunks,
        query_row,
        query_token,
        query_group,
        key_row,
        key_token,
        key_group,
        grad_row,
        grad_token,
        grad_head,
        P: tl.constexpr,
        N: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_N: tl.constexpr,
        REVERSE: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        block, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
        group = (tl.program_id(1) % groups).to(tl.int64)
        piece = tl.program_id(1) // groups
        chunk = (block // (CHUNK // BLOCK)).to(tl.int64)
        first = block % (CHUNK // BLOCK) * BLOCK
        start = chunk * CHUNK
        left = length - start
        i = first + tl.arange(0, BLOCK)
        p = tl.arange(0, BLOCK_P)
        n = piece * BLOCK_N + tl.arange(0, BLOCK_N)
        key += row * key_row + start * key_token + group * key_group
        pairs += ((row * chunks + chunk) * groups + group) * CHUNK * CHUNK
        acc = tl.zeros((BLOCK, BLOCK_N), tl.float32)
        begin = first if REVERSE else 0
        end = CHUNK if REVERSE else first + BLOCK
        for j0 in range(begin, end, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            keys = load_rows(key, j, n, key_token, left, N)
            if REVERSE:
                weights = tl.trans(tl.load(pairs + j[:, None] * CHUNK + i[None, :]))
            else:
                weights = tl.load(pairs + i[:, None] * CHUNK + j[None, :])
            acc += dot(weights, keys, PRECISION)

        query += row * query_row + start * query_token + group * query_group
        queries = load_rows(query, i, n, query_token, left, N).to(tl.float32)
        grad += row * grad_row + start * grad_token
        sums += piece * tl.num_programs(2).to(tl.int64) * heads * chunks * CHUNK
        heads_of_group = heads // groups
        for head in range(group * heads_of_group, (group + 1) * heads_of_group):
            at = (row * heads + head) * chunks + chunk
            grads = load_rows(grad + head * grad_head, i, p, grad_token, left, P)
            state = load_rows(states + at * P * N, p, n, N, P, N)
            part = dot(grads, state, PRECISION) * tl.load(edge + at * CHUNK + i)[:, None]
            tl.store(sums + at * CHUNK + i, tl.sum(part * queries, 1))
            if REVERSE:
                part *= tl.load(steps + at * CHUNK + i)[:, None]
            acc += part
        inside = (i < left)[:, None] & (n < N)[None, :]
        out += ((row * length + start) * groups + group) * N
        tl.store(out + i[:, None] * (groups * N) + n[None, :], acc.to(out.dtype.element_ty), mask=inside)
