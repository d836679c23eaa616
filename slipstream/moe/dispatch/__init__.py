"""Dispatchers as Transformers' `ep_implementation`s: "slipstream_all_to_all", "slipstream_all_gather",
"slipstream_hierarchical", "slipstream_nvlink" and "slipstream_deepep".

Dims: see base.py.
"""

import functools
import warnings
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from slipstream import hf
from slipstream.moe.activation import activation_name
from slipstream.moe.dispatch.all_gather import AllGatherDispatcher
from slipstream.moe.dispatch.all_to_all import AllToAllDispatcher
from slipstream.moe.dispatch.base import Dispatched, Dispatcher
from slipstream.moe.dispatch.deepep import DeepEPDispatcher
from slipstream.moe.dispatch.hierarchical import HierarchicalDispatcher, ranks_in_node, ranks_of_group_in_node
from slipstream.moe.dispatch.local import LocalDispatcher
from slipstream.moe.dispatch.nvlink import NvlinkDispatcher
from slipstream.moe.dispatch.nvlink_experts import nvlink_experts
from slipstream.moe.dispatch.nvlink_experts_4bit import nvlink_experts_4bit
from slipstream.moe.dispatch.peers import NoPeerAccessError, obstacle, peers_of
from slipstream.moe.experts import experts_forward, is_balanced, is_fp8, is_fused, run_mlp
from slipstream.moe.routing import balanced_index

__all__ = [
    "FIRST_EXPERT",
    "GRADIENT_DIVISOR",
    "AllGatherDispatcher",
    "AllToAllDispatcher",
    "DeepEPDispatcher",
    "Dispatched",
    "Dispatcher",
    "HierarchicalDispatcher",
    "LocalDispatcher",
    "NvlinkDispatcher",
    "choose",
]

# On an experts module: what its weights' gradients, sums over the tokens of all ranks, are to be divided by here.
GRADIENT_DIVISOR = "_slipstream_gradient_divisor"
# On an experts module that holds a rank's share: the number that its first expert has in the whole layer.
FIRST_EXPERT = "_slipstream_first_expert"


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by `factor`."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None


