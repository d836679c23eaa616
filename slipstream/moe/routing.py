"""From the router's choice to what a grouped GEMM needs, on the device and without a host synchronisation.

Dims: T tokens, K experts per token, E experts, R = T * K rows, one per (token, slot).
"""

from typing import NamedTuple

import torch


class Routing(NamedTuple):
    """Rows sorted by expert. Example: idx_TK = [[1, 0], [1, 2]] and E = 3 give

    slot_R    = [1, 0, 2, 3]   position in idx_TK.flatten() that each row came from
    token_R   = [0, 0, 1, 1]   slot_R // K
    row_TK    = [[1, 0], [2, 3]]   where each (token, slot) went: the inverse of slot_R
    ends_E    = [1, 3, 4]   int32; expert e owns rows ends_E[e-1] : ends_E[e]
    expert_R  = [0, 1, 1, 2]
    """

    slot_R: torch.Tensor
    token_R: torch.Tensor
    row_TK: torch.Tensor
    ends_E: torch.Tensor
    expert_R: torch.Tensor


def sort_by_expert(idx_TK: torch.Tensor, num_experts: int, num_rows: int | None = None) -> Routing:
    """Group the (token, slot) pairs of `idx_TK` by expert, in token order within each expert.

    An id >= num_experts (an expert of another rank) sorts behind ends_E[-1]; its row belongs to no expert. Where the
    host knows how many rows do belong to one, `num_rows` leaves out the others: `row_TK` then points behind the last.
    """
    expert_R, slot_R = torch.sort(idx_TK.flatten(), stable=True)
    experts_E = torch.arange(num_experts, device=idx_TK.device, dtype=idx_TK.dtype)
    ends_E = torch.searchsorted(expert_R, experts_E, right=True).to(torch.int32)
    row_TK = torch.empty_like(slot_R)
    row_TK[slot_R] = torch.arange(slot_R.numel(), device=idx_TK.device)
    slot_R, expert_R = slot_R[:num_rows], expert_R[:num_rows]
    return Routing(slot_R, slot_R // idx_TK.shape[1], row_TK.view_as(idx_TK), ends_E, expert_R)


def balanced_index(idx_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """A choice of experts that loads all of them equally, whatever the router said. For benchmarks only."""
    slots = torch.arange(idx_TK.numel(), device=idx_TK.device, dtype=idx_TK.dtype)
    return slots.remainder_(num_experts).view_as(idx_TK)
