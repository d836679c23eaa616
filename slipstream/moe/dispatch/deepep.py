"""Tokens travel through DeepEP (DeepSeek-AI, github.com/deepseek-ai/DeepEP, MIT), where that package is installed.

Written for `deep_ep.Buffer` of DeepEP 1.2.1, which 2.x keeps beside its `ElasticBuffer`; its normal mode, over NVLink
in a node and RDMA between nodes. Never chosen by itself: the package could not be run where this was written, so this
file has run with a stand-in for it only (tests/distributed/stand_in_deep_ep.py).

Dims: see base.py.
"""

import importlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from slipstream.backend import HOW_TO_GET
from slipstream.moe.dispatch.base import Dispatched, Dispatcher, check_inputs

# Its kernels move half a row, between nodes a whole one with ids and weights, through a warp's shared memory.
MAX_TOP_K, MAX_HIDDEN, HIDDEN_MULTIPLE = 32, 8048, 16
RANKS_PER_NODE = 8  # a constant of its own: a larger group consists of whole nodes of so many

# By name of the group: the group, the bytes of a row that there is room for, and the `deep_ep.Buffer`.
_BUFFERS: dict[str, tuple[ProcessGroup, int, Any]] = {}


class DeepEPDispatcher(Dispatcher):
    """DeepEP's dispatch and combine; rows by source rank (over several nodes, in its own order).

    The host waits once per dispatch, for the sizes. Sums are fp32, but between nodes DeepEP rounds each node's sum to
    bfloat16 before it adds them.

    Raises:
        ImportError: DeepEP is not installed, or was built without `Buffer`.
        ValueError: a number of ranks, a hidden size or a number of experts per token that it does not take.
        TypeError: rows that are not bfloat16 (from `dispatch` and `combine`).
    """

    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)

    def __init__(self, num_local_experts: int, group: ProcessGroup | None = None) -> None:
        super().__init__(num_local_experts, group)
        _configs(dist.get_world_size(group))

    def dispatch(self, x_TH: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor) -> Dispatched:
        """See `Dispatcher.dispatch`."""
        check_inputs(x_TH, idx_TK, weights_TK)
        self._check_dtype(x_TH)
        hidden, top_k = x_TH.shape[1], idx_TK.shape[1]
        if top_k > MAX_TOP_K or hidden % HIDDEN_MULTIPLE or hidden > MAX_HIDDEN:
            raise ValueError(
                f"dispatcher='deepep': {top_k} experts per token and hidden size {hidden}, but DeepEP takes a multiple "
                f"of {HIDDEN_MULTIPLE} up to {MAX_HIDDEN} and {MAX_TOP_K} experts or fewer; use dispatcher='all_to_all'"
            )
        came = self._send(x_TH, idx_TK, weights_TK)
        rows_RH, weights_RK = _Dispatch.apply(x_TH, weights_TK, came)
        return Dispatched(rows_RH, came.idx_RK, weights_RK, came.num_slots, (came.sizes, came.handle))

    def combine(self, rows_RH: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """See `Dispatcher.combine`."""
        self._check_dtype(rows_RH)
        sizes, handle = dispatched.way_back
        return _Combine.apply(rows_RH, sizes, handle)

    def _check_dtype(self, rows: torch.Tensor) -> None:
        if rows.dtype not in self.dtypes:
            raise TypeError(
                f"dispatcher='deepep': DeepEP carries bfloat16 rows, not {rows.dtype}; load the model with "
                "dtype=torch.bfloat16, or use dispatcher='all_to_all'"
            )

    @torch.no_grad()
    def _send(self, x_TH: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor) -> "_Came":
        group = self.group or dist.group.WORLD
        assert group is not None
        buffer = _buffer_of(group, x_TH)
        ids_TK = _filled(idx_TK, -1).to(getattr(_package(), "topk_idx_t", torch.int64)).contiguous()
        per_rank, per_node, per_expert, goes_TP, _ = buffer.get_dispatch_layout(
            ids_TK, self.num_local_experts * group.size()
        )
        rows_RH, idx_RK, weights_RK, slots_L, handle, _ = buffer.dispatch(
            _filled(x_TH).contiguous(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=goes_TP,
            num_tokens_per_expert=per_expert,
            topk_idx=ids_TK,
            topk_weights=_filled(weights_TK).float().contiguous(),
        )
        sizes = _Sizes(len(x_TH), len(rows_RH), group)
        idx_RK = _filled(idx_RK, -1).to(torch.int64)
        idx_RK = idx_RK.masked_fill(idx_RK < 0, self.num_local_experts)
        weights_RK = _filled(weights_RK).to(weights_TK.dtype)
        return _Came(_filled(rows_RH), idx_RK, weights_RK, sum(slots_L), sizes, handle, self.num_local_experts)


class _Sizes(NamedTuple):
    """Tokens of this rank, rows that came, and the group."""

    tokens: int
    received: int
    group: ProcessGroup


class _Came(NamedTuple):
    """What a dispatch brought. `handle` is DeepEP's: tensors that say which row went where."""

    rows_RH: torch.Tensor
    idx_RK: torch.Tensor
    weights_RK: torch.Tensor
    num_slots: int
    sizes: _Sizes
    handle: tuple[torch.Tensor, ...]
    num_local_experts: int


class _Dispatch(torch.autograd.Function):
    """What came, as a function of what was sent."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: torch.Tensor, weights_TK: torch.Tensor, came: _Came
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The handle is saved like any tensor: activation checkpointing then drops it, and makes it again with the rows.
        ctx.save_for_backward(came.idx_RK == came.num_local_experts, *came.handle)
        ctx.sizes = came.sizes
        return came.rows_RH, came.weights_RK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RH: torch.Tensor, grad_weights_RK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        need_x, need_weights, _ = ctx.needs_input_grad
        elsewhere_RK, *handle = ctx.saved_tensors
        sizes: _Sizes = ctx.sizes
        sent_back = None
        if need_weights:
            # DeepEP sums over the ranks; only the one with the slot's expert has something to say.
            sent_back = grad_weights_RK.float().masked_fill(elsewhere_RK, 0)[: sizes.received].contiguous()
        grad_x_TH, grad_weights_TK = _return(grad_RH, sizes, tuple(handle), sent_back)
        if grad_weights_TK is not None:
            grad_weights_TK = grad_weights_TK.to(grad_weights_RK.dtype)
        return grad_x_TH if need_x else None, grad_weights_TK, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RH: torch.Tensor, sizes: _Sizes, handle: tuple[torch.Tensor, ...]) -> torch.Tensor:
        ctx.save_for_backward(*handle)
        ctx.sizes = sizes
        return _return(rows_RH, sizes, handle)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        buffer = _buffer_of(ctx.sizes.group, grad_TH)
        grad_RH, *_ = buffer.dispatch(_filled(grad_TH).contiguous(), handle=ctx.saved_tensors)
        return _filled(grad_RH), None, None


def _return(
    rows_RH: torch.Tensor, sizes: _Sizes, handle: tuple[torch.Tensor, ...], weights_RK: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sum of a token's rows, and of its fp32 weights."""
    buffer = _buffer_of(sizes.group, rows_RH)
    rows_RH = rows_RH[: sizes.received].contiguous()
    out_TH, weights_TK, _ = buffer.combine(rows_RH, handle, topk_weights=weights_RK)
    return out_TH[: sizes.tokens], None if weights_TK is None else weights_TK[: sizes.tokens]


def _filled(rows: torch.Tensor, value: int = 0) -> torch.Tensor:
    """`rows`, or one of `value` where there are none: neither DeepEP nor a grouped GEMM need take empty input. A token
    with ids of -1 goes nowhere."""
    return rows if len(rows) else rows.new_full((1, *rows.shape[1:]), value)


def _buffer_of(group: ProcessGroup, rows: torch.Tensor) -> Any:
    """The group's `deep_ep.Buffer`, made at the first call and made anew for wider rows; on all its ranks together."""
    row_bytes = rows.shape[1] * rows.element_size()
    if (found := _BUFFERS.get(group.group_name)) is not None and found[0] is group:
        if found[1] >= row_bytes:
            return found[2]
        found[2].destroy()
    ranks = group.size()
    configs = _configs(ranks)
    nvlink = max(config.get_nvl_buffer_size_hint(row_bytes, ranks) for config in configs)
    # Builds without NVSHMEM refuse to be asked, even inside a node.
    rdma = 0
    if ranks > RANKS_PER_NODE:
        rdma = max(config.get_rdma_buffer_size_hint(row_bytes, ranks) for config in configs)
    # Otherwise the destructor waits for the other ranks, which may be gone by then.
    buffer = _package().Buffer(group, nvlink, rdma, explicitly_destroy=True)
    _BUFFERS[group.group_name] = group, row_bytes, buffer
    return buffer


def free_buffers() -> None:
    """Give back what the exchanges through DeepEP use; on all ranks together, before `destroy_process_group`."""
    while _BUFFERS:
        _, (_, _, buffer) = _BUFFERS.popitem()
        buffer.destroy()


def _configs(ranks: int) -> tuple[Any, Any]:
    """DeepEP's own settings of dispatch and combine."""
    kind = _package().Buffer
    try:
        return kind.get_dispatch_config(ranks), kind.get_combine_config(ranks)
    except AssertionError as error:
        raise ValueError(
            f"dispatcher='deepep': DeepEP has no settings for ep_size={ranks} ({error}); use 2, 4 or 8, on nodes of 8 "
            "also 16, 24 or 32, or dispatcher='all_to_all'"
        ) from error


def _package() -> Any:
    try:
        package = importlib.import_module("deep_ep")
    except ImportError as error:
        raise ImportError(
            f"dispatcher='deepep' needs the package 'deep_ep' ({error}): {HOW_TO_GET['deep_ep']}; or use "
            "dispatcher='all_to_all'"
        ) from error
    if getattr(package, "Buffer", None) is None:
        raise ImportError(
            f"dispatcher='deepep' needs deep_ep.Buffer, which DeepEP {getattr(package, '__version__', '')} here was "
            "built without: build it without DISABLE_LEGACY, or use dispatcher='all_to_all'"
        )
    return package
