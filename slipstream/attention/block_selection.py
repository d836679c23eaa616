"""Which blocks of keys a query attends to, for all queries at once: the indexer of Qwen4-Exp's sparse attention (QSA).

Transformers loops over the queries in Python, twenty kernels each. All of them share the blocks, for which query i sees
the keys up to i that no padding hides; so a block's key is computed once, and all scores are a few GEMMs. As there, no
gradient flows through the choice. What is chosen is the same but for scores that rounding makes equal.

Dims: S tokens, H indexer heads, D their width, N blocks, R tokens of a block.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from slipstream import hf_models

_QUERIES = 4096  # whose scores by head exist at once


def install(model: nn.Module) -> bool:
    """Let the indexers of `model` select for all queries at once, in place; whether it has such."""
    return hf_models.replace_forward(model, forward, hf_models.QSA_INDEXER)


@torch.compiler.disable
@torch.no_grad()
def forward(self: Any, hidden_BSH: Tensor, position_embeddings: Any, attention_mask: Tensor, cache: Any) -> Tensor:
    """The tokens that each query attends to, bool `[B, 1, S, S]`. Generating, and masks that hide other keys than later
    ones and padding, go Transformers' way."""
    visible_BSS = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    visible_BSS = visible_BSS[:, 0]
    by_position_BSS = visible_BSS.any(1, keepdim=True).expand_as(visible_BSS).tril()
    if cache is not None or not torch.equal(visible_BSS, by_position_BSS):
        return type(self).forward(self, hidden_BSH, position_embeddings, attention_mask, cache)
    shape = (*hidden_BSH.shape[:2], -1, self.index_head_dim)
    widths = [heads * self.index_head_dim for heads in (self.index_n_heads, self.index_kv_heads)]
    queries, keys = self.index_qk_proj(hidden_BSH).split(widths, dim=-1)
    cos, sin = position_embeddings
    rotate = hf_models.rotary_function(self)
    queries_BSHD = rotate(self.q_layernorm(queries.reshape(shape)), cos=cos, sin=sin, unsqueeze_dim=2)
    rows = zip(queries_BSHD, keys.reshape(shape).squeeze(2), cos, sin, visible_BSS, strict=True)
    return torch.stack([_select(self, rotate, *row) for row in rows])[:, None]


def _select(
    self: Any, rotate: Any, queries_SHD: Tensor, keys_SD: Tensor, cos_S: Tensor, sin_S: Tensor, visible_SS: Tensor
) -> Tensor:
    size, valid_S = self.compress_ratio, visible_SS[-1]
    count = len(valid_S) // size
    tokens_NR = valid_S.logical_not().sort(stable=True).indices[: count * size].view(count, size)
    pooled_ND = self.k_layernorm(keys_SD[tokens_NR].float().mean(1).to(keys_SD.dtype))
    first_N = tokens_NR[:, 0]
    blocks_ND = rotate(pooled_ND[:, None], cos=cos_S[first_N], sin=sin_S[first_N])[:, 0].float()
    scores = [(part.float() @ blocks_ND.t()).relu().sum(1) for part in queries_SHD.split(_QUERIES)]
    scores_SN = torch.cat(scores) / math.sqrt(self.index_head_dim)
    # Blocks that a query does not see whole have no score: it sees their tokens up to its own.
    whole_S1 = visible_SS.sum(1, keepdim=True) // size
    chosen_SN = torch.arange(count, device=scores_SN.device) >= whole_S1
    best = scores_SN.masked_fill(chosen_SN, -math.inf).topk(min(self.block_topk, count), dim=1).indices
    chosen_SN = nn.functional.pad(chosen_SN.scatter(1, best, True), (0, 1), value=True)
    block_S = (valid_S.cumsum(0) - 1).clamp(min=0) // size
    return chosen_SN[:, block_S] & visible_SS
