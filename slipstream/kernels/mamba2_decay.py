"""What lies between the tokens of a chunk in Mamba2's scan, for the kernels beside this file that compute it in parts.

State-space duality (Dao and Gu 2024, arXiv 2405.21060) reads the scan as attention without a softmax: C asks as the
query, B answers as the key, dt x is the value, and a score decays by exp(A dt) with every token between the two. Within
a chunk that is a product of scores; a state `[P, N]` for each head carries on from one chunk to the next. The gradients
are the same products with the roles exchanged and the time reversed, so every kernel here runs in either direction.

Dims: B rows, S tokens of a row, C chunks of L tokens (the last padded by tokens that do nothing), H heads, G groups of
heads that share queries and keys, P value width, N state.
"""

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.kernels import HAS_TRITON, runs_on

WIDEST = 256  # heads and states that the kernels take


class Decay(NamedTuple):
    """Per head and token, fp32 and contiguous.

    Attributes:
        steps_BHCL: dt, 0 for padding.
        high_BHCL, low_BHCL: the sum of `A dt` from the chunk's first token on, as two numbers: differences of one
            alone lose digits where the sum is large and what is between two tokens small.
        into_BHCL: what is left at a token of the state before its chunk.
        to_end_BHCL: what is left of a token at its chunk's end.
        carry_BHC: what is left after a chunk of the state before it.
        document_BCL: ids; tokens of different ones know nothing of each other. None: a row is one.
    """

    steps_BHCL: Tensor
    high_BHCL: Tensor
    low_BHCL: Tensor
    into_BHCL: Tensor
    to_end_BHCL: Tensor
    carry_BHC: Tensor
    document_BCL: Tensor | None


def make_decay(steps_BSH: Tensor, A_H: Tensor, document_BS: Tensor | None, chunk: int) -> Decay:
    """The decay of steps `dt` (fp32) in heads whose state decays by `exp(A dt)`; ids never fall along a row."""
    steps_BHCL = chunked(steps_BSH, chunk).permute(0, 3, 1, 2).contiguous()
    sums_BHCL = (A_H.float()[:, None, None] * steps_BHCL).cumsum(-1, dtype=torch.float64)
    high_BHCL = sums_BHCL.float()
    totals_BHC1 = sums_BHCL[..., -1:]
    into, to_end, carry = sums_BHCL.exp().float(), (totals_BHC1 - sums_BHCL).exp().float(), totals_BHC1.exp().float()
    document_BCL = None
    if document_BS is not None:
        rows, length = document_BS.shape
        last = document_BS[:, -1:].expand(-1, -length % chunk)
        document_BCL = torch.cat([document_BS, last], 1).view(rows, -1, chunk)
        ends_BC1 = document_BCL[..., -1:]
        before_BC1 = torch.cat([ends_BC1[:, :1], ends_BC1[:, :-1]], 1)  # the first chunk begins with nothing anyway
        into = into * (document_BCL == before_BC1)[:, None]
        to_end = to_end * (document_BCL == ends_BC1)[:, None]
        carry = carry * (before_BC1 == ends_BC1)[:, None]
    return Decay(
        steps_BHCL, high_BHCL, (sums_BHCL - high_BHCL).float(), into, to_end, carry[..., 0].contiguous(), document_BCL
    )


def chunked(tensor: Tensor, chunk: int) -> Tensor:
    """`[B, S, …]` as `[B, C, L, …]`, zeros behind the last token."""
    padded = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, -tensor.shape[1] % chunk))
    return padded.reshape(tensor.shape[0], -1, chunk, *tensor.shape[2:])


def between_reference(decay: Decay, reverse: bool) -> Tensor:
    """What is left of token j at token i, `[B, H, C, L, L]`: 0 where j is behind i. In reverse of i at j, 0 where it is
    before."""
    sums = decay.high_BHCL[..., :, None] - decay.high_BHCL[..., None, :]
    sums = sums + (decay.low_BHCL[..., :, None] - decay.low_BHCL[..., None, :])
    seen = torch.ones(sums.shape[-2:], dtype=torch.bool, device=sums.device)
    seen = seen.triu() if reverse else seen.tril()
    if decay.document_BCL is not None:
        document = decay.document_BCL[:, None]
        seen = seen & (document[..., :, None] == document[..., None, :])
    return (-sums if reverse else sums).masked_fill(~seen, float("-inf")).exp()


def takes(value_BSHP: Tensor, query_BSGN: Tensor, key_BSGN: Tensor) -> bool:
    """Whether the kernels run for such tensors rather than their references."""
    widths = value_BSHP.shape[-1], query_BSGN.shape[-1]
    return (
        runs_on(value_BSHP)
        and value_BSHP.dtype in (torch.bfloat16, torch.float32)
        and value_BSHP.dtype == query_BSGN.dtype == key_BSGN.dtype
        and all(width % 16 == 0 and 0 < width <= WIDEST for width in widths)
    )


def rows_of(tensor: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """`[B, S, heads, width]` as a kernel reads it, copied where its last dim has gaps, and its other strides."""
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    batch, token, head, _ = tensor.stride()
    return tensor, (batch, token, head)


def precision_of(tensor: Tensor) -> str:
    """The `input_precision` of a `tl.dot`: left alone, Triton rounds fp32 to TF32."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"


if HAS_TRITON:
    import triton
    import triton.language as tl

    _INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

    @triton.jit
    def dot(a, b, PRECISION: tl.constexpr):
        """`a @ b` in fp32. The interpreter multiplies bf16 by its bits; its values are exact in fp32."""
        if _INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, input_precision=PRECISION)

    @triton.jit
    def load_rows(start, i, column, stride, left, WIDTH: tl.constexpr):
        """Tokens `i` of the chunk at `start`, `[I, width]`; zeros from token `left` and column WIDTH on."""
        inside = (i < left)[:, None] & (column < WIDTH)[None, :]
        return tl.load(start + i[:, None] * stride + column[None, :], mask=inside, other=0.0)

    @triton.jit
    def decay_between(high, low, document, i, j, REVERSE: tl.constexpr, DOCUMENTS: tl.constexpr):
        """What `between_reference` computes, for tokens i and j of the chunk that the pointers point at."""
        sums = tl.load(high + i)[:, None] - tl.load(high + j)[None, :]
        sums += tl.load(low + i)[:, None] - tl.load(low + j)[None, :]
        if REVERSE:
            sums = -sums
            seen = i[:, None] <= j[None, :]
        else:
            seen = i[:, None] >= j[None, :]
        if DOCUMENTS:
            seen = seen & (tl.load(document + i)[:, None] == tl.load(document + j)[None, :])
        return tl.exp(tl.where(seen, sums, -float("inf")))
