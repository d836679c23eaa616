"""Mamba1's selective scan (Gu and Dao 2023, arXiv 2312.00752), forward and backward by the kernels of
`kernels/selective_scan_*.py`, or token by token in plain PyTorch where they do not run.

Saves only its inputs for backward, which computes the states again. One operator, opaque to torch.compile, so that a
decoder layer compiles around it.

Dims: B rows, S tokens of a row, D channels, N states of a channel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.kernels.selective_scan_grads import grads
from slipstream.kernels.selective_scan_outputs import outputs
from slipstream.kernels.selective_scan_states import states, states_backward

_INPUTS = (
    "(Tensor x_BSD, Tensor dt_BSD, Tensor A_DN, Tensor B_BSN, Tensor C_BSN, Tensor? D_D, Tensor? z_BSD, "
    "Tensor? dt_bias_D, bool dt_softplus)"
)
CHUNK = 64  # tokens that a program walks along


def selective_scan(
    x_BSD: Tensor,
    dt_BSD: Tensor,
    A_DN: Tensor,
    B_BSN: Tensor,
    C_BSN: Tensor,
    D_D: Tensor | None = None,
    z_BSD: Tensor | None = None,
    dt_bias_D: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`y[t] = (C[t] h[t] + D x[t]) silu(z[t])` with `h[t] = exp(A dt[t]) h[t-1] + dt[t] x[t] B[t]` for each channel;
    `[B, S, D]` in the dtype of x, computed in fp32.

    Args:
        dt_BSD: step sizes, to which `dt_bias_D` is added, then softplus applied.
        A_DN: negative.

    Read where they lie if neighbouring channels (of B and C: states) are neighbours in memory, else copied.
    Oracle: `selective_scan_reference`.
    """
    out_BSD: Tensor = torch.ops.slipstream.selective_scan(
        x_BSD, dt_BSD, A_DN, B_BSN, C_BSN, D_D, z_BSD, dt_bias_D, dt_softplus
    )
    return out_BSD


def channels_first(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **kwargs: Any) -> Tensor:
    """`selective_scan` as Transformers' layers call theirs: tensors `[B, D, S]` and `[B, N, S]`, returned alike."""
    z = kwargs.get("z")
    return selective_scan(
        x.mT, dt.mT, A, B.mT, C.mT, kwargs.get("D"), None if z is None else z.mT, kwargs.get("delta_bias"),
        kwargs.get("delta_softplus", False),
    ).mT  # fmt: skip


def selective_scan_reference(
    x_BSD: Tensor,
    dt_BSD: Tensor,
    A_DN: Tensor,
    B_BSN: Tensor,
    C_BSN: Tensor,
    D_D: Tensor | None = None,
    z_BSD: Tensor | None = None,
    dt_bias_D: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """What `selective_scan` computes, token by token, in the dtypes that its inputs have."""
    dt_BSD = dt_BSD if dt_bias_D is None else dt_BSD + dt_bias_D
    dt_BSD = F.softplus(dt_BSD) if dt_softplus else dt_BSD
    state_BDN, outs = x_BSD.new_zeros(x_BSD.shape[0], *A_DN.shape), []
    for t in range(x_BSD.shape[1]):
        step_BD1 = dt_BSD[:, t, :, None]
        state_BDN = torch.exp(step_BD1 * A_DN) * state_BDN + step_BD1 * x_BSD[:, t, :, None] * B_BSN[:, t, None]
        outs.append((state_BDN * C_BSN[:, t, None]).sum(-1))
    out_BSD = torch.stack(outs, 1)
    out_BSD = out_BSD if D_D is None else out_BSD + D_D * x_BSD
    return out_BSD if z_BSD is None else out_BSD * F.silu(z_BSD)


# Defined by hand as in moe/grouped_mlp.py.
torch.library.define("slipstream::selective_scan", f"{_INPUTS} -> Tensor")
torch.library.define("slipstream::selective_scan_backward", f"(Tensor grad_BSD, {_INPUTS[1:]} -> Tensor[]")


@torch.library.impl("slipstream::selective_scan", "default")
def _forward(
    x_BSD: Tensor,
    dt_BSD: Tensor,
    A_DN: Tensor,
    B_BSN: Tensor,
    C_BSN: Tensor,
    D_D: Tensor | None,
    z_BSD: Tensor | None,
    dt_bias_D: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    A = A_DN.float().contiguous()
    begins_BCND, _, steps_BSD = states(x_BSD, dt_BSD, A, B_BSN, dt_bias_D, dt_softplus, CHUNK)
    return outputs(x_BSD, steps_BSD, A, B_BSN, C_BSN, D_D, z_BSD, begins_BCND, CHUNK).contiguous()


@torch.library.register_fake("slipstream::selective_scan")
def _(x_BSD: Tensor, *_: Any) -> Tensor:
    return x_BSD.new_empty(x_BSD.shape)


@torch.library.impl("slipstream::selective_scan_backward", "default")
def _backward(
    grad_BSD: Tensor,
    x_BSD: Tensor,
    dt_BSD: Tensor,
    A_DN: Tensor,
    B_BSN: Tensor,
    C_BSN: Tensor,
    D_D: Tensor | None,
    z_BSD: Tensor | None,
    dt_bias_D: Tensor | None,
    dt_softplus: bool,
) -> list[Tensor]:
    """The gradients of the inputs, but for those that are None."""
    A = A_DN.float().contiguous()
    begins = states(x_BSD, dt_BSD, A, B_BSN, dt_bias_D, dt_softplus, CHUNK)
    ends_BCND = states_backward(grad_BSD, z_BSD, begins[2], A, C_BSN, begins[1], CHUNK)
    found = grads(grad_BSD, x_BSD, dt_BSD, A, B_BSN, C_BSN, D_D, z_BSD, dt_softplus, begins, ends_BCND, CHUNK)
    inputs = (x_BSD, dt_BSD, A_DN, B_BSN, C_BSN, D_D, z_BSD, dt_bias_D)
    given = [(grad, tensor.dtype) for grad, tensor in zip(found, inputs, strict=True) if tensor is not None]
    return [grad.to(dtype).contiguous() for grad, dtype in given]


@torch.library.register_fake("slipstream::selective_scan_backward")
def _(grad_BSD: Tensor, *inputs: Any) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in inputs[:-1] if tensor is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.dt_softplus = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    found = iter(torch.ops.slipstream.selective_scan_backward(grad_BSD, *tensors, ctx.dt_softplus))
    return *[None if tensor is None else next(found) for tensor in tensors], None


torch.library.register_autograd("slipstream::selective_scan", _autograd, setup_context=_save)
