"""Dispatchers as Transformers' `ep_implementation`s: "slipstream_all_to_all" and "slipstream_all_gather".

Dims: see base.py.
"""

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from slipstream import hf
from slipstream.moe.dispatch.all_gather import AllGatherDispatcher
from slipstream.moe.dispatch.all_to_all import AllToAllDispatcher
from slipstream.moe.dispatch.base import Dispatched, Dispatcher
from slipstream.moe.dispatch.local import LocalDispatcher
from slipstream.moe.experts import experts_forward
from slipstream.moe.routing import balanced_index

__all__ = [
    "AUTO",
    "FIRST_EXPERT",
    "GRADIENT_DIVISOR",
    "AllGatherDispatcher",
    "AllToAllDispatcher",
    "Dispatched",
    "Dispatcher",
    "LocalDispatcher",
]

# What BackendConfig(dispatcher="auto") means: it moves the fewest bytes at every size of the group.
AUTO = "all_to_all"
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
        if implementation == "slipstream_balanced":
            # Here, because a uniform choice among the experts of one rank is not one among all.
            idx_TK = balanced_index(idx_TK, self.dispatcher.num_local_experts * self.ep_mesh.size())
        divisor = getattr(self.experts, GRADIENT_DIVISOR, 1)
        if divisor != 1:
            # Divided on the way to the experts and restored behind them: only their weights see the smaller gradient.
            x_TH, weights_TK = (_ScaleGradient.apply(tensor, divisor) for tensor in (x_TH, weights_TK))
        sent = self.dispatcher.dispatch(x_TH, idx_TK, weights_TK)
        rows = sent.rows_RH, sent.idx_RK, sent.weights_RK
        if implementation.startswith("slipstream"):
            rows_RH = experts_forward(self.experts, *rows, num_rows=sent.num_slots or None)
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


hf.register_exchange("slipstream_all_to_all", AllToAllExchange)
hf.register_exchange("slipstream_all_gather", AllGatherExchange)
