"""As much of DeepEP 1.2.1's `deep_ep` as slipstream/moe/dispatch/deepep.py uses, carried out by plain collectives.

It refuses what the real one does, and empty input, which the real one may not expect. Unlike that it takes fp32 rows,
so that tests can compare closely.

Dims: T tokens of this rank, H hidden, K experts per token, P ranks, S rows sent, R rows received.
"""

import sys
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from slipstream.moe import dispatch
from slipstream.moe.dispatch import DeepEPDispatcher

topk_idx_t = torch.int64
__version__ = "1.2.1"


class Config(NamedTuple):
    """Its hints grow with rows and ranks; as in a build without NVSHMEM there is none for RDMA."""

    chunk: int

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return self.chunk * num_ranks * hidden_bytes

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        raise RuntimeError("NVSHMEM is disabled during compilation")


class Buffer:
    made = alive = 0

    def __init__(
        self,
        group: ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        explicitly_destroy: bool = False,
    ) -> None:
        assert (num_rdma_bytes, low_latency_mode, explicitly_destroy) == (0, False, True)
        self._group, self._bytes, self._alive = group, num_nvl_bytes, True
        Buffer.made += 1
        Buffer.alive += 1

    def destroy(self) -> None:
        assert self._alive
        self._alive = False
        Buffer.alive -= 1

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8), f"Unsupported number of EP ranks: {num_ranks}"
        return Config(24)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8), f"Unsupported number of EP ranks: {num_ranks}"
        return Config(10)

    def get_dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int) -> tuple[Any, ...]:
        assert topk_idx.dtype == topk_idx_t
        assert topk_idx.is_contiguous()
        ranks = self._group.size()
        chosen_TK = topk_idx >= 0
        owner_TK = torch.where(chosen_TK, topk_idx // (num_experts // ranks), ranks)
        goes_TP = torch.zeros(len(topk_idx), ranks + 1, dtype=torch.bool).scatter_(1, owner_TK, True)[:, :ranks]
        per_expert = torch.bincount(topk_idx[chosen_TK], minlength=num_experts).int()
        return goes_TP.sum(0, dtype=torch.int32), None, per_expert, goes_TP.contiguous(), None

    def dispatch(
        self,
        x: torch.Tensor,
        handle: tuple[torch.Tensor, ...] | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
    ) -> tuple[Any, ...]:
        self._check(x)
        assert len(x)
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            goes_TP, received_P = handle
            return self._send(x[_pairs(goes_TP)[1]], goes_TP, received_P), None, None, None, None, None
        assert num_tokens_per_rank is not None
        assert num_tokens_per_rdma_rank is None, "one node"
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        assert topk_idx is not None
        assert topk_weights is not None
        assert topk_weights.dtype == torch.float32
        assert topk_weights.is_contiguous()
        received_P = torch.empty_like(num_tokens_per_rank)
        dist.all_to_all_single(received_P, num_tokens_per_rank, group=self._group)
        peer_S, token_S = _pairs(is_token_in_rank)
        local_experts = len(num_tokens_per_expert) // self._group.size()
        idx_SK = topk_idx[token_S] - peer_S[:, None] * local_experts
        elsewhere_SK = (idx_SK < 0) | (idx_SK >= local_experts)
        came = [
            self._send(rows, is_token_in_rank, received_P)
            for rows in (
                x[token_S],
                idx_SK.masked_fill(elsewhere_SK, -1),
                topk_weights[token_S].masked_fill(elsewhere_SK, 0),
            )
        ]
        slots = torch.bincount(came[1][came[1] >= 0], minlength=local_experts).tolist()
        return *came, slots, (is_token_in_rank, received_P), None

    def combine(
        self, x: torch.Tensor, handle: tuple[torch.Tensor, ...], topk_weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        self._check(x)
        assert isinstance(handle, tuple)
        if topk_weights is None:
            return self._sum(x, *handle), None, None
        assert topk_weights.dtype == torch.float32
        assert topk_weights.is_contiguous()
        return self._sum(x, *handle), self._sum(topk_weights, *handle), None

    def _check(self, x: torch.Tensor) -> None:
        row_bytes = x.shape[1] * x.element_size()
        assert self._alive
        assert x.is_contiguous()
        assert row_bytes % 32 == 0
        assert self._bytes >= Config(24).get_nvl_buffer_size_hint(row_bytes, self._group.size())

    def _send(self, rows_S: torch.Tensor, goes_TP: torch.Tensor, received_P: torch.Tensor) -> torch.Tensor:
        out = rows_S.new_empty(int(received_P.sum()), *rows_S.shape[1:])
        dist.all_to_all_single(out, rows_S, received_P.tolist(), goes_TP.sum(0).tolist(), group=self._group)
        return out

    def _sum(self, rows_R: torch.Tensor, goes_TP: torch.Tensor, received_P: torch.Tensor) -> torch.Tensor:
        assert len(rows_R) == received_P.sum()
        token_S = _pairs(goes_TP)[1]
        rows_S = rows_R.new_empty(len(token_S), rows_R.shape[1])
        dist.all_to_all_single(rows_S, rows_R, goes_TP.sum(0).tolist(), received_P.tolist(), group=self._group)
        total = torch.zeros(len(goes_TP), rows_R.shape[1])
        return total.index_add_(0, token_S, rows_S.float()).to(rows_R.dtype)


def _pairs(goes_TP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank and token of each row sent, by rank and then by token."""
    peer_S, token_S = goes_TP.t().nonzero(as_tuple=True)
    return peer_S, token_S


class StandInDispatcher(DeepEPDispatcher):
    """The dispatcher with the stand-in in this process."""

    dtypes = (torch.bfloat16, torch.float32)

    def __init__(self, num_local_experts: int, group: ProcessGroup | None = None) -> None:
        sys.modules["deep_ep"] = sys.modules[__name__]
        super().__init__(num_local_experts, group)


def install() -> None:
    """`ep_implementation="slipstream_deepep"` runs on the stand-in in this process, in fp32 too."""
    sys.modules["deep_ep"] = sys.modules[__name__]
    dispatch.DeepEPExchange.dispatcher_class = StandInDispatcher
