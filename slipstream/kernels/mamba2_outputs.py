"""The outputs of Mamba2's scan from the states before its chunks, and in reverse the gradient of its values.

A program computes the outputs of a block of tokens in one head; the scores of a chunk are never in memory.
Dims and names: `mamba2_decay.py`.
"""

import torch
from torch import Tensor

from slipstream.kernels import HAS_TRITON
from slipstream.kernels.mamba2_decay import Decay, between_reference, chunked, precision_of, rows_of, takes


def outputs(
    query_BSGN: Tensor, key_BSGN: Tensor, value_BSHP: Tensor, states_BHCPN: Tensor, decay: Decay, skip_H: Tensor | None
) -> Tensor:
    """`out[i] = into[i] state query[i] + sum over j <= i of (query[i] . key[j]) between[i, j] dt[j] value[j]
    + skip value[i]`, fp32 `[B, S, H, P]`."""
    if not takes(value_BSHP, query_BSGN, key_BSGN):
        return outputs_reference(query_BSGN, key_BSGN, value_BSHP, states_BHCPN, decay, skip_H)
    return _launch(query_BSGN, key_BSGN, value_BSHP, states_BHCPN, decay, skip_H, None)[0]


def value_grads(
    query_BSGN: Tensor,
    key_BSGN: Tensor,
    value_BSHP: Tensor,
    grad_BSHP: Tensor,
    grad_states_BHCPN: Tensor,
    decay: Decay,
    skip_H: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradient of `value_BSHP`, in its dtype, that of the outputs being in the same:
    `dt[i] (to_end[i] grad_state key[i] + sum over j >= i of (key[i] . query[j]) between[i, j] grad[j]) + skip grad[i]`;
    and `value[i] . grad[i]`, fp32 `[B, H, C, L]`.
    """
    if not takes(value_BSHP, query_BSGN, key_BSGN):
        return value_grads_reference(query_BSGN, key_BSGN, value_BSHP, grad_BSHP, grad_states_BHCPN, decay, skip_H)
    return _launch(key_BSGN, query_BSGN, grad_BSHP, grad_states_BHCPN, decay, skip_H, value_BSHP)


def outputs_reference(
    query_BSGN: Tensor, key_BSGN: Tensor, value_BSHP: Tensor, states_BHCPN: Tensor, decay: Decay, skip_H: Tensor | None
) -> Tensor:
    """What `outputs` computes."""
    weights_BHCLL = between_reference(decay, reverse=False) * decay.steps_BHCL[..., None, :]
    out_BSHP = _attend(query_BSGN, key_BSGN, value_BSHP, states_BHCPN, weights_BHCLL, decay.into_BHCL)
    return out_BSHP if skip_H is None else out_BSHP + skip_H.float()[:, None] * value_BSHP.float()


def value_grads_reference(
    query_BSGN: Tensor,
    key_BSGN: Tensor,
    value_BSHP: Tensor,
    grad_BSHP: Tensor,
    grad_states_BHCPN: Tensor,
    decay: Decay,
    skip_H: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What `value_grads` computes."""
    weights_BHCLL = between_reference(decay, reverse=True) * decay.steps_BHCL[..., None]
    to_end_BHCL = decay.to_end_BHCL * decay.steps_BHCL
    out_BSHP = _attend(key_BSGN, query_BSGN, grad_BSHP, grad_states_BHCPN, weights_BHCLL, to_end_BHCL)
    if skip_H is not None:
        out_BSHP = out_BSHP + skip_H.float()[:, None] * grad_BSHP.float()
    products_BSH = (grad_BSHP.float() * value_BSHP.float()).sum(-1)
    products_BHCL = chunked(products_BSH, weights_BHCLL.shape[-1]).permute(0, 3, 1, 2)
    return out_BSHP.to(value_BSHP.dtype), products_BHCL


def _attend(
    query_BSGN: Tensor, key_BSGN: Tensor, value_BSHP: Tensor, states_BHCPN: Tensor, weights: Tensor, edge: Tensor
) -> Tensor:
    heads, chunk, length = value_BSHP.shape[2] // key_BSGN.shape[2], weights.shape[-1], value_BSHP.shape[1]
    query, key = (chunked(tensor, chunk).float() for tensor in (query_BSGN, key_BSGN))
    scores = torch.einsum("bcign,bcjgn->bgcij", query, key).repeat_interleave(heads, 1) * weights
    out = torch.einsum("bhcij,bcjhp->bcihp", scores, chunked(value_BSHP, chunk).float())
    query = query.repeat_interleave(heads, 3) * edge.permute(0, 2, 3, 1)[..., None]
    out = out + torch.einsum("bcihn,bhcpn->bcihp", query, states_BHCPN.float())
    return out.flatten(1, 2)[:, :length].contiguous()


def _launch(
    query_BSGN: Tensor,
    key_BSGN: Tensor,
    value_BSHP: Tensor,
    states_BHCPN: Tensor,
    decay: Decay,
    skip_H: Tensor | None,
    other_BSHP: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`other_BSHP` is there in reverse; its products with the values are the second result."""
    rows, length, heads, width = value_BSHP.shape
    groups, state = key_BSGN.shape[2:]
    chunks, chunk = decay.steps_BHCL.shape[2:]
    query, query_strides = rows_of(query_BSGN)
    key, key_strides = rows_of(key_BSGN)
    value, value_strides = rows_of(value_BSHP)
    reverse = other_BSHP is not None
    other, other_strides = rows_of(value_BSHP if other_BSHP is None else other_BSHP)
    block, block_p, warps, stages = _tile(value.dtype, width, state, chunk)
    blocks, pieces = chunks * (chunk // block), -(-width // block_p)
    out = torch.empty(value.shape, dtype=value.dtype if reverse else torch.float32, device=value.device)
    shape = (pieces, rows, heads, chunks, chunk) if reverse else (0,)
    products = torch.empty(shape, dtype=torch.float32, device=value.device)
    with torch.cuda.device_of(value):
        _outputs_kernel[(heads * pieces, blocks, rows)](
            query, key, value, other, states_BHCPN, decay.to_end_BHCL if reverse else decay.into_BHCL,
            decay.steps_BHCL, decay.high_BHCL, decay.low_BHCL,
            decay.steps_BHCL if decay.document_BCL is None else decay.document_BCL,
            decay.steps_BHCL if skip_H is None else skip_H, out, products,
            length, heads, heads // groups, chunks, *query_strides, *key_strides, *value_strides, *other_strides,
            P=width, N=state, CHUNK=chunk, BLOCK=block, BLOCK_P=block_p,
            BLOCK_N=1 << (state - 1).bit_length(), REVERSE=reverse, DOCUMENTS=decay.document_BCL is not None,
            SKIP=skip_H is not None, PRECISION=precision_of(value), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, products.sum(0)


def _tile(dtype: torch.dtype, width: int, state: int, chunk: int) -> tuple[int, int, int, int]:
    """Tokens of a block, columns of the values, warps and stages, by what fits into registers and shared memory."""
    block_p = min(64, 1 << (width - 1).bit_length())
    if dtype == torch.float32:
        return 16, block_p, 8, 1
    return min(64 if state <= 128 else 32, chunk), block_p, 4, 2


if HAS_TRITON:
    import triton
    import triton.language as tl

    from slipstream.kernels.mamba2_decay import decay_between, dot, load_rows

    @triton.jit
    def _outputs_kernel(
        query,
        key,
        value,
        other,
        states,
        edge,
        steps,
        high,
        low,
        document,
        skip,
        out,
        products,
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
        other_row,
        other_token,
        other_head,
        P: tl.constexpr,
        N: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_N: tl.constexpr,
        REVERSE: tl.constexpr,
        DOCUMENTS: tl.constexpr,
        SKIP: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        head = (tl.program_id(0) % heads).to(tl.int64)
        piece, block, row = tl.program_id(0) // heads, tl.program_id(1), tl.program_id(2).to(tl.int64)
        chunk = (block // (CHUNK // BLOCK)).to(tl.int64)
        first = block % (CHUNK // BLOCK) * BLOCK
        start = chunk * CHUNK
        left = length - start
        group = head // heads_of_group
        query += row * query_row + start * query_token + group * query_group
        key += row * key_row + start * key_token + group * key_group
        value += row * value_row + start * value_token + head * value_head
        at = (row * heads + head) * chunks + chunk  # of the small terms of a head and chunk
        steps += at * CHUNK
        high += at * CHUNK
        low += at * CHUNK
        if DOCUMENTS:
            document += (row * chunks + chunk) * CHUNK
        i = first + tl.arange(0, BLOCK)
        p = piece * BLOCK_P + tl.arange(0, BLOCK_P)
        n = tl.arange(0, BLOCK_N)

        queries = load_rows(query, i, n, query_token, left, N)
        state = load_rows(states + at * P * N, p, n, N, P, N)
        acc = dot(queries, tl.trans(state), PRECISION)
        acc *= tl.load(edge + at * CHUNK + i)[:, None]
        begin = first if REVERSE else 0
        end = CHUNK if REVERSE else first + BLOCK
        for j0 in range(begin, end, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            keys = load_rows(key, j, n, key_token, left, N)
            values = load_rows(value, j, p, value_token, left, P)
            scores = dot(queries, tl.trans(keys), PRECISION)
            scores *= decay_between(high, low, document, i, j, REVERSE, DOCUMENTS)
            if not REVERSE:
                scores *= tl.load(steps + j)[None, :]
            acc += dot(scores.to(values.dtype), values, PRECISION)
        values = load_rows(value, i, p, value_token, left, P).to(tl.float32)
        if REVERSE:
            acc *= tl.load(steps + i)[:, None]
        if SKIP:
            acc += tl.load(skip + head).to(tl.float32) * values
        inside = (i < left)[:, None] & (p < P)[None, :]
        out += ((row * length + start) * heads + head) * P
        tl.store(out + i[:, None] * (heads * P) + p[None, :], acc.to(out.dtype.element_ty), mask=inside)
        if REVERSE:
            other += row * other_row + start * other_token + head * other_head
            others = load_rows(other, i, p, other_token, left, P).to(tl.float32)
            products += piece * tl.num_programs(2).to(tl.int64) * heads * chunks * CHUNK
            tl.store(products + at * CHUNK + i, tl.sum(values * others, 1))
