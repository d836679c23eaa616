"""The exchange of tokens under expert parallelism: the contract that every dispatcher keeps, and what they share.

Dims: T tokens of this rank, H hidden, K experts per token, L experts of this rank, P ranks of the expert-parallel
group, R received rows. Expert e belongs to rank e // L of the group.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Dispatched:
    """The rows this rank's experts run on, and the way back.

    Attributes:
        rows_RH: tokens of all ranks of the group, each at most once, in the order of the ranks (of the ways that they
            come, where those have stages). A row that only pads the shape is zero and belongs to no expert here.
        idx_RK: int64 ids of local experts, 0 … L-1; L says 'not on this rank'.
        weights_RK: routing weights, 0 where `idx_RK` is L.
        num_slots: how many of `idx_RK` are local, where the host knows it: most are not, and need no memory then.
        way_back: what `combine` needs, private to the dispatcher.
    """

    rows_RH: torch.Tensor
    idx_RK: torch.Tensor
    weights_RK: torch.Tensor
    num_slots: int | None
    way_back: Any


class Dispatcher(ABC):
    """Brings tokens to the ranks that hold their experts and the results back.

    Between the two calls the caller runs its experts on the rows:

        sent = dispatcher.dispatch(x_TH, idx_TK, weights_TK)
        partial_RH = experts(sent.rows_RH, sent.idx_RK, sent.weights_RK)   # weighted sum over the local experts
        out_TH = dispatcher.combine(partial_RH, sent)                      # sum over the ranks, in fp32

    Both are differentiable, once. They launch the same collectives on every rank of the group whatever the router
    chose, also where a rank has no token, and drop no token. All ranks of the group have to call them together, and
    what requires a gradient on one has to on all.
    """

    def __init__(self, num_local_experts: int, group: ProcessGroup | None = None) -> None:
        """`group` is the expert-parallel group; None means the default one."""
        if num_local_experts < 1:
            raise ValueError(f"num_local_experts={num_local_experts}: every rank of the group holds 1 expert or more")
        self.num_local_experts = num_local_experts
        self.group = group

    @abstractmethod
    def dispatch(self, x_TH: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor) -> Dispatched:
        """Send each token to every rank that owns one of its experts; `idx_TK` holds global ids, 0 … L*P-1.

        Raises:
            ValueError: the shapes don't fit each other.
            TypeError: `idx_TK` is not int64.
        """

    @abstractmethod
    def combine(self, rows_RH: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """Send `rows_RH`, one result for each of `dispatched.rows_RH`, back and sum them: `[T, H]`, same dtype."""


def check_inputs(x_TH: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
    """Refuse what `Dispatcher.dispatch` says it refuses."""
    if idx_TK.dtype != torch.int64:
        raise TypeError(f"the experts' ids must be int64, not {idx_TK.dtype}")
    shapes = [tuple(tensor.shape) for tensor in (x_TH, idx_TK, weights_TK)]
    if [len(shape) for shape in shapes] != [2, 2, 2] or shapes[1] != shapes[2] or shapes[0][0] != shapes[1][0]:
        raise ValueError(f"tokens [T, H], ids [T, K] and weights [T, K] must fit, not {', '.join(map(str, shapes))}")


def pack_routes(idx_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """Ids and weights as one int32 tensor `[N, 2K]`, so that they travel in one collective. Exact up to fp32."""
    return torch.cat([idx_NK.to(torch.int32), weights_NK.to(torch.float32).view(torch.int32)], dim=1)


def unpack_routes(packed_N2K: torch.Tensor, weights_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids (int64) and weights that `pack_routes` packed."""
    idx_NK, weights_NK = packed_N2K.chunk(2, dim=1)
    return idx_NK.to(torch.int64), weights_NK.contiguous().view(torch.float32).to(weights_dtype)


def keep_local(
    idx_NK: torch.Tensor, weights_NK: torch.Tensor, first_expert: int | torch.Tensor, num_local_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Global ids as local ones of the rank whose experts begin at `first_expert`, and the weights.

    Example with 4 experts a rank, first_expert = 4: ids [5, 1, 7] become [1, 4, 3] and the second weight 0.
    """
    local_NK = idx_NK - first_expert
    elsewhere_NK = (local_NK < 0) | (local_NK >= num_local_experts)
    return local_NK.masked_fill(elsewhere_NK, num_local_experts), weights_NK.masked_fill(elsewhere_NK, 0)