class _Exchange(hf.Exchange):
    """An experts module whose tokens come and go through `dispatcher_class`."""

    dispatcher_class: type[Dispatcher]

    def __init__(self, experts: Any, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        if tp_mesh.size() > 1:
            raise ValueError(
                f"tp_size={tp_mesh.size()}: Slipstream's exchange takes ranks that hold a batch each; "
                'use tp_size=1, or Transformers\' own ep_implementation="all_to_all"'
            )
        self.experts = experts
        self.dispatcher = self.dispatcher_class(experts.num_experts, ep_mesh.get_group())
        setattr(experts, FIRST_EXPERT, ep_mesh.get_local_rank() * experts.num_experts)

    @torch.compiler.disable  # collectives with sizes that only the host knows: a compiled layer stops here and goes on
    def __call__(self, x_TH: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        implementation = hf.experts_implementation(self.experts)
        if is_balanced(implementation):
            # Here, because a uniform choice among the experts of one rank is not one among all.
            idx_TK = balanced_index(idx_TK, self.dispatcher.num_local_experts * self.ep_mesh.size())
        divisor = getattr(self.experts, GRADIENT_DIVISOR, 1)
        if divisor != 1:
            # Divided on the way to the experts and restored behind them: only their weights see the smaller gradient.
            x_TH, weights_TK = (_ScaleGradient.apply(tensor, divisor) for tensor in (x_TH, weights_TK))
        sent = self.dispatcher.dispatch(x_TH, idx_TK, weights_TK)
        rows = sent.rows_RH, sent.idx_RK, sent.weights_RK
        if implementation.startswith("slipstream"):
            rows_RH = experts_forward(self.experts, *rows, num_rows=sent.num_slots or None, fp8=is_fp8(implementation))
        else:
            rows_RH = self.experts_forward(*rows)
        out_TH = self.dispatcher.combine(rows_RH, sent)
        return out_TH if divisor == 1 else _ScaleGradient.apply(out_TH, 1 / divisor)


class AllToAllExchange(_Exchange):
    """`DistributedConfig(ep_implementation="slipstream_all_to_all")`."""

    dispatcher_class = AllToAllDispatcher


class AllGatherExchange(_Exchange):
    """`DistributedConfig(ep_implementation="slipstream_all_gather")`."""

    dispatcher_class = AllGatherDispatcher


class HierarchicalExchange(_Exchange):
    """`DistributedConfig(ep_implementation="slipstream_hierarchical")`."""

    dispatcher_class = HierarchicalDispatcher


class DeepEPExchange(_Exchange):
    """`DistributedConfig(ep_implementation="slipstream_deepep")`. Raises as `DeepEPDispatcher` does."""

    dispatcher_class = DeepEPDispatcher


class NvlinkExchange(_Exchange):
    """`DistributedConfig(ep_implementation="slipstream_nvlink")`: exchange and experts in one operator.

    A compiled layer contains it. What it does not fit (parameters inside the activation or behind the experts,
    Transformers' own experts) runs between a dispatch and a combine.

    Raises:
        NoPeerAccessError: on all ranks together, where the GPUs can't reach each other's memory.
    """

    dispatcher_class = NvlinkDispatcher

    def __init__(self, experts: Any, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        kind = ep_mesh.device_type
        device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
        self.peers: str | None = None
        try:
            self.peers = peers_of(ep_mesh.get_group(), device).name
            # How many rows come is a size that only the operator knows; a graph may contain such.
            torch._dynamo.config.capture_dynamic_output_shape_ops = True
        except NoPeerAccessError as error:
            self._without_peers(error)

    def _without_peers(self, error: NoPeerAccessError) -> None:
        raise NoPeerAccessError(f"dispatcher='nvlink': {error}; dispatcher='all_to_all' works everywhere") from error

    def __call__(self, x_TH: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        implementation = hf.experts_implementation(self.experts)
        fits = implementation.startswith("slipstream") and is_fused(self.experts)
        if self.peers is None or not fits:
            return super().__call__(x_TH, idx_TK, weights_TK)
        if is_balanced(implementation):
            idx_TK = balanced_index(idx_TK, self.experts.num_experts * self.ep_mesh.size())
        return run_mlp(
            self.experts, nvlink_experts, nvlink_experts_4bit, (x_TH, weights_TK, idx_TK),
            activation_name(self.experts), is_fp8(implementation), peers=self.peers,
            divisor=float(getattr(self.experts, GRADIENT_DIVISOR, 1)),
        )  # fmt: skip


class AutoExchange(NvlinkExchange):
    """`DistributedConfig(ep_implementation="slipstream_nvlink_auto")`: all-to-all, with a warning, where the GPUs turn
    out not to reach each other's memory."""

    def _without_peers(self, error: NoPeerAccessError) -> None:
        self.dispatcher = AllToAllDispatcher(self.dispatcher.num_local_experts, self.ep_mesh.get_group())
        _warn_once(f"tokens travel by all-to-all instead of stores over NVLink: {error}")


@functools.cache
def _warn_once(message: str) -> None:
    """Not for each layer."""
    warnings.warn(message, stacklevel=4)


def choose(ep_size: int) -> tuple[str, str]:
    """What `BackendConfig(dispatcher="auto")` means on this machine, and why; the same on all ranks of a group."""
    inside = ranks_of_group_in_node(ep_size, ranks_in_node())
    if inside is not None and 1 < inside < ep_size:
        nodes = f"{ep_size // inside} nodes of {inside} ranks"
        return "hierarchical", f"ep_size={ep_size}, {nodes}: a token crosses the network once for each node it needs"
    problem = obstacle(ep_size)
    if problem is None:
        return "nvlink", f"ep_size={ep_size}: GPUs of one machine store a token once on each rank that it needs"
    return "all_to_all", f"ep_size={ep_size}: a token goes once to each rank it needs; not over NVLink: {problem}"


def exchange_name(asked_for: str, chosen: str) -> str:
    """The `ep_implementation` of a dispatcher."""
    return "slipstream_nvlink_auto" if (asked_for, chosen) == ("auto", "nvlink") else f"slipstream_{chosen}"


hf.register_exchange("slipstream_nvlink", NvlinkExchange)
hf.register_exchange("slipstream_nvlink_auto", AutoExchange)
hf.register_exchange("slipstream_all_to_all", AllToAllExchange)
hf.register_exchange("slipstream_all_gather", AllGatherExchange)
hf.register_exchange("slipstream_hierarchical", HierarchicalExchange)
hf.register_exchange("slipstream_deepep", DeepEPExchange)
