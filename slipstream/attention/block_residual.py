"""Inkling 2's residual: a query a layer attends to what earlier blocks of layers put out, token by token.

Transformers calls SDPA in fp32 with one to three queries, as many keys as blocks, and heads as wide as the model, for
which PyTorch has its slowest kernel. These are a few numbers a token: sums that a compiled layer does on its way.

Dims: B batch, S tokens, N blocks with the present one, D the model's width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from slipstream import hf_models


def install(model: nn.Module) -> bool:
    """Let the residuals of `model` that are of this kind be computed so, in place; whether it has such."""
    return hf_models.replace_forward(model, forward, hf_models.BLOCK_RESIDUAL)


def forward(self: Any, block_states: Tensor, partial_block_states: Tensor) -> tuple[Tensor, ...]:
    """A mixture of the blocks' states for each query `[B, S, D]`, in fp32."""
    states_BSND = self.norm(torch.cat([block_states, partial_block_states.unsqueeze(-2)], dim=-2).float())
    width = states_BSND.shape[-1]
    mixtures = []
    for query_D in self.query.float().view(-1, width).unbind():
        weights_BSN = ((states_BSND * query_D).sum(-1) * width**-0.5).softmax(-1)
        mixtures.append((weights_BSN[..., None] * states_BSND).sum(-2))
    return tuple(mixtures)
