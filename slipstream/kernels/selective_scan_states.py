"""The state before each chunk of Mamba1's selective scan, and in reverse the gradient of the state after it.

Every channel and state decays in its own way (Gu and Dao 2023, arXiv 2312.00752), so there are no products of matrices
as in Mamba2's: `h[t] = exp(A dt[t]) h[t-1] + dt[t] x[t] B[t]`, token by token. A program walks along one chunk in a
block of channels, all chunks side by side, each from a state of zero; a second kernel then carries the states from
chunk to chunk. The same with the time reversed, `C[t]` for B and the outputs' gradient for `dt x`, gives the state's
gradient.

A thread has a channel and up to 16 of its states.

Dims: B rows, S tokens of a row, C chunks of L tokens, D channels, N states of a channel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.kernels import HAS_TRITON, runs_on

WIDEST = 128  # states of a channel that the kernels take
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def states(
    x_BSD: Tensor, dt_BSD: Tensor, A_DN: Tensor, B_BSN: Tensor, bias_D: Tensor | None, softplus: bool, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The state before each chunk, `[B, C, N, D]`; the sum of the steps of each chunk, `[B, C, D]`; and the steps
    `dt + bias`, after softplus where asked for, `[B, S, D]`. All in fp32; `A_DN` is fp32 and contiguous."""
    if not takes(A_DN, x_BSD, dt_BSD, B_BSN):
        return states_reference(x_BSD, dt_BSD, A_DN, B_BSN, bias_D, softplus, chunk)
    totals = _totals(x_BSD, chunk)
    steps = torch.empty(x_BSD.shape, dtype=torch.float32, device=x_BSD.device)
    return _launch(x_BSD, None, dt_BSD, A_DN, B_BSN, bias_D, softplus, chunk, totals, steps), totals, steps


def states_backward(
    grad_BSD: Tensor,
    z_BSD: Tensor | None,
    steps_BSD: Tensor,
    A_DN: Tensor,
    C_BSN: Tensor,
    totals_BCD: Tensor,
    chunk: int,
) -> Tensor:
    """The gradient of the state after each chunk, fp32 `[B, C, N, D]`, from that of the outputs, which `silu(z)` has
    gated, and what `states` gave."""
    if not takes(A_DN, grad_BSD, steps_BSD, C_BSN, z_BSD):
        return states_backward_reference(grad_BSD, z_BSD, steps_BSD, A_DN, C_BSN, chunk)
    return _launch(grad_BSD, z_BSD, steps_BSD, A_DN, C_BSN, None, False, chunk, totals_BCD, None)


