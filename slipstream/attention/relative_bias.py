"""Inkling's bias by the distance between a query and a key, with a gradient that nothing is scattered for.

Transformers gathers the bias of each query and key from the query's biases by distance. The gradient of that gather
adds up, atomically, every key's into the place of its distance, and all that lie outside of the extent, though their
gradient is zero, into the first place or the last. But a query has one key at a distance, so the gradient is a gather
as well.

Dims: B batch, H heads, Q queries, K keys, E distances (the extent), R width of what a token mixes its biases from.
"""

from typing import Any

import torch
from torch import Tensor, nn

from slipstream import hf_models


def install(model: nn.Module) -> bool:
    """Let the biases of `model` that are of this kind be computed so, in place; whether it has such."""
    return hf_models.replace_forward(model, forward, *hf_models.RELATIVE_LOGITS)


def forward(self: Any, relative_states_BQHR: Tensor, query_positions_Q: Tensor, key_positions_K: Tensor) -> Tensor:
    """The bias `[B, H, Q, K]` of each score, zero outside of `0 <= distance < E`. Keys' positions follow each other."""
    by_distance_BHQE = (relative_states_BQHR @ self.proj).transpose(1, 2)
    return _ByDistance.apply(by_distance_BHQE, query_positions_Q[:, None] - key_positions_K)  # type: ignore[no-any-return]


class _ByDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, by_distance_BHQE: Tensor, distance_QK: Tensor) -> Tensor:
        ctx.save_for_backward(distance_QK[:, :1])
        ctx.extent = by_distance_BHQE.shape[-1]
        return _gather(by_distance_BHQE, distance_QK)

    @staticmethod
    def backward(ctx: Any, grad_BHQK: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (distance_Q1,) = ctx.saved_tensors
        return _gather(grad_BHQK, distance_Q1 - torch.arange(ctx.extent, device=grad_BHQK.device)), None


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """`values [B, H, Q, N]` at `index [Q, M]`, zero where that is outside."""
    inside = (index >= 0) & (index < values.shape[-1])
    # Not clamped, as Inductor of torch 2.11 fails at the minimum and maximum of what it takes for an index.
    index = index.where(inside, 0).expand(*values.shape[:2], -1, -1)
    return values.gather(-1, index).masked_fill(~inside, 0.0)
