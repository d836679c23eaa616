"""The outputs of Mamba1's selective scan from the states before its chunks.

A program walks along one chunk in a block of channels, all chunks side by side. Dims:
`selective_scan_states.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.kernels import HAS_TRITON
from slipstream.kernels.selective_scan_states import rows_of, takes, tile


def outputs(
    x_BSD: Tensor,
    steps_BSD: Tensor,
    A_DN: Tensor,
    B_BSN: Tensor,
    C_BSN: Tensor,
    D_D: Tensor | None,
    z_BSD: Tensor | None,
    states_BCND: Tensor,
    chunk: int,
) -> Tensor:
    """`out[t] = (h[t] C[t] + D x[t]) silu(z[t])`, in the dtype of x; steps and states as `states` gives them."""
    if not takes(A_DN, x_BSD, B_BSN, C_BSN, z_BSD):
        return outputs_reference(x_BSD, steps_BSD, A_DN, B_BSN, C_BSN, D_D, z_BSD, states_BCND, chunk)
    rows, length, channels = x_BSD.shape
    state, chunks = A_DN.shape[1], states_BCND.shape[1]
    x, *x_strides = rows_of(x_BSD)
    z, *z_strides = rows_of(x_BSD if z_BSD is None else z_BSD)
    B, *B_strides = rows_of(B_BSN)
    C, *C_strides = rows_of(C_BSN)
    block, block_n, warps = tile(state)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _selective_outputs_kernel[(-(-channels // block), chunks, rows)](
            x, steps_BSD, A_DN, B, C, A_DN if D_D is None else D_D, z, states_BCND, out, length, channels,
            *x_strides, *z_strides, *B_strides, *C_strides,
            N=state, CHUNK=chunk, BLOCK=block, BLOCK_N=block_n, SKIP=D_D is not None, GATE=z_BSD is not None,
            num_warps=warps,
        )  # fmt: skip
    return out


def outputs_reference(
    x_BSD: Tensor,
    steps_BSD: Tensor,
    A_DN: Tensor,
    B_BSN: Tensor,
    C_BSN: Tensor,
    D_D: Tensor | None,
    z_BSD: Tensor | None,
    states_BCND: Tensor,
    chunk: int,
) -> Tensor:
    """What `outputs` computes."""
    outs, state_BND = [], states_BCND[:, 0]
    for t in range(x_BSD.shape[1]):
        state_BND = states_BCND[:, t // chunk] if t % chunk == 0 else state_BND
        step_B1D, x_B1D = steps_BSD[:, t, None], x_BSD[:, t, None].float()
        state_BND = torch.exp(step_B1D * A_DN.mT) * state_BND + step_B1D * x_B1D * B_BSN[:, t, :, None].float()
        outs.append((state_BND * C_BSN[:, t, :, None].float()).sum(1))
    out_BSD = torch.stack(outs, 1)
    out_BSD = out_BSD if D_D is None else out_BSD + D_D.float() * x_BSD.float()
    return (out_BSD if z_BSD is None else out_BSD * F.silu(z_BSD.float())).to(x_BSD.dtype)


if HAS_TRITON:
    import triton
    import triton.language as tl

    from slipstream.kernels.selective_scan_states import load_channels, load_states, rates_of, sigmoid

    @triton.jit
    def _selective_outputs_kernel(
        x,
        steps,
        A,
        B,
        C,
        skip,
        gate,
        states,
        out,
        length,
        channels,
        x_row,
        x_token,
        gate_row,
        gate_token,
        B_row,
        B_token,
        C_row,
        C_token,
        N: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_N: tl.constexpr,
        SKIP: tl.constexpr,
        GATE: tl.constexpr,
    ):
        chunk, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        start = chunk * CHUNK
        x += row * x_row + start * x_token
        gate += row * gate_row + start * gate_token
        B += row * B_row + start * B_token
        C += row * C_row + start * C_token
        steps += (row * length + start) * channels
        out += (row * length + start) * channels
        d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
        n = tl.arange(0, BLOCK_N)[:, None]
        rates = rates_of(A, d, n, channels, N)
        if SKIP:
            skips = load_channels(skip, d, channels)
        inside = (d < channels) & (n < N)
        states += (row * tl.num_programs(1) + chunk) * N * channels
        state = tl.load(states + n * channels + d, mask=inside, other=0.0)
        for t in range(tl.minimum(length - start, CHUNK).to(tl.int32)):
            step = load_channels(steps + t * channels, d, channels)
            values = load_channels(x + t * x_token, d, channels)
            keys = load_states(B + t * B_token, n, N)
            queries = load_states(C + t * C_token, n, N)
            state = tl.exp2(rates * step) * state + (step * values) * keys
            sums = tl.sum(state * queries, 0, keep_dims=True)
            if SKIP:
                sums += skips * values
            if GATE:
                z = load_channels(gate + t * gate_token, d, channels)
                sums *= z * sigmoid(z)
            tl.store(out + t * channels + d, sums.to(out.dtype.element_ty), mask=d < channels)
