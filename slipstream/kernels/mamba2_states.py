"""The state before each chunk of Mamba2's scan, and in reverse the gradient of the state after it.

A program keeps a piece of one head's state in registers, fp32, and goes through the chunks, so that a state is written
once, in the dtype in which the next products read it. Dims and names: `mamba2_decay.py`.
"""

import torch
from torch import Tensor

from slipstream.kernels import HAS_TRITON
from slipstream.kernels.mamba2_decay import chunked, precision_of, rows_of, takes


def states(value_BSHP: Tensor, key_BSGN: Tensor, weight_BHCL: Tensor, carry_BHC: Tensor) -> Tensor:
    """`out[0] = 0`, `out[c + 1] = carry[c] out[c] + sum over the tokens of c of weight * value keyᵀ`, `[B, H, C, P, N]`
    in the values' dtype."""
    if not takes(value_BSHP, key_BSGN, key_BSGN):
        return states_reference(value_BSHP, key_BSGN, weight_BHCL, carry_BHC)
    return _launch(value_BSHP, key_BSGN, weight_BHCL, carry_BHC, None)[0]


def states_backward(
    value_BSHP: Tensor, key_BSGN: Tensor, weight_BHCL: Tensor, carry_BHC: Tensor, states_BHCPN: Tensor
) -> tuple[Tensor, Tensor]:
    """The same from the last chunk to the first, `out[c - 1]` from `out[c]`; and its products with what `states` gave,
    summed over P and N, fp32 `[B, H, C]`: the gradient of what is carried."""
    if not takes(value_BSHP, key_BSGN, key_BSGN):
        return states_backward_reference(value_BSHP, key_BSGN, weight_BHCL, carry_BHC, states_BHCPN)
    return _launch(value_BSHP, key_BSGN, weight_BHCL, carry_BHC, states_BHCPN)


def states_reference(value_BSHP: Tensor, key_BSGN: Tensor, weight_BHCL: Tensor, carry_BHC: Tensor) -> Tensor:
    """What `states` computes, in fp32."""
    left_BHCPN = _left(value_BSHP, key_BSGN, weight_BHCL)
    return _recurrence(left_BHCPN, carry_BHC, range(carry_BHC.shape[2]))


def states_backward_reference(
    value_BSHP: Tensor, key_BSGN: Tensor, weight_BHCL: Tensor, carry_BHC: Tensor, states_BHCPN: Tensor
) -> tuple[Tensor, Tensor]:
    """What `states_backward` computes, in fp32."""
    left_BHCPN = _left(value_BSHP, key_BSGN, weight_BHCL)
    out_BHCPN = _recurrence(left_BHCPN, carry_BHC, reversed(range(carry_BHC.shape[2])))
    return out_BHCPN, (out_BHCPN * states_BHCPN).sum((-1, -2))


def _left(value_BSHP: Tensor, key_BSGN: Tensor, weight_BHCL: Tensor) -> Tensor:
    heads, chunk = value_BSHP.shape[2] // key_BSGN.shape[2], weight_BHCL.shape[3]
    key_BCLHN = chunked(key_BSGN, chunk).float().repeat_interleave(heads, 3)
    value_BCLHP = chunked(value_BSHP, chunk).float() * weight_BHCL.permute(0, 2, 3, 1)[..., None]
    return torch.einsum("bclhp,bclhn->bhcpn", value_BCLHP, key_BCLHN)


def _recurrence(left_BHCPN: Tensor, carry_BHC: Tensor, order) -> Tensor:  # type: ignore[no-untyped-def]
    out_BHCPN, state_BHPN = torch.empty_like(left_BHCPN), torch.zeros_like(left_BHCPN[:, :, 0])
    for c in order:
        out_BHCPN[:, :, c] = state_BHPN
        state_BHPN = carry_BHC[:, :, c, None, None] * state_BHPN + left_BHCPN[:, :, c]
    return out_BHCPN


def _launch(
    value_BSHP: Tensor, key_BSGN: Tensor, weight_BHCL: Tensor, carry_BHC: Tensor, states_BHCPN: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, length, heads, width = value_BSHP.shape
    groups, state = key_BSGN.shape[2:]
    chunks, chunk = weight_BHCL.shape[2:]
    value, value_strides = rows_of(value_BSHP)
    key, key_strides = rows_of(key_BSGN)
    # Small pieces: there must be enough of them to fill the GPU, whatever the length.
    block_p = min(64, 1 << (width - 1).bit_length())
    block_n = min(32, 1 << (state - 1).bit_length())
    pieces = -(-width // block_p) * -(-state // block_n)
    out = torch.empty(rows, heads, chunks, width, state, dtype=value.dtype, device=value.device)
    reverse = states_BHCPN is not None
    products = torch.empty((pieces, rows, heads, chunks) if reverse else (0,), dtype=torch.float32, device=value.device)
    with torch.cuda.device_of(value):
        _states_kernel[(rows * heads, pieces)](
            value, key, weight_BHCL, carry_BHC, states_BHCPN if reverse else out, out, products,
            length, heads, heads // groups, chunks, *value_strides, *key_strides,
            P=width, N=state, CHUNK=chunk, BLOCK_P=block_p, BLOCK_N=block_n, REVERSE=reverse,
            PRECISION=precision_of(value), num_warps=4, num_stages=3 if value.dtype == torch.bfloat16 else 1,
        )  # fmt: skip
    return out, products.sum(0)


if HAS_TRITON:
    import triton
    import triton.language as tl

    from slipstream.kernels.mamba2_decay import dot, load_rows

    @triton.jit
    def _states_kernel(
        value,
        key,
        weight,
        carry,
        states,
        out,
        products,
        length,
        heads,
        heads_of_group,
        chunks,
        value_row,
        value_token,
        value_head,
        key_row,
        key_token,
        key_group,
        P: tl.constexpr,
        N: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_N: tl.constexpr,
        REVERSE: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        row_head = tl.program_id(0).to(tl.int64)
        piece = tl.program_id(1)
        pieces_n = (N + BLOCK_N - 1) // BLOCK_N
        p = piece // pieces_n * BLOCK_P + tl.arange(0, BLOCK_P)
        n = piece % pieces_n * BLOCK_N + tl.arange(0, BLOCK_N)
        row, head = row_head // heads, row_head % heads
        value += row * value_row + head * value_head
        key += row * key_row + head // heads_of_group * key_group
        inside = (p < P)[:, None] & (n < N)[None, :]
        piece_of_state = p[:, None] * N + n[None, :]
        i = tl.arange(0, CHUNK)
        state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
        for step in range(chunks):
            chunk = chunks - 1 - step if REVERSE else step
            at = row_head * chunks + chunk
            tl.store(out + at * P * N + piece_of_state, state.to(out.dtype.element_ty), mask=inside)
            if REVERSE:
                before = tl.load(states + at * P * N + piece_of_state, mask=inside, other=0.0).to(tl.float32)
                product = piece * tl.num_programs(0).to(tl.int64) * chunks + at
                tl.store(products + product, tl.sum(before * state))
            start = tl.cast(chunk, tl.int64) * CHUNK
            values = load_rows(value + start * value_token, i, p, value_token, length - start, P)
            keys = load_rows(key + start * key_token, i, n, key_token, length - start, N)
            weighted = values.to(tl.float32) * tl.load(weight + at * CHUNK + i)[:, None]
            state = state * tl.load(carry + at) + dot(tl.trans(weighted.to(keys.dtype)), keys, PRECISION)
