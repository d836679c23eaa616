"""ZAYA's L2 norm of queries and keys, where keys have a scale a head, as torch.compile differentiates it best.

Transformers multiplies the scale into normalised keys, so its gradient is a sum of `tokens * width` products for each
of two heads. In a graph for any number of tokens Inductor cuts that sum into pieces by division and remainder of every
index; such a kernel took Triton 3.6 five minutes to compile. Here the scale is multiplied into the norm's factor, one
number a token and head, so that what is summed over the width is what the norm needs anyway.

Dims: B batch, S tokens, N heads, D a head's width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from slipstream import hf_models


def install(model: nn.Module) -> bool:
    """Let the norms of `model` that are of this kind compute so, in place; whether it has such."""
    return hf_models.replace_forward(model, forward, hf_models.ZAYA_QK_NORM)


def forward(self: Any, queries_BSND: Tensor, keys_BSMD: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of length `sqrt(D)`, keys times their head's scale, as `ZayaQKNorm` but for rounding."""
    queries_factor, keys_factor = (self.head_dim_scale / _length(states) for states in (queries_BSND, keys_BSMD))
    return queries_BSND * queries_factor, keys_BSMD * (keys_factor * self.temp[:, None])


def _length(states: Tensor) -> Tensor:
    return states.norm(p=2, dim=-1, keepdim=True).clamp_min(torch.finfo(states.dtype).eps)
