"""Dispatchers as Transformers' `ep_implementation`s: "slipstream_all_to_all" and "slipstream_all_gather".

Dims: see base.py.
"""

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from slipstream import hf
from slipstream.moe.dispatch.all_gather import AllGatherDispatcher
from slipstream.moe.dispatch.all_to_all import AllToAllDispatcher
from slipstream.moe.dispatch.base import Dispatched, Dispatcher
from slipstream.moe.dispatch.local import LocalDispatcher
from slipstream.moe.experts import experts_forward
from slipstream.moe.routing import balanced_index

__all__ = ["AUTO", "AllGatherDispatcher", "AllToAllDispatcher", "Dispatched", "Dispatcher", "LocalDispatcher"]


# What BackendConfig(dispatcher="auto") means: it moves the fewest bytes at every size of the group.
AUTO = "all_to_all"


class _Exchange(EPImplementation):
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

    def __call__(self, x_TH: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        implementation = hf.experts_implementation(self.experts)
        if implementation == "slipstream_balanced":
            # Here, because a uniform choice among the experts of one rank is not one among all.
            idx_TK = balanced_index(idx_TK, self.dispatcher.num_local_experts * self.ep_mesh.size())
        sent = self.dispatcher.dispatch(x_TH, idx_TK, weights_TK)
        rows = sent.rows_RH, sent.idx_RK, sent.weights_RK
        if implementation.startswith("slipstream"):
            rows_RH = experts_forward(self.experts, *rows, num_rows=sent.num_slots or None)
        else:
            rows_RH = self.experts_forward(*rows)
        return self.dispatcher.combine(rows_RH, sent)


class AllToAllExchange(_Exchange):
    """`DistributedConfig(ep_implementation="slipstream_all_to_all")`."""

    dispatcher_class = AllToAllDispatcher


class AllGatherExchange(_Exchange):
    """`DistributedConfig(ep_implementation="slipstream_all_gather")`."""

    dispatcher_class = AllGatherDispatcher


EPImplementationInterface.register("slipstream_all_to_all", AllToAllExchange)
EPImplementationInterface.register("slipstream_all_gather", AllGatherExchange)
