"""The exchange of tokens between ranks alone: dispatch and combine with nothing between them, ours beside others'.

Dims: T tokens of a rank, H hidden, K experts per token, E experts of all ranks, L of one, P ranks, M, N: see
kernels/nvlink_window.py.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from slipstream import hf
from slipstream.backend import is_installed
from slipstream.bench.measure import Clock
from slipstream.bench.presets import build_config
from slipstream.kernels import runs_on
from slipstream.kernels.nvlink_combine import combine_rows
from slipstream.kernels.nvlink_dispatch import dispatch_rows
from slipstream.moe.dispatch import (
    AllGatherDispatcher,
    AllToAllDispatcher,
    DeepEPDispatcher,
    Dispatcher,
    HierarchicalDispatcher,
    NvlinkDispatcher,
    choose,
)
from slipstream.moe.dispatch.deepep import free_buffers
from slipstream.moe.dispatch.peers import NoPeerAccessError, peers_of
from slipstream.moe.routing import sort_by_expert
from slipstream.planning.flops import top_k

ROUTINGS = ("uniform", "zipf", "one rank")
Part = Callable[[], object]


class _Batch:
    """One rank's tokens and their routing; the busiest rank's rows on the wire."""

    def __init__(self, tokens: int, hidden: int, k: int, experts: int, routing: str, device: torch.device) -> None:
        self.rank, self.ranks, self.experts = dist.get_rank(), dist.get_world_size(), experts
        self.local_experts = experts // self.ranks
        generator = torch.Generator(device).manual_seed(1 + self.rank)
        dtype = torch.bfloat16
        self.x_TH = torch.randn(tokens, hidden, device=device, generator=generator).to(dtype).requires_grad_()
        self.grad_TH = torch.randn(tokens, hidden, device=device, generator=generator).to(dtype)
        self.weights_TK = torch.rand(tokens, k, device=device, generator=generator).to(dtype).requires_grad_()
        scores_TE = -torch.rand(tokens, experts, device=device, generator=generator).log()
        if routing == "zipf":  # drawn with chances 1, 1/2, 1/3, …, the same on all ranks, in an order without meaning
            order = torch.randperm(experts, generator=torch.Generator().manual_seed(0)).to(device)
            scores_TE *= 1 + order
        if routing == "one rank":
            scores_TE[:, max(k, self.local_experts) :] = torch.inf
        self.idx_TK = scores_TE.topk(k, largest=False).indices
        owner_TK = self.idx_TK // self.local_experts
        goes_TP = torch.zeros(tokens, self.ranks, device=device).scatter_(1, owner_TK, 1.0)
        slots_P = torch.bincount(owner_TK.flatten(), minlength=self.ranks).float()
        self.rows = {
            "deduplicated": self._busiest(goes_TP.sum(0)),
            "each expert": self._busiest(slots_P),
            "all": tokens * (self.ranks - 1),
        }

    def _busiest(self, sent_P: Tensor) -> int:
        """Of rows sent to each rank: the most that one rank sends or receives, but for its own."""
        sent_P[self.rank] = 0
        sent_PP = _from_all(sent_P)
        return int(torch.cat([sent_PP.sum(0), sent_PP.sum(1)]).max())


def bench_dispatch(
    model: str, tokens: int, device: torch.device, *, tiny: bool = False, iterations: int = 20
) -> list[dict[str, Any]]:
    """Rows of `routing`, `contender`, and either `error` or `ms`, `gb_per_s`, `host_ms`; the same on all ranks.

    `ms` has `median`, `min` and `max` of `dispatch` and `combine` (of both as `dispatch + combine` where they are one
    call) and `backward`, which is the way of the gradients there and back, each of the slowest rank. `gb_per_s`: bytes
    that have to leave or reach the busiest rank in dispatch and combine, over their time. `host_ms`: what the host
    takes to launch both.

    Args:
        model: a preset with experts; bf16.
        tokens: of each rank.

    Raises:
        ValueError: the preset is dense, or its experts don't divide by the number of ranks.
    """
    config = build_config(model, tiny=tiny)
    config = build_config(model, experts=0, tiny=tiny) if hf.num_routed_experts(config) else config
    experts, ranks = hf.num_routed_experts(config), dist.get_world_size()
    if experts is None:
        raise ValueError(f"--model {model}: a dense model exchanges no tokens")
    if experts % ranks:
        raise ValueError(f"--nproc {ranks}: {experts} experts don't divide by it")
    hidden = config.get_text_config().hidden_size
    rows = []
    for routing in ROUTINGS:
        batch = _Batch(tokens, hidden, top_k(config), experts, routing, device)
        for name, travelling, make in _contenders(batch, device):
            about = {"tokens": tokens, "hidden": hidden, "routing": routing, "contender": name}
            wire = batch.rows[travelling] * hidden * batch.x_TH.element_size()
            try:
                rows.append({**about, "wire_bytes": wire, **_measure(make(), wire, device, iterations)})
            except (NoPeerAccessError, ImportError, ValueError) as error:  # the same on all ranks
                rows.append({**about, "error": str(error)})
    free_buffers()
    return rows


def _contenders(batch: _Batch, device: torch.device) -> Iterator[tuple[str, str, Callable[[], dict[str, Part]]]]:
    """Names, what travels, and what makes the parts to time."""
    own: dict[str, tuple[str, type[Dispatcher]]] = {
        "nvlink, any experts": ("deduplicated", NvlinkDispatcher),
        "all_to_all": ("deduplicated", AllToAllDispatcher),
        "all_gather": ("all", AllGatherDispatcher),
    }
    if choose(batch.ranks)[0] == "hierarchical":
        # The same rows as all_to_all's, so that GB/s compare as times do.
        own["hierarchical"] = ("deduplicated", HierarchicalDispatcher)
    if is_installed("deep_ep"):
        own["deepep"] = ("deduplicated", DeepEPDispatcher)
    yield "nvlink, as in our layer", "deduplicated", partial(_kernels, batch, device)
    for name, (travelling, kind) in own.items():
        yield name, travelling, partial(_dispatcher, batch, kind)
    yield "transformers all_to_all", "each expert", partial(_transformers, batch, device)


def _kernels(batch: _Batch, device: torch.device) -> dict[str, Part]:
    """What the operator launches for the exchange, with the sum over a token's experts on the way back."""
    peers = peers_of(None, device)
    (tokens, hidden), top_k, experts = batch.x_TH.shape, batch.idx_TK.shape[1], batch.local_experts
    if not runs_on(batch.x_TH):
        raise NoPeerAccessError("no GPU")
    x_TH, weights_TK = batch.x_TH.detach(), batch.weights_TK.detach()
    most = max(peers.agree(tokens))
    at = peers.layout(most, hidden, top_k, x_TH.dtype)
    rows_NH = x_TH.new_empty(at.ranks * most, hidden)
    idx_NK = torch.empty(len(rows_NH), top_k, dtype=torch.int32, device=device)
    weights_NK = torch.empty(idx_NK.shape, device=device)
    out_TH, grads_TK = torch.empty_like(x_TH), torch.empty_like(weights_TK)

    def dispatch() -> None:
        peers.layout(max(peers.agree(tokens)), hidden, top_k, x_TH.dtype)
        peers.enter("dispatch")
        dispatch_rows(
            peers.window, at, x_TH, batch.idx_TK, rows_NH, experts,
            weights_TK=weights_TK, idx_NK=idx_NK, weights_NK=weights_NK,
        )  # fmt: skip

    def combine_with(**how: Any) -> None:
        peers.enter("combine")
        combine_rows(peers.window, at, batch.idx_TK, experts, rows_RH=y_RH, row_NS=routing.row_TK, out_TH=out_TH, **how)

    def backward() -> None:
        peers.enter("dispatch")
        dispatch_rows(peers.window, at, batch.grad_TH, batch.idx_TK, peers.rows(at, x_TH.dtype), experts)
        combine_with(grads_NK=weights_NK, grads_TK=grads_TK)

    dispatch()
    routing = sort_by_expert(idx_NK, experts, at.ranks * most * top_k)
    y_RH = x_TH.new_zeros(len(routing.slot_R), hidden)
    combine_with(weights_NS=weights_NK)
    return {"dispatch": dispatch, "combine": lambda: combine_with(weights_NS=weights_NK), "backward": backward}


