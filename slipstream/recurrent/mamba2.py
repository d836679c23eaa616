"""Mamba2's scan (Dao and Gu 2024, arXiv 2405.21060), chunk by chunk, forward and backward by the kernels of
`kernels/mamba2_*.py`, or in plain PyTorch where they do not run.

Unlike Transformers' it keeps the documents of a packed row apart, and saves only its inputs for backward, which
computes the states again. One operator, opaque to torch.compile, so that a decoder layer compiles around it.

Dims: B rows, S tokens of a row, C chunks of L tokens, G groups, H heads, P head width, N state.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.kernels.mamba2_decay import Decay, chunked, make_decay
from slipstream.kernels.mamba2_outputs import outputs, value_grads
from slipstream.kernels.mamba2_pairs import pair_grads
from slipstream.kernels.mamba2_query_grads import key_grads, query_grads
from slipstream.kernels.mamba2_states import states, states_backward

_INPUTS = (
    "(Tensor x_BSHP, Tensor dt_BSH, Tensor A_H, Tensor B_BSGN, Tensor C_BSGN, Tensor? D_H, Tensor? dt_bias_H, "
    "Tensor? document_BS, int chunk_size, bool dt_softplus, float dt_low, float dt_high)"
)
_TENSORS = 7  # of them, have gradients


def mamba2_scan(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    chunk_size: int,
    D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    document_BS: Tensor | None = None,
) -> Tensor:
    """`y[t] = C[t] h[t] + D x[t]` with `h[t] = exp(A dt[t]) h[t-1] + dt[t] B[t] x[t]`; `[B, S, H, P]` in fp32.

    Kernels multiply in the dtype of x, B and C, and sum in fp32; plain PyTorch computes in fp32 throughout.

    Args:
        dt_BSH: step sizes, to which `dt_bias_H` is added, then softplus applied, then the limits.
        A_H: negative.
        chunk_size: of no effect on the result; what is computed at once may be less.
        document_BS: ids that never fall along a row; h starts at zero where the id changes. None: a row is one.

    Oracle: `mamba2_scan_reference`.
    """
    out_BSHP: Tensor = torch.ops.slipstream.mamba2_scan(
        x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, dt_bias_H, document_BS, chunk_size, dt_softplus,
        float(dt_limit[0]), float(dt_limit[1]),
    )  # fmt: skip
    return out_BSHP


def mamba2_scan_reference(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    chunk_size: int,
    D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    document_BS: Tensor | None = None,
) -> Tensor:
    """What `mamba2_scan` computes, token by token."""
    dt_BSH = _steps(dt_BSH, dt_bias_H, dt_softplus, *dt_limit)
    heads = x_BSHP.shape[2] // B_BSGN.shape[2]
    B_BSHN, C_BSHN = (tensor.repeat_interleave(heads, 2) for tensor in (B_BSGN, C_BSGN))
    state_BHPN = x_BSHP.new_zeros(*x_BSHP[:, 0].shape, B_BSGN.shape[3])
    outs = []
    for t in range(x_BSHP.shape[1]):
        decay_BH = torch.exp(A_H * dt_BSH[:, t])
        if document_BS is not None and t > 0:
            decay_BH = decay_BH * (document_BS[:, t] == document_BS[:, t - 1])[:, None]
        new_BHPN = (dt_BSH[:, t, :, None] * x_BSHP[:, t])[..., None] * B_BSHN[:, t, :, None]
        state_BHPN = decay_BH[..., None, None] * state_BHPN + new_BHPN
        out_BHP = (state_BHPN * C_BSHN[:, t, :, None]).sum(-1)
        outs.append(out_BHP if D_H is None else out_BHP + D_H[:, None] * x_BSHP[:, t])
    return torch.stack(outs, 1)


def _steps(dt: Tensor, bias: Tensor | None, softplus: bool, low: float, high: float) -> Tensor:
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return (F.softplus(dt) if softplus else dt).clamp(low, high)


def _steps_grad(grad: Tensor, dt: Tensor, bias: Tensor | None, softplus: bool, low: float, high: float) -> Tensor:
    """The gradient of `dt`, fp32, where `grad` is that of `_steps`."""
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    steps = F.softplus(dt) if softplus else dt
    grad = grad * ((steps >= low) & (steps <= high))
    return grad * torch.sigmoid(dt.float()) if softplus else grad


def _chunk(chunk_size: int) -> int:
    """What the kernels take at once: a power of two that a tile can hold."""
    return max(16, min(128, 1 << (chunk_size.bit_length() - 1)))


def _begins(
    x_BSHP: Tensor, steps_BSH: Tensor, A_H: Tensor, B_BSGN: Tensor, document_BS: Tensor | None, chunk_size: int
) -> tuple[Decay, Tensor]:
    """What forward begins with, and backward again, as neither is kept: the decay, and the state before each chunk."""
    decay = make_decay(steps_BSH, A_H, document_BS, _chunk(chunk_size))
    return decay, states(x_BSHP, B_BSGN, decay.to_end_BHCL * decay.steps_BHCL, decay.carry_BHC)


# Defined by hand as in moe/grouped_mlp.py.
torch.library.define("slipstream::mamba2_scan", f"{_INPUTS} -> Tensor")
torch.library.define("slipstream::mamba2_scan_backward", f"(Tensor grad_BSHP, {_INPUTS[1:]} -> Tensor[]")


@torch.library.impl("slipstream::mamba2_scan", "default")
def _forward(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    document_BS: Tensor | None,
    chunk_size: int,
    dt_softplus: bool,
    dt_low: float,
    dt_high: float,
) -> Tensor:
    steps_BSH = _steps(dt_BSH, dt_bias_H, dt_softplus, dt_low, dt_high).float()
    decay, begins_BHCPN = _begins(x_BSHP, steps_BSH, A_H, B_BSGN, document_BS, chunk_size)
    return outputs(C_BSGN, B_BSGN, x_BSHP, begins_BHCPN, decay, D_H)


@torch.library.register_fake("slipstream::mamba2_scan")
def _(x_BSHP: Tensor, *_: Any) -> Tensor:
    return x_BSHP.new_empty(x_BSHP.shape, dtype=torch.float32)


@torch.library.impl("slipstream::mamba2_scan_backward", "default")
def _backward(
    grad_BSHP: Tensor,
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    document_BS: Tensor | None,
    chunk_size: int,
    dt_softplus: bool,
    dt_low: float,
    dt_high: float,
) -> list[Tensor]:
    """The gradients of the first seven inputs, but for those that are None; `grad_BSHP` in the dtype of x."""
    settings = dt_softplus, dt_low, dt_high
    length = x_BSHP.shape[1]
    steps_BSH = _steps(dt_BSH, dt_bias_H, *settings).float()
    decay, begins_BHCPN = _begins(x_BSHP, steps_BSH, A_H, B_BSGN, document_BS, chunk_size)
    ends_BHCPN, products_BHC = states_backward(grad_BSHP, C_BSGN, decay.into_BHCL, decay.carry_BHC, begins_BHCPN)
    grad_x, own_BHCL = value_grads(C_BSGN, B_BSGN, x_BSHP, grad_BSHP, ends_BHCPN, decay, D_H)
    pairs_BCGLL, rows_BHCL, columns_BHCL = pair_grads(C_BSGN, B_BSGN, x_BSHP, grad_BSHP, decay)
    grad_C, into_BHCL = query_grads(C_BSGN, B_BSGN, grad_BSHP, begins_BHCPN, pairs_BCGLL, decay)
    grad_B, to_end_BHCL = key_grads(C_BSGN, B_BSGN, x_BSHP, ends_BHCPN, pairs_BCGLL, decay)

    # What passes from token j to token i or to the end decays by exp(sum[i] - sum[j]): the gradient of that exponent
    # goes to the one with + and to the other with -.
    passed_BHCL = columns_BHCL + to_end_BHCL
    weighted_BHCL = passed_BHCL * decay.steps_BHCL
    grad_sums_BHCL = rows_BHCL + into_BHCL - weighted_BHCL
    grad_sums_BHCL[..., -1] += (to_end_BHCL * decay.steps_BHCL).sum(-1) + products_BHC * decay.carry_BHC
    grad_a_BHCL = grad_sums_BHCL.flip(-1).cumsum(-1, dtype=torch.float64).flip(-1).float()
    # Of itself a token sees x[i] dt[i] (B[i] . C[i]), whatever decays.
    scores_BSG = (B_BSGN.float() * C_BSGN.float()).sum(-1)
    scores_BHCL = chunked(scores_BSG, decay.steps_BHCL.shape[-1]).permute(0, 3, 1, 2)
    scores_BHCL = scores_BHCL.repeat_interleave(x_BSHP.shape[2] // B_BSGN.shape[2], 1)
    grad_steps_BHCL = passed_BHCL + own_BHCL * scores_BHCL + A_H.float()[:, None, None] * grad_a_BHCL
    grad_A = (grad_a_BHCL * decay.steps_BHCL).sum((0, 2, 3))
    grad_dt = _steps_grad(grad_steps_BHCL.flatten(2)[..., :length].mT, dt_BSH, dt_bias_H, *settings)
    grads = [grad_x, grad_dt.to(dt_BSH.dtype).contiguous(), grad_A.to(A_H.dtype), grad_B, grad_C]
    if D_H is not None:
        grads.append(own_BHCL.sum((0, 2, 3)).to(D_H.dtype))
    if dt_bias_H is not None:
        grads.append(grad_dt.sum((0, 1)).to(dt_bias_H.dtype))
    return grads


@torch.library.register_fake("slipstream::mamba2_scan_backward")
def _(grad_BSHP: Tensor, *inputs: Any) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in inputs[:_TENSORS] if tensor is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[: _TENSORS + 1])
    ctx.settings = inputs[_TENSORS + 1 :]


def _autograd(ctx: Any, grad_BSHP: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    # Here rather than in the operator: torch.compile makes the rounding part of what computes the gradient.
    grad_BSHP = grad_BSHP.to(tensors[0].dtype)
    found = iter(torch.ops.slipstream.mamba2_scan_backward(grad_BSHP, *tensors, *ctx.settings))
    grads = [None if tensor is None else next(found) for tensor in tensors[:_TENSORS]]
    return *grads, *[None] * (1 + len(ctx.settings))


torch.library.register_autograd("slipstream::mamba2_scan", _autograd, setup_context=_save)
