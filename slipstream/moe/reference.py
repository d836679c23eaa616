"""The oracle: what an experts layer computes, as a loop over experts.

Dims: T tokens, H hidden, K experts per token, E experts, I intermediate, N = I, or 2I where gate and up are fused.
"""

from collections.abc import Callable

import torch


def experts_reference(
    x_TH: torch.Tensor,
    idx_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    up_EHN: torch.Tensor,
    down_EIH: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
    up_bias_EN: torch.Tensor | None = None,
    down_bias_EH: torch.Tensor | None = None,
    post_norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """out[t] = sum over k of weights[t, k] * post_norm(down_e(activation(up_e(x[t])))), with e = idx[t, k].

    Differentiable. Ids >= E contribute nothing.
    """
    out_TH = torch.zeros_like(x_TH)
    for expert in range(up_EHN.shape[0]):
        token, slot = torch.where(idx_TK == expert)
        hidden = x_TH[token] @ up_EHN[expert]
        if up_bias_EN is not None:
            hidden = hidden + up_bias_EN[expert]
        y = activation(hidden) @ down_EIH[expert]
        if down_bias_EH is not None:
            y = y + down_bias_EH[expert]
        if post_norm is not None:
            y = post_norm(y)
        out_TH = out_TH.index_add(0, token, (y * weights_TK[token, slot, None]).to(x_TH.dtype))
    return out_TH
