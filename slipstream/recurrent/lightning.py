"""MiniMax's lightning attention (MiniMax-01, arXiv 2501.08313; Qin et al. 2024, arXiv 2401.04658) by Mamba2's scan.

Linear attention whose state decays in each head by the same factor with every token: that scan with steps of one,
values as its inputs, keys and queries as B and C, a group for each head. Transformers loops over blocks of 256 tokens
in Python, and its state runs along the whole of a packed row.

Dims: B rows, S tokens of a row, H heads, D their width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.recurrent.mamba2 import mamba2_scan


def lightning_attention(
    module: Any, hidden: Tensor, mask_BS: Tensor | None, document_BS: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the forward of `module`, a `MiniMaxLightningAttention`, returns without a cache.

    Args:
        hidden: `[B, S, hidden size]`, as the output.
        mask_BS: 0 at padding.
        document_BS: int32 ids that never fall along a row; the state begins anew where the id changes. None: a row is
            one.

    Returns: the output, and the state `[B, H, D, D]` behind the last token, which a compiled layer does not compute
        unless it is asked for.
    """
    projected = module.act_fn(module.qkv_proj(hidden))
    if mask_BS is not None:
        projected = projected * mask_BS[..., None].to(projected.dtype)
    heads = projected.unflatten(-1, (module.num_attention_heads, 3 * module.head_dim))
    query_BSHD, key_BSHD, value_BSHD = heads.split(module.head_dim, dim=-1)
    slope_H = module.slope_rate.flatten().float()
    steps_BSH = value_BSHD.new_ones(value_BSHD.shape[:3], dtype=torch.float32)
    out_BSHD = mamba2_scan(
        value_BSHD, steps_BSH, -slope_H, key_BSHD, query_BSHD, module.block_size, document_BS=document_BS
    )
    normed = module.norm(out_BSHD.to(hidden.dtype).flatten(2))
    out = module.out_proj(F.sigmoid(module.output_gate(hidden)) * normed)
    return out, _last_state(key_BSHD, value_BSHD, slope_H, document_BS)


def _last_state(key_BSHD: Tensor, value_BSHD: Tensor, slope_H: Tensor, document_BS: Tensor | None) -> Tensor:
    behind_S = torch.arange(key_BSHD.shape[1] - 1, -1, -1, device=key_BSHD.device)
    left_BSH = torch.exp(-slope_H * behind_S[:, None])[None]
    if document_BS is not None:
        left_BSH = left_BSH * (document_BS == document_BS[:, -1:])[..., None]
    weighted_BSHD = (key_BSHD * left_BSH[..., None]).to(value_BSHD.dtype)
    return torch.einsum("bshk,bshv->bhkv", weighted_BSHD, value_BSHD)
