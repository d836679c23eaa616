"""The gradients of Mamba1's selective scan from the states before its chunks and their gradients behind them.

Two kernels, each along one chunk in a block of channels, all chunks side by side: one goes forward with the states h
and gives what needs these (the gradients of C and z), one goes back with their gradients G (those of B, x and dt).

The gradient of a decay's exponent is `g[t] = G[t] exp(A dt[t]) h[t-1]`, of both at the same token. But as
`G[t] h[t] = g[t+1] + C[t] h[t] grad[t] = g[t] + G[t] B[t] dt[t] x[t]`, it is a sum, from the chunk's end on, of terms
with one of the two each: `g[t] = g[t+1] + C[t] h[t] grad[t] - G[t] B[t] dt[t] x[t]`. So no token's state is kept.

Dims: `selective_scan_states.py`; G blocks of channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from slipstream.kernels import HAS_TRITON
from slipstream.kernels.selective_scan_states import rows_of, takes


class Grads(NamedTuple):
    """Those of x, z and dt in the dtypes of these, the others in fp32; that of z is empty without one."""

    x_BSD: Tensor
    dt_BSD: Tensor
    A_DN: Tensor
    B_BSN: Tensor
    C_BSN: Tensor
    D_D: Tensor
    z_BSD: Tensor
    bias_D: Tensor


def grads(
    grad_BSD: Tensor,
    x_BSD: Tensor,
    dt_BSD: Tensor,
    A_DN: Tensor,
    B_BSN: Tensor,
    C_BSN: Tensor,
    D_D: Tensor | None,
    z_BSD: Tensor | None,
    softplus: bool,
    begins: tuple[Tensor, Tensor, Tensor],
    ends_BCND: Tensor,
    chunk: int,
) -> Grads:
    """Where `grad_BSD` is the gradient of `outputs`, `begins` what `states` gave, whose first tensor is overwritten,
    and `ends_BCND` what `states_backward` gave."""
    states_BCND, totals_BCD, steps_BSD = begins
    if not takes(A_DN, grad_BSD, x_BSD, dt_BSD, B_BSN, C_BSN, z_BSD):
        return grads_reference(
            grad_BSD, x_BSD, dt_BSD, A_DN, B_BSN, C_BSN, D_D, z_BSD, softplus, begins, ends_BCND, chunk
        )
    rows, length, channels = x_BSD.shape
    state, chunks = A_DN.shape[1], states_BCND.shape[1]
    block, block_n, warps = _tile(state)
    grid = (-(-channels // block), chunks, rows)
    grad, *grad_strides = rows_of(grad_BSD)
    x, *x_strides = rows_of(x_BSD)
    z, *z_strides = rows_of(x_BSD if z_BSD is None else z_BSD)
    B, *B_strides = rows_of(B_BSN)
    C, *C_strides = rows_of(C_BSN)
    skip = A_DN if D_D is None else D_D
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_dt = torch.empty(x.shape, dtype=dt_BSD.dtype, device=x.device)
    grad_z = torch.empty((0,) if z_BSD is None else x.shape, dtype=z.dtype, device=x.device)
    grad_B, grad_C = (steps_BSD.new_empty(grid[0], rows, length, state) for _ in range(2))
    grad_D, grad_bias, behind = (torch.empty_like(totals_BCD) for _ in range(3))
    asked = torch.empty_like(steps_BSD)
    strides = *grad_strides, *x_strides, *B_strides, *C_strides, *z_strides
    settings = {"N": state, "CHUNK": chunk, "BLOCK": block, "BLOCK_N": block_n, "SKIP": D_D is not None,
                "GATE": z_BSD is not None, "num_warps": warps}  # fmt: skip
    with torch.cuda.device_of(x):
        _selective_query_grads_kernel[grid](
            grad, x, steps_BSD, A_DN, B, C, skip, z, states_BCND, ends_BCND, grad_C, grad_z, asked, behind,
            length, channels, *strides, **settings,
        )  # fmt: skip
        _selective_key_grads_kernel[grid](
            grad, x, steps_BSD, A_DN, B, C, skip, z, states_BCND, ends_BCND, totals_BCD, asked, behind,
            grad_x, grad_dt, grad_B, grad_D, grad_bias, length, channels, *strides, **settings, SOFTPLUS=softplus,
        )  # fmt: skip
    return Grads(
        grad_x, grad_dt, states_BCND.sum((0, 1)).mT.contiguous(), grad_B.sum(0), grad_C.sum(0), grad_D.sum((0, 1)),
        grad_z, grad_bias.sum((0, 1)),
    )  # fmt: skip


def grads_reference(
    grad_BSD: Tensor,
    x_BSD: Tensor,
    dt_BSD: Tensor,
    A_DN: Tensor,
    B_BSN: Tensor,
    C_BSN: Tensor,
    D_D: Tensor | None,
    z_BSD: Tensor | None,
    softplus: bool,
    begins: tuple[Tensor, Tensor, Tensor],
    ends_BCND: Tensor,
    chunk: int,
) -> Grads:
    """What `grads` computes, by the states of all tokens."""
    states_BCND, _, steps_BSD = begins
    length, A_ND = x_BSD.shape[1], A_DN.mT
    grad, x, B, C = (tensor.float() for tensor in (grad_BSD, x_BSD, B_BSN, C_BSN))
    D = torch.zeros_like(A_ND[0]) if D_D is None else D_D.float()
    z = None if z_BSD is None else z_BSD.float()
    gated = grad if z is None else grad * z * z.sigmoid()
    before, y = [], torch.empty_like(x)
    state_BND, passed_BND = states_BCND[:, 0], ends_BCND[:, -1]
    for t in range(length):
        state_BND = states_BCND[:, t // chunk] if t % chunk == 0 else state_BND
        before.append(state_BND)
        state_BND = torch.exp(steps_BSD[:, t, None] * A_ND) * state_BND
        state_BND = state_BND + (steps_BSD[:, t] * x[:, t])[:, None] * B[:, t, :, None]
        y[:, t] = (state_BND * C[:, t, :, None]).sum(1) + D * x[:, t]
    grad_x, grad_steps, grad_B, grad_C = (torch.empty_like(tensor) for tensor in (x, x, B, C))
    grad_A = torch.zeros_like(A_ND)
    for t in reversed(range(length)):
        ends = (t + 1) % chunk == 0 or t + 1 == length
        passed_BND = ends_BCND[:, t // chunk] if ends else passed_BND
        step, x_t = steps_BSD[:, t, None], x[:, t, None]
        decay_BND = torch.exp(step * A_ND)
        kept_BND = decay_BND * before[t]
        passed_BND = passed_BND + gated[:, t, None] * C[:, t, :, None]
        grad_C[:, t] = (gated[:, t, None] * (kept_BND + step * x_t * B[:, t, :, None])).sum(2)
        grad_B[:, t] = (step * x_t * passed_BND).sum(2)
        into_BD = (passed_BND * B[:, t, :, None]).sum(1)
        grad_x[:, t] = steps_BSD[:, t] * into_BD + D * gated[:, t]
        grad_steps[:, t] = x[:, t] * into_BD + (passed_BND * kept_BND * A_ND).sum(1)
        grad_A += (step * passed_BND * kept_BND).sum(0)
        passed_BND = decay_BND * passed_BND
    grad_steps = grad_steps * -torch.expm1(-steps_BSD) if softplus else grad_steps
    grad_z = x.new_empty(0)
    if z_BSD is not None and z is not None:
        grad_z = (grad * y * z.sigmoid() * (1 + z * (1 - z.sigmoid()))).to(z_BSD.dtype)
    return Grads(
        grad_x.to(x_BSD.dtype), grad_steps.to(dt_BSD.dtype), grad_A.mT.contiguous(), grad_B, grad_C,
        (gated * x).sum((0, 1)), grad_z, grad_steps.sum((0, 1)),
    )  # fmt: skip


def _tile(state: int) -> tuple[int, int, int]:
    """Channels and states of a tile, the latter all, and warps: one, where sums over channels need not pass between."""
    padded = 1 << (state - 1).bit_length()
    return 32, padded, max(1, min(8, padded // 16))


if HAS_TRITON:
    import triton
    import triton.language as tl

    from slipstream.kernels.selective_scan_states import load_channels, load_states, rates_of, sigmoid

    LN_2 = tl.constexpr(0.6931471805599453)

    @triton.jit
    def _slope(step):
        """The derivative of `step = softplus(dt)`, of small ones all digits."""
        small = step * (1 - step * (0.5 - step * (0.16666667 - step * 0.041666667)))
        return tl.where(step < 0.03, small, 1 - tl.exp(-step))

    @triton.jit
    def _selective_query_grads_kernel(
        grad,
        x,
        steps,
        A,
        B,
        C,
        skip,
        gate,
        states,
        ends,
        grad_C,
        grad_gate,
        asked,
        behind,
        length,
        channels,
        grad_row,
        grad_token,
        x_row,
        x_token,
        B_row,
        B_token,
        C_row,
        C_token,
        gate_row,
        gate_token,
        N: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_N: tl.constexpr,
        SKIP: tl.constexpr,
        GATE: tl.constexpr,
    ):
        chunk, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        start = chunk * CHUNK
        grad += row * grad_row + start * grad_token
        x += row * x_row + start * x_token
        gate += row * gate_row + start * gate_token
        B += row * B_row + start * B_token
        C += row * C_row + start * C_token
        first = row * length + start
        steps += first * channels
        grad_gate += first * channels
        asked += first * channels
        grad_C += (tl.program_id(0) * tl.num_programs(2).to(tl.int64) * length + first) * N
        d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
        n = tl.arange(0, BLOCK_N)[:, None]
        rates = rates_of(A, d, n, channels, N)
        if SKIP:
            skips = load_channels(skip, d, channels)
        at = row * tl.num_programs(1) + chunk
        inside = (d < channels) & (n < N)
        piece = at * N * channels + n * channels + d
        state = tl.load(states + piece, mask=inside, other=0.0)
        total = tl.zeros((1, BLOCK), tl.float32)
        grad_A = tl.zeros((BLOCK_N, BLOCK), tl.float32)
        for t in range(tl.minimum(length - start, CHUNK).to(tl.int32)):
            step = load_channels(steps + t * channels, d, channels)
            values = load_channels(x + t * x_token, d, channels)
            grads = load_channels(grad + t * grad_token, d, channels)
            keys = load_states(B + t * B_token, n, N)
            queries = load_states(C + t * C_token, n, N)
            state = tl.exp2(rates * step) * state + (step * values) * keys
            terms = state * queries
            if GATE:
                y = tl.sum(terms, 0, keep_dims=True)
                if SKIP:
                    y += skips * values
                z = load_channels(gate + t * gate_token, d, channels)
                part = sigmoid(z)
                grad_z = grads * y * part * (1 + z * (1 - part))
                tl.store(grad_gate + t * channels + d, grad_z.to(grad_gate.dtype.element_ty), mask=d < channels)
                grads *= z * part
            tl.store(grad_C + t * N + n, tl.sum(state * grads, 1, keep_dims=True), mask=n < N)
            total += step
            terms *= grads
            grad_A += total * terms
            tl.store(asked + t * channels + d, tl.sum(terms * rates, 0, keep_dims=True) * LN_2, mask=d < channels)
        terms = tl.load(ends + piece, mask=inside, other=0.0) * state  # g behind the chunk
        tl.store(behind + at * channels + d, tl.sum(terms * rates, 0, keep_dims=True) * LN_2, mask=d < channels)
        tl.store(states + piece, grad_A + total * terms, mask=inside)

    @triton.jit
    def _selective_key_grads_kernel(
        grad,
        x,
        steps,
        A,
        B,
        C,
        skip,
        gate,
        grad_A,
        ends,
        totals,
        asked,
        behind,
        grad_x,
        grad_dt,
        grad_B,
        grad_skip,
        grad_bias,
        length,
        channels,
        grad_row,
        grad_token,
        x_row,
        x_token,
        B_row,
        B_token,
        C_row,
        C_token,
        gate_row,
        gate_token,
        N: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_N: tl.constexpr,
        SKIP: tl.constexpr,
        GATE: tl.constexpr,
        SOFTPLUS: tl.constexpr,
    ):
        chunk, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        start = chunk * CHUNK
        grad += row * grad_row + start * grad_token
        x += row * x_row + start * x_token
        gate += row * gate_row + start * gate_token
        B += row * B_row + start * B_token
        C += row * C_row + start * C_token
        first = row * length + start
        steps += first * channels
        asked += first * channels
        grad_x += first * channels
        grad_dt += first * channels
        grad_B += (tl.program_id(0) * tl.num_programs(2).to(tl.int64) * length + first) * N
        d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
        n = tl.arange(0, BLOCK_N)[:, None]
        rates = rates_of(A, d, n, channels, N)
        if SKIP:
            skips = load_channels(skip, d, channels)
        at = row * tl.num_programs(1) + chunk
        inside = (d < channels) & (n < N)
        piece = at * N * channels + n * channels + d
        passed = tl.load(ends + piece, mask=inside, other=0.0)
        total = load_channels(totals + at * channels, d, channels)
        exponents = load_channels(behind + at * channels, d, channels)
        sum_skip = tl.zeros((1, BLOCK), tl.float32)
        sum_bias = tl.zeros((1, BLOCK), tl.float32)
        sum_A = tl.zeros((BLOCK_N, BLOCK), tl.float32)
        tokens = tl.minimum(length - start, CHUNK).to(tl.int32)
        for i in range(tokens):
            t = tokens - 1 - i
            step = load_channels(steps + t * channels, d, channels)
            values = load_channels(x + t * x_token, d, channels)
            grads = load_channels(grad + t * grad_token, d, channels)
            keys = load_states(B + t * B_token, n, N)
            queries = load_states(C + t * C_token, n, N)
            if GATE:
                z = load_channels(gate + t * gate_token, d, channels)
                grads *= z * sigmoid(z)
            passed += grads * queries
            new = step * values
            tl.store(grad_B + t * N + n, tl.sum(passed * new, 1, keep_dims=True), mask=n < N)
            terms = passed * keys
            into = tl.sum(terms, 0, keep_dims=True)
            grad_values = step * into
            if SKIP:
                grad_values += skips * grads
                sum_skip += grads * values
            tl.store(grad_x + t * channels + d, grad_values.to(grad_x.dtype.element_ty), mask=d < channels)
            terms *= new
            sum_A += total * terms
            total -= step
            exponents += (
                load_channels(asked + t * channels, d, channels) - tl.sum(terms * rates, 0, keep_dims=True) * LN_2
            )
            grad_step = values * into + exponents
            if SOFTPLUS:
                grad_step *= _slope(step)
            sum_bias += grad_step
            tl.store(grad_dt + t * channels + d, grad_step.to(grad_dt.dtype.element_ty), mask=d < channels)
            passed *= tl.exp2(rates * step)
        tl.store(grad_A + piece, tl.load(grad_A + piece, mask=inside, other=0.0) - sum_A, mask=inside)
        tl.store(grad_skip + at * channels + d, sum_skip, mask=d < channels)
        tl.store(grad_bias + at * channels + d, sum_bias, mask=d < channels)
