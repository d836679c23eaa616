"""Linear recurrences with a decay for each token and channel, and the two layers that Transformers loops over tokens
for: RecurrentGemma's RG-LRU (De et al. 2024, arXiv 2402.19427) and RWKV-4's WKV (Peng et al. 2023, arXiv 2305.13048).

Saves only its inputs for backward, which computes the states again. One operator, opaque to torch.compile, so that a
decoder layer compiles around it.

Dims: B rows, S tokens of a row, D channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.kernels.linear_recurrence import recur


def linear_recurrence(a_BSD: Tensor, x_BSD: Tensor) -> Tensor:
    """`h[t] = a[t] h[t-1] + x[t]` from zero, `[B, S, D]` in the dtype of x, computed in fp32.

    Oracle: `kernels.linear_recurrence.recur_reference`.
    """
    out_BSD: Tensor = torch.ops.slipstream.linear_recurrence(a_BSD, x_BSD)
    return out_BSD


def wkv(decay_D: Tensor, first_D: Tensor, key_BSD: Tensor, value_BSD: Tensor) -> Tensor:
    """RWKV-4's average of the values so far: token s has the weight `exp(k[s] - exp(decay) (t - 1 - s))` at token t,
    this one itself `exp(k[t] + first)`; `[B, S, D]` in the dtype of the keys, computed in fp32.

    Sums of exponentials overflow, so they are kept as multiples of their largest term's; any such level gives the same
    average, and none needs a gradient.
    """
    rate_D, key_BSD, value_BSD, dtype = -torch.exp(decay_D.float()), key_BSD.float(), value_BSD.float(), key_BSD.dtype
    now_BSD = key_BSD + first_D.float()
    with torch.no_grad():
        aged_SD = rate_D * torch.arange(key_BSD.shape[1], device=key_BSD.device)[:, None]
        level_BSD = (key_BSD - aged_SD).cummax(1).values + aged_SD
        before_BSD = F.pad(level_BSD[:, :-1], (0, 0, 1, 0), value=-torch.inf)
        top_BSD = torch.maximum(before_BSD, now_BSD)
        past_BSD = torch.exp(before_BSD - top_BSD)
    decay_BSD = torch.exp(before_BSD + rate_D - level_BSD)
    weight_BSD, now_BSD = torch.exp(key_BSD - level_BSD), torch.exp(now_BSD - top_BSD)
    sums = (linear_recurrence(decay_BSD, given) for given in (weight_BSD * value_BSD, weight_BSD))
    values_BSD, weights_BSD = (F.pad(total[:, :-1], (0, 0, 1, 0)) for total in sums)
    out_BSD = (past_BSD * values_BSD + now_BSD * value_BSD) / (past_BSD * weights_BSD + now_BSD)
    return out_BSD.to(dtype)


# Defined by hand as in moe/grouped_mlp.py.
torch.library.define("slipstream::linear_recurrence", "(Tensor a_BSD, Tensor x_BSD) -> Tensor")
torch.library.define(
    "slipstream::linear_recurrence_backward", "(Tensor grad_BSD, Tensor a_BSD, Tensor x_BSD) -> (Tensor, Tensor)"
)


@torch.library.impl("slipstream::linear_recurrence", "default")
def _forward(a_BSD: Tensor, x_BSD: Tensor) -> Tensor:
    return recur(a_BSD, x_BSD, x_BSD.dtype).contiguous()


@torch.library.register_fake("slipstream::linear_recurrence")
def _(a_BSD: Tensor, x_BSD: Tensor) -> Tensor:
    return x_BSD.new_empty(x_BSD.shape)


@torch.library.impl("slipstream::linear_recurrence_backward", "default")
def _backward(grad_BSD: Tensor, a_BSD: Tensor, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x_BSD.dtype, torch.float32)
    states_BSD = recur(a_BSD, x_BSD, wide)
    grad_x_BSD = recur(a_BSD, grad_BSD, wide, reverse=True)
    grad_a_BSD = F.pad(grad_x_BSD[:, 1:] * states_BSD[:, :-1], (0, 0, 1, 0))
    return grad_a_BSD.to(a_BSD.dtype).contiguous(), grad_x_BSD.to(x_BSD.dtype).contiguous()


@torch.library.register_fake("slipstream::linear_recurrence_backward")
def _(grad_BSD: Tensor, a_BSD: Tensor, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
    return a_BSD.new_empty(a_BSD.shape), x_BSD.new_empty(x_BSD.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = torch.ops.slipstream.linear_recurrence_backward(grad_BSD, *ctx.saved_tensors)
    return found


torch.library.register_autograd("slipstream::linear_recurrence", _autograd, setup_context=_save)
