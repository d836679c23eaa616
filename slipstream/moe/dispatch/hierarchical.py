"""Expert parallelism over several nodes: a token crosses the network once for each node that it needs.

Two all-to-alls, each among a part of the group, in which the group's ranks lie node by node:
- across: a token goes to each node that holds one of its experts, to the rank with the sender's number on that node,
  so that every network card carries its own rank's rows;
- within: from there to each rank of the node that holds one of its experts.
On the way back the ranks of a node are summed first, in fp32, and one row per (token, node) crosses the network. For
top-8 of 128 experts, evenly chosen, on 4 nodes of 8 ranks 2.7 rows a token cross it instead of 5.5. After DeepEP
(DeepSeek-AI, github.com/deepseek-ai/DeepEP).

Dims: see base.py.
"""

import os
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from slipstream.moe.dispatch.all_to_all import AllToAllDispatcher, sum_at_origin
from slipstream.moe.dispatch.base import Dispatched, Dispatcher

# Environment variable: neighbouring ranks that reach each other fast; without it torchrun's LOCAL_WORLD_SIZE.
RANKS_PER_NODE = "SLIPSTREAM_RANKS_PER_NODE"


class HierarchicalDispatcher(Dispatcher):
    """All-to-all between nodes, then inside each.

    The host waits for the device twice per dispatch, for the sizes of both; never in combine or backward.
    """

    def __init__(
        self, num_local_experts: int, group: ProcessGroup | None = None, ranks_per_node: int | None = None
    ) -> None:
        """`ranks_per_node`: neighbouring ranks of the job on a node, by default as the environment says.

        All ranks of the group have to call this together.

        Raises:
            ValueError: on all of them, where the group does not take up whole nodes or the nodes differ.
        """
        super().__init__(num_local_experts, group)
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        found: list[int] = [0] * ranks
        dist.all_gather_object(found, ranks_in_node() if ranks_per_node is None else ranks_per_node, group=group)
        inside = _agreed(found)
        first = rank - rank % inside
        self.across = AllToAllDispatcher(num_local_experts * inside, group, range(rank % inside, ranks, inside))
        self.within = AllToAllDispatcher(num_local_experts, group, range(first, first + inside))

    def dispatch(self, x_TH: torch.Tensor, idx_TK: torch.Tensor, weights_TK: torch.Tensor) -> Dispatched:
        """See `Dispatcher.dispatch`."""
        to_node = self.across.dispatch(x_TH, idx_TK, weights_TK)
        # Experts of other nodes are those of no peer from here on.
        to_rank = self.within.dispatch(to_node.rows_RH, to_node.idx_RK, to_node.weights_RK)
        return replace(to_rank, way_back=(to_rank.way_back, to_node.way_back))

    def combine(self, rows_RH: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """See `Dispatcher.combine`."""
        for way_back in dispatched.way_back:
            rows_RH = sum_at_origin(rows_RH, way_back)
        return rows_RH


def ranks_in_node() -> int:
    """Neighbouring ranks of the job that share a node: what the environment says, 0 where it says nothing."""
    for name in (RANKS_PER_NODE, "LOCAL_WORLD_SIZE"):
        if name in os.environ:
            value = os.environ[name]
            if not (value.isdecimal() and int(value) > 0):
                raise ValueError(f"{name}={value!r}: give a whole number of ranks, 1 or more")
            return int(value)
    return 0


def ranks_of_group_in_node(ranks: int, ranks_per_node: int) -> int | None:
    """How many of a group's `ranks` neighbouring ranks share a node; None where its nodes would be cut differently.

    Example: nodes of 8 ranks hold 4 of 4, 8 of 16, and of 12 there is no such number.
    """
    if ranks_per_node and ranks_per_node % ranks == 0:
        return ranks
    return ranks_per_node if ranks_per_node and ranks % ranks_per_node == 0 else None


def _agreed(found: list[int]) -> int:
    """The ranks of the group on a node, from what each of its ranks says is on its own."""
    ranks, per_node = len(found), found[0]
    advice = f"set {RANKS_PER_NODE} on all ranks alike, or use dispatcher='all_to_all'"
    if min(found) < 1:
        raise ValueError(f"dispatcher='hierarchical': how many ranks has a node? Start them with torchrun, or {advice}")
    if len(set(found)) > 1:
        sizes = " and ".join(map(str, sorted(set(found))))
        raise ValueError(f"dispatcher='hierarchical': nodes of {sizes} ranks, where all need as many; {advice}")
    inside = ranks_of_group_in_node(ranks, per_node)
    if inside is None:
        fits = [size for size in range(1, per_node) if per_node % size == 0]
        raise ValueError(
            f"dispatcher='hierarchical': ep_size={ranks} does not take up whole nodes of {per_node} ranks; use an "
            f"ep_size of {', '.join(map(str, fits))} or a multiple of {per_node}, or dispatcher='all_to_all'"
        )
    return inside
