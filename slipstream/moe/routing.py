"""From the router's choice to what a grouped GEMM needs, on the device and without a host synchronisation.

Dims: T tokens, K experts per token, E experts, R = T * K rows, one per (token, slot).
"""

from typing import NamedTuple

import torch

from slipstream.kernels import sort_by_expert as kernel


class Routing(NamedTuple):
    """Rows sorted by expert, int32. Example: idx_TK = [[1, 0], [1, 2]] and E = 3 give

    slot_R    = [1, 0, 2, 3]   position in idx_TK.flatten() that each row came from
    row_TK    = [[1, 0], [2, 3]]   where each (token, slot) went: the inverse of slot_R
    ends_E    = [1, 3, 4]   expert e owns rows ends_E[e-1] : ends_E[e]
    expert_R  = [0, 1, 1, 2]
    """

    slot_R: torch.Tensor
    row_TK: torch.Tensor
    ends_E: torch.Tensor
    expert_R: torch.Tensor

    @property
    def token_R(self) -> torch.Tensor:
        """The token of each row."""
        return self.slot_R // self.row_TK.shape[1]


def sort_by_expert(idx_TK: torch.Tensor, num_experts: int, num_rows: int | None = None) -> Routing:
    """Group the (token, slot) pairs of `idx_TK` by expert, in token order within each expert.

    An id >= num_experts (an expert of another rank) gets no row: its `row_TK` points behind the last. Where the host
    knows how many pairs do get one, `num_rows` leaves out the others; else rows from ends_E[-1] on belong to no expert.
    """
    return Routing(*kernel.sort_by_expert(idx_TK, num_experts, idx_TK.numel() if num_rows is None else num_rows))


def balanced_index(idx_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """A choice of experts that loads all of them equally, whatever the router said. For benchmarks only."""
    slots = torch.arange(idx_TK.numel(), device=idx_TK.device, dtype=idx_TK.dtype)
    return slots.remainder_(num_experts).view_as(idx_TK)
