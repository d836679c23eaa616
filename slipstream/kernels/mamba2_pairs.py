"""The gradients of the scores of Mamba2's scan, summed over the heads that share them: every pair of tokens of a chunk.

A program computes a block of pairs, all heads of a group one after the other, in registers and in a fixed order. The
decays' gradients need sums over rows and over columns of the same products: here both come from the same numbers.
Dims and names: `mamba2_decay.py`.
"""

import torch
from torch import Tensor

from slipstream.kernels import HAS_TRITON
from slipstream.kernels.mamba2_decay import Decay, between_reference, chunked, precision_of, rows_of, takes


def pair_grads(
    query_BSGN: Tensor, key_BSGN: Tensor, value_BSHP: Tensor, grad_BSHP: Tensor, decay: Decay
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of `query[i] . key[j]` for j <= i, `[B, C, G, L, L]` in the values' dtype, 0 for j > i: the
    sum over a group's heads of `(grad[i] . value[j]) between[i, j] dt[j]`.

    With it, fp32 `[B, H, C, L]`, the sums over j < i of each head's part times `query[i] . key[j]`, and the sums over
    i > j of the same without `dt[j]`. Pairs of a token with itself, between which nothing decays, are left out of both.
    """
    if not takes(value_BSHP, query_BSGN, key_BSGN):
        return pair_grads_reference(query_BSGN, key_BSGN, value_BSHP, grad_BSHP, decay)
    rows, length, heads, width = value_BSHP.shape
    groups, state = key_BSGN.shape[2:]
    chunks, chunk = decay.steps_BHCL.shape[2:]
    query, query_strides = rows_of(query_BSGN)
    key, key_strides = rows_of(key_BSGN)
    value, value_strides = rows_of(value_BSHP)
    grad, grad_strides = rows_of(grad_BSHP)
    block, warps, stages = _tile(value.dtype, width, state, chunk)
    blocks = chunk // block
    out = torch.empty(rows, chunks, groups, chunk, chunk, dtype=value.dtype, device=value.device)
    sums = torch.zeros(2, blocks, rows, heads, chunks, chunk, dtype=torch.float32, device=value.device)
    with torch.cuda.device_of(value):
        _pair_grads_kernel[(chunks * blocks * blocks, groups, rows)](
            query, key, value, grad, decay.steps_BHCL, decay.high_BHCL, decay.low_BHCL,
            decay.steps_BHCL if decay.document_BCL is None else decay.document_BCL, out, sums[0], sums[1],
            length, heads, heads // groups, chunks, *query_strides, *key_strides, *value_strides, *grad_strides,
            P=width, N=state, CHUNK=chunk, BLOCK=block, BLOCK_P=1 << (width - 1).bit_length(),
            BLOCK_N=1 << (state - 1).bit_length(), DOCUMENTS=decay.document_BCL is not None,
            PRECISION=precision_of(value), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    by_row, by_column = sums.sum(1)
    return out, by_row, by_column


def pair_grads_reference(
    query_BSGN: Tensor, key_BSGN: Tensor, value_BSHP: Tensor, grad_BSHP: Tensor, decay: Decay
) -> tuple[Tensor, Tensor, Tensor]:
    """What `pair_grads` computes, in fp32."""
    groups, chunk = query_BSGN.shape[2], decay.steps_BHCL.shape[3]
    query, key, value, grad = (
        chunked(tensor, chunk).float() for tensor in (query_BSGN, key_BSGN, value_BSHP, grad_BSHP)
    )
    pairs_BHCLL = torch.einsum("bcihp,bcjhp->bhcij", grad, value) * between_reference(decay, reverse=False)
    scores_BGCLL = torch.einsum("bcign,bcjgn->bgcij", query, key).tril(-1)
    products = pairs_BHCLL * scores_BGCLL.repeat_interleave(pairs_BHCLL.shape[1] // groups, 1)
    weighted_BHCLL = pairs_BHCLL * decay.steps_BHCL[..., None, :]
    out_BCGLL = weighted_BHCLL.unflatten(1, (groups, -1)).sum(2).transpose(1, 2)
    return out_BCGLL, (products * decay.steps_BHCL[..., None, :]).sum(-1), products.sum(-2)


def _tile(dtype: torch.dtype, width: int, state: int, chunk: int) -> tuple[int, int, int]:
    """Tokens of a block's sides, warps and stages, by what fits into registers and shared memory."""
    if dtype == torch.float32:
        return min(32, chunk), 8, 1
    return min(64 if max(width, state) <= 128 else 32, chunk), 4, 2


if HAS_TRITON:
    import triton
    import triton.language as tl

    from slipstream.kernels.mamba2_decay import decay_between, dot, load_rows

    @triton.jit
    def _pair_grads_kernel(
        query,
        key,
        value,
        grad,
        steps,
        high,
        low,
        document,
        out,
        by_row,
        by_column,
        length,
        heads,
        heads_of_group,
        chunks,
        query_row,
        query_token,
        query_group,
        key_row,
        key_token,
        key_group,
        value_row,
        value_token,
        value_head,
        grad_row,
        grad_token,
        grad_head,
        P: tl.constexpr,
        N: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_N: tl.constexpr,
        DOCUMENTS: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        BLOCKS: tl.constexpr = CHUNK // BLOCK
        block, group, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        chunk = (block // (BLOCKS * BLOCKS)).to(tl.int64)
        block_i, block_j = block // BLOCKS % BLOCKS, block % BLOCKS
        start = chunk * CHUNK
        left = length - start
        i = block_i * BLOCK + tl.arange(0, BLOCK)
        j = block_j * BLOCK + tl.arange(0, BLOCK)
        out += ((row * chunks + chunk) * tl.num_programs(1) + group) * CHUNK * CHUNK
        if block_j > block_i:
            tl.store(out + i[:, None] * CHUNK + j[None, :], tl.zeros((BLOCK, BLOCK), out.dtype.element_ty))
            return
        p = tl.arange(0, BLOCK_P)
        n = tl.arange(0, BLOCK_N)
        queries = load_rows(
            query + row * query_row + start * query_token + group * query_group, i, n, query_token, left, N
        )
        keys = load_rows(key + row * key_row + start * key_token + group * key_group, j, n, key_token, left, N)
        scores = tl.where(i[:, None] == j[None, :], 0.0, dot(queries, tl.trans(keys), PRECISION))
        value += row * value_row + start * value_token
        grad += row * grad_row + start * grad_token
        if DOCUMENTS:
            document += (row * chunks + chunk) * CHUNK
        slot = tl.num_programs(2).to(tl.int64) * heads * chunks * CHUNK
        total = tl.zeros((BLOCK, BLOCK), tl.float32)
        for head in range(group * heads_of_group, (group + 1) * heads_of_group):
            at = ((row * heads + head) * chunks + chunk) * CHUNK
            grads = load_rows(grad + head * grad_head, i, p, grad_token, left, P)
            values = load_rows(value + head * value_head, j, p, value_token, left, P)
            pairs = dot(grads, tl.trans(values), PRECISION)
            pairs *= decay_between(high + at, low + at, document, i, j, False, DOCUMENTS)
            step = tl.load(steps + at + j)[None, :]
            products = pairs * scores
            tl.store(by_column + block_i * slot + at + j, tl.sum(products, 0))
            tl.store(by_row + block_j * slot + at + i, tl.sum(products * step, 1))
            total += pairs * step
        tl.store(out + i[:, None] * CHUNK + j[None, :], total.to(out.dtype.element_ty))
