"""`h[t] = a[t] h[t-1] + x[t]`, each channel by itself, along rows or against them.

A program walks along one chunk of a row in a block of channels, all chunks side by side, each from a state of zero; a
second kernel carries states from chunk to chunk by the product of a chunk's decays; then the first one walks again from
there (Martin and Cundy 2018, arXiv 1709.04057).

Dims: B rows, S tokens of a row, C chunks, D channels.
"""

import torch
from torch import Tensor

from slipstream.kernels import HAS_TRITON, runs_on

CHUNK = 64  # tokens that a program walks along
_BLOCK = 128
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def recur(a_BSD: Tensor, x_BSD: Tensor, dtype: torch.dtype, *, reverse: bool = False) -> Tensor:
    """`h[t] = a[t] h[t-1] + x[t]` from `h[-1] = 0`, computed in fp32, in `dtype`. In `reverse`, its transpose:
    `h[t] = a[t+1] h[t+1] + x[t]` from the end of the row.

    Example: a [2, 2, 2], x [1, 1, 1] -> [1, 3, 7]; in reverse [7, 3, 1].
    """
    if not (runs_on(x_BSD) and {a_BSD.dtype, x_BSD.dtype, dtype} <= set(_DTYPES)):
        return recur_reference(a_BSD, x_BSD, dtype, reverse=reverse)
    a, x = a_BSD.contiguous(), x_BSD.contiguous()
    rows, length, channels = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    chunks = -(-length // CHUNK)
    products, states = (torch.empty(rows, chunks, channels, dtype=torch.float32, device=x.device) for _ in range(2))
    blocks = -(-channels // _BLOCK)
    if not out.numel():
        return out
    with torch.cuda.device_of(x):
        for walk in (False, True):
            _recurrence_kernel[(blocks, chunks, rows)](
                a, x, out, products, states, length, channels,
                REVERSE=reverse, WALK=walk, CHUNK=CHUNK, BLOCK=_BLOCK, num_warps=4,
            )  # fmt: skip
            if not walk:
                _recurrence_carry_kernel[(blocks, rows)](products, states, chunks, channels, BLOCK=_BLOCK, num_warps=4)
    return out


def recur_reference(a_BSD: Tensor, x_BSD: Tensor, dtype: torch.dtype, *, reverse: bool = False) -> Tensor:
    """What `recur` computes."""
    wide = torch.promote_types(x_BSD.dtype, torch.float32)
    a_BSD, x_BSD = a_BSD.to(wide), x_BSD.to(wide)
    length = x_BSD.shape[1]
    states: list[Tensor] = []
    for t in reversed(range(length)) if reverse else range(length):
        before_BD = a_BSD[:, t + reverse] * states[-1] if states else 0
        states.append(before_BD + x_BSD[:, t])
    if not states:
        return torch.zeros_like(x_BSD, dtype=dtype)
    return torch.stack(states[::-1] if reverse else states, 1).to(dtype)


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _recurrence_kernel(
        a,
        x,
        out,
        products,
        states,
        length,
        channels,
        REVERSE: tl.constexpr,
        WALK: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """First the product of the chunk's decays and its state from zero; then (WALK) all states from the one before
        it, which the carry has put in their place. In reverse chunks are counted from the end."""
        chunk, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
        d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = d < channels
        a += row * length * channels + d
        x += row * length * channels + d
        out += row * length * channels + d
        place = (row * tl.num_programs(1) + chunk) * channels + d
        state = tl.zeros([BLOCK], tl.float32)
        product = state + 1
        if WALK:
            state = tl.load(states + place, mask=inside, other=0.0)
        start, stride = chunk * CHUNK, tl.cast(channels, tl.int64)
        for position in range(start, tl.minimum(start + CHUNK, length)):
            if REVERSE:
                token = (length - 1 - position) * stride
                decay = tl.load(a + token + stride, mask=inside & (position > 0), other=0.0).to(tl.float32)
            else:
                token = position * stride
                decay = tl.load(a + token, mask=inside & (position > 0), other=0.0).to(tl.float32)
            state = decay * state + tl.load(x + token, mask=inside, other=0.0).to(tl.float32)
            product *= decay
            if WALK:
                tl.store(out + token, state.to(out.dtype.element_ty), mask=inside)
        if not WALK:
            tl.store(states + place, state, mask=inside)
            tl.store(products + place, product, mask=inside)

    @triton.jit
    def _recurrence_carry_kernel(products, states, chunks, channels, BLOCK: tl.constexpr):
        """The state that each chunk ends with becomes the one that it begins with."""
        d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = d < channels
        place = tl.program_id(1).to(tl.int64) * chunks * channels + d
        before = tl.zeros([BLOCK], tl.float32)
        for _ in range(chunks):
            own = tl.load(states + place, mask=inside, other=0.0)
            tl.store(states + place, before, mask=inside)
            before = tl.load(products + place, mask=inside, other=0.0) * before + own
            place += channels