def states_reference(
    x_BSD: Tensor, dt_BSD: Tensor, A_DN: Tensor, B_BSN: Tensor, bias_D: Tensor | None, softplus: bool, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What `states` computes."""
    steps_BSD = dt_BSD.float() if bias_D is None else dt_BSD.float() + bias_D.float()
    steps_BSD = F.softplus(steps_BSD) if softplus else steps_BSD
    found, state_BND = [], A_DN.new_zeros(x_BSD.shape[0], *A_DN.mT.shape)
    for t in range(x_BSD.shape[1]):
        if t % chunk == 0:
            found.append(state_BND)
        step_B1D, x_B1D = steps_BSD[:, t, None], x_BSD[:, t, None].float()
        state_BND = torch.exp(step_B1D * A_DN.mT) * state_BND + step_B1D * x_B1D * B_BSN[:, t, :, None].float()
    padded = F.pad(steps_BSD, (0, 0, 0, -x_BSD.shape[1] % chunk))
    return torch.stack(found, 1), padded.unflatten(1, (-1, chunk)).sum(2), steps_BSD


def states_backward_reference(
    grad_BSD: Tensor, z_BSD: Tensor | None, steps_BSD: Tensor, A_DN: Tensor, C_BSN: Tensor, chunk: int
) -> Tensor:
    """What `states_backward` computes."""
    grad_BSD = grad_BSD.float() if z_BSD is None else grad_BSD.float() * F.silu(z_BSD.float())
    found, state_BND = [], A_DN.new_zeros(grad_BSD.shape[0], *A_DN.mT.shape)
    for t in reversed(range(grad_BSD.shape[1])):
        if (t + 1) % chunk == 0 or t + 1 == grad_BSD.shape[1]:
            found.append(state_BND)
        state_BND = state_BND + grad_BSD[:, t, None] * C_BSN[:, t, :, None].float()
        state_BND = torch.exp(steps_BSD[:, t, None] * A_DN.mT) * state_BND
    return torch.stack(found[::-1], 1)


def takes(A_DN: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels run for such tensors rather than their references."""
    given = [tensor for tensor in others if tensor is not None]
    return runs_on(A_DN) and A_DN.shape[1] <= WIDEST and all(tensor.dtype in _DTYPES for tensor in (A_DN, *given))


def rows_of(tensor: Tensor) -> tuple[Tensor, int, int]:
    """`[B, S, width]` as a kernel reads it, copied where its last dim has gaps, and its other strides."""
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return tensor, tensor.stride(0), tensor.stride(1)


def tile(state: int) -> tuple[int, int, int]:
    """Channels and states of a tile, the latter all, and warps."""
    padded = 1 << (state - 1).bit_length()
    return max(32, min(128, 2048 // padded)), padded, 4


def _totals(x_BSD: Tensor, chunk: int) -> Tensor:
    rows, length, channels = x_BSD.shape
    return torch.empty(rows, -(-length // chunk), channels, dtype=torch.float32, device=x_BSD.device)


def _launch(
    value_BSD: Tensor,
    z_BSD: Tensor | None,
    dt_BSD: Tensor,
    A_DN: Tensor,
    key_BSN: Tensor,
    bias_D: Tensor | None,
    softplus: bool,
    chunk: int,
    totals_BCD: Tensor,
    steps_BSD: Tensor | None,
) -> Tensor:
    """`steps_BSD` is there to be written, `totals_BCD` with it; in reverse it is not."""
    rows, length, channels = value_BSD.shape
    state, chunks = A_DN.shape[1], totals_BCD.shape[1]
    value, *value_strides = rows_of(value_BSD)
    gate, *gate_strides = rows_of(value_BSD if z_BSD is None else z_BSD)
    dt, *dt_strides = rows_of(dt_BSD)
    key, *key_strides = rows_of(key_BSN)
    block, block_n, warps = tile(state)
    reverse = steps_BSD is None
    out = torch.empty(rows, chunks, state, channels, dtype=torch.float32, device=value.device)
    with torch.cuda.device_of(value):
        _selective_states_kernel[(-(-channels // block), chunks, rows)](
            value, gate, dt, key, A_DN, A_DN if bias_D is None else bias_D, out, totals_BCD,
            out if steps_BSD is None else steps_BSD, length, channels,
            *value_strides, *gate_strides, *dt_strides, *key_strides,
            N=state, CHUNK=chunk, BLOCK=block, BLOCK_N=block_n, REVERSE=reverse, GATE=z_BSD is not None,
            BIAS=bias_D is not None, SOFTPLUS=softplus, num_warps=warps,
        )  # fmt: skip
        _selective_carry_kernel[(-(-channels * state // 128), rows)](
            A_DN, totals_BCD, out, channels, chunks, N=state, BLOCK=128, REVERSE=reverse, num_warps=4
        )
    return out


if HAS_TRITON:
    import triton
    import triton.language as tl

    LOG2_E = tl.constexpr(1.4426950408889634)

    @triton.jit
    def step_of(dt, SOFTPLUS: tl.constexpr):
        """softplus(dt), of small ones all digits."""
        if SOFTPLUS:
            e = tl.exp(tl.minimum(dt, 20.0))
            small = e * (1 - e * (0.5 - e * (0.33333333 - 0.25 * e)))
            dt = tl.where(dt > 20.0, dt, tl.where(e < 0.03, small, tl.log(1 + e)))
        return dt

    @triton.jit
    def sigmoid(z):
        return 1 / (1 + tl.exp(-z))

    @triton.jit
    def rates_of(A, d, n, channels, N: tl.constexpr):
        """`A log2(e)` as a tile: a state decays by 2 to the power of that times a step."""
        inside = (d < channels) & (n < N)
        return tl.load(A + d * N + n, mask=inside, other=0.0) * LOG2_E

    @triton.jit
    def load_channels(start, d, channels):
        """One token of `[S, D]` in fp32; zeros from the last channel on."""
        return tl.load(start + d, mask=d < channels, other=0.0).to(tl.float32)

    @triton.jit
    def load_states(start, n, N: tl.constexpr):
        """One token of `[S, N]` in fp32; zeros from the last state on."""
        return tl.load(start + n, mask=n < N, other=0.0).to(tl.float32)

    @triton.jit
    def _selective_states_kernel(
        value,
        gate,
        dt,
        key,
        A,
        bias,
        out,
        totals,
        steps,
        length,
        channels,
        value_row,
        value_token,
        gate_row,
        gate_token,
        dt_row,
        dt_token,
        key_row,
        key_token,
        N: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_N: tl.constexpr,
        REVERSE: tl.constexpr,
        GATE: tl.constexpr,
        BIAS: tl.constexpr,
        SOFTPLUS: tl.constexpr,
    ):
        chunk, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        start = chunk * CHUNK
        value += row * value_row + start * value_token
        gate += row * gate_row + start * gate_token
        dt += row * dt_row + start * dt_token
        key += row * key_row + start * key_token
        steps += (row * length + start) * channels
        d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
        n = tl.arange(0, BLOCK_N)[:, None]
        rates = rates_of(A, d, n, channels, N)
        if BIAS:
            biases = load_channels(bias, d, channels)
        total = tl.zeros((1, BLOCK), tl.float32)
        state = tl.zeros((BLOCK_N, BLOCK), tl.float32)
        tokens = tl.minimum(length - start, CHUNK).to(tl.int32)
        for i in range(tokens):
            t = tokens - 1 - i if REVERSE else i
            step = load_channels(dt + t * dt_token, d, channels)
            values = load_channels(value + t * value_token, d, channels)
            keys = load_states(key + t * key_token, n, N)
            if BIAS:
                step += biases
            step = step_of(step, SOFTPLUS)
            if GATE:
                z = load_channels(gate + t * gate_token, d, channels)
                values *= z * sigmoid(z)
            if REVERSE:
                state = tl.exp2(rates * step) * (state + values * keys)
            else:
                state = tl.exp2(rates * step) * state + (step * values) * keys
                tl.store(steps + t * channels + d, step, mask=d < channels)
                total += step
        at = row * tl.num_programs(1) + chunk
        if not REVERSE:
            tl.store(totals + at * channels + d, total, mask=d < channels)
        tl.store(out + at * N * channels + n * channels + d, state, mask=(d < channels) & (n < N))

    @triton.jit
    def _selective_carry_kernel(
        A,
        totals,
        states,
        channels,
        chunks,
        N: tl.constexpr,
        BLOCK: tl.constexpr,
        REVERSE: tl.constexpr,
    ):
        """From what each chunk leaves of itself, in place, to what comes to it from the chunks before."""
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        row = tl.program_id(1).to(tl.int64)
        inside = i < N * channels
        n, d = i // channels, i % channels
        rates = tl.load(A + d * N + n, mask=inside, other=0.0) * LOG2_E
        state = tl.zeros((BLOCK,), tl.float32)
        for step in range(chunks):
            at = row * chunks + (chunks - 1 - step if REVERSE else step)
            left = tl.load(states + at * N * channels + i, mask=inside, other=0.0)
            total = tl.load(totals + at * channels + d, mask=inside, other=0.0)
            tl.store(states + at * N * channels + i, state, mask=inside)
            state = tl.exp2(rates * total) * state + left