def _dispatcher(batch: _Batch, kind: type[Dispatcher]) -> dict[str, Part]:
    dispatcher = kind(batch.local_experts)
    state: dict[str, Any] = {}

    def dispatch() -> None:
        batch.x_TH.grad = batch.weights_TK.grad = None
        state["sent"] = dispatcher.dispatch(batch.x_TH, batch.idx_TK, batch.weights_TK)

    def combine() -> None:
        state["out"] = dispatcher.combine(state["sent"].rows_RH, state["sent"])

    return {"dispatch": dispatch, "combine": combine, "backward": lambda: state["out"].backward(batch.grad_TH)}


class _Identity(nn.Module):
    """Experts that return what they get."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, rows_RH: Tensor, idx_RK: Tensor, weights_RK: Tensor) -> Tensor:
        return rows_RH


def _transformers(batch: _Batch, device: torch.device) -> dict[str, Part]:
    """One row for each (token, expert), weighted where it came from."""
    mesh = init_device_mesh(device.type, (batch.ranks, 1), mesh_dim_names=("ep", "tp"))
    exchange = hf.exchange("all_to_all")(_Identity(batch.local_experts), mesh["ep"], mesh["tp"])
    state: dict[str, Tensor] = {}

    def forward() -> None:
        batch.x_TH.grad = batch.weights_TK.grad = None
        state["out"] = exchange(batch.x_TH, batch.idx_TK, batch.weights_TK)

    return {"dispatch + combine": forward, "backward": lambda: state["out"].backward(batch.grad_TH)}


def _measure(parts: dict[str, Part], wire: int, device: torch.device, iterations: int) -> dict[str, Any]:
    clocks, host = [], []
    for iteration in range(5 + iterations):
        started, clock = time.perf_counter(), Clock(device)
        clock.mark()
        for name, part in parts.items():
            if name == "backward":
                launched = time.perf_counter() - started
            part()
            clock.mark()
        if iteration >= 5:
            clocks.append(clock)
            host.append(launched * 1e3)
    times = zip(*(clock.intervals() for clock in clocks), strict=True)
    ms = {name: _slowest(found, device) for name, found in zip(parts, times, strict=True)}
    forward = sum(spread["median"] for name, spread in ms.items() if name != "backward")
    return {"ms": ms, "gb_per_s": 2 * wire / forward / 1e6, "host_ms": _slowest(host, device)["median"]}


def _slowest(times: Sequence[float], device: torch.device) -> dict[str, float]:
    """Median, least and most of the rank where the median is the largest."""
    mine = torch.tensor([statistics.median(times), min(times), max(times)], device=device)
    every = _from_all(mine)
    return dict(zip(("median", "min", "max"), every[every[:, 0].argmax()].tolist(), strict=True))


def _from_all(mine_N: Tensor) -> Tensor:
    """`[P, N]`."""
    every = mine_N.new_empty(dist.get_world_size() * mine_N.numel())
    dist.all_gather_into_tensor(every, mine_N.contiguous())
    return every.view(-1, mine_N.numel())
