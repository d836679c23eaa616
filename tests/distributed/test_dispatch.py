"""The dispatchers alone: dispatch → local experts → combine against all tokens and all experts in one process.

Dims: see slipstream/moe/dispatch/base.py; E experts of all ranks, N tokens of all ranks.
"""

import warnings
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from slipstream.moe.dispatch import AllGatherDispatcher, AllToAllDispatcher, Dispatched, Dispatcher, LocalDispatcher
from slipstream.moe.dispatch.base import keep_local, pack_routes, unpack_routes
from slipstream.moe.reference import experts_reference
from tests.distributed.harness import run_ranks
from tests.distributed.stand_in_deep_ep import StandInDispatcher

OURS: dict[str, type[Dispatcher]] = {"all_to_all": AllToAllDispatcher, "all_gather": AllGatherDispatcher}
BACKENDS = OURS | {"deepep": StandInDispatcher}
EVEN = {2: (7, 7), 4: (5, 5, 5, 5)}
RAGGED = {2: (9, 4), 4: (3, 11, 1, 6)}
EMPTY_RANK = {2: (0, 8), 4: (6, 0, 5, 0)}
ALL_EMPTY = {2: (0, 0), 4: (0, 0, 0, 0)}
HIDDEN, INTERMEDIATE, TOP_K, LOCAL_EXPERTS = 16, 8, 3, 2


class Case(NamedTuple):
    backend: str
    counts: tuple[int, ...]  # tokens per rank
    routing: str = "random"
    dtype: torch.dtype = torch.float32
    checkpointed: bool = False
    frozen: bool = False  # only the experts train
    device: str = "cpu"


def _choice(routing: str, tokens: int, experts: int) -> torch.Tensor:
    """Distinct experts per token, `[tokens, K]`; only "one_expert" repeats one."""
    scores = torch.rand(tokens, experts)
    if routing == "skewed":
        scores = scores / torch.arange(1, experts + 1) ** 2
    if routing == "last_rank":
        scores[:, -LOCAL_EXPERTS:] += 1
    if routing == "one_expert":
        return torch.full((tokens, 1), 1)
    return scores.topk(TOP_K, dim=1).indices


def _activation(hidden: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(hidden)


def _differences(case: Case) -> tuple[dict[str, float], list[str], int]:
    """Largest difference from one process relative to its largest value, the collectives launched, rows received."""
    torch.manual_seed(0)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    experts, dtype = LOCAL_EXPERTS * ranks, case.dtype
    x_NH = torch.randn(sum(case.counts), HIDDEN)
    idx_NK = _choice(case.routing, len(x_NH), experts)
    weights_NK = torch.rand(idx_NK.shape)
    up_EHI = torch.randn(experts, HIDDEN, INTERMEDIATE)
    down_EIH = torch.randn(experts, INTERMEDIATE, HIDDEN)
    target_NH = torch.randn_like(x_NH)
    x_NH, idx_NK, weights_NK, up_EHI, down_EIH, target_NH = (
        tensor.to(case.device) for tensor in (x_NH, idx_NK, weights_NK, up_EHI, down_EIH, target_NH)
    )

    full = [tensor.to(dtype).float().requires_grad_() for tensor in (x_NH, weights_NK, up_EHI, down_EIH)]
    out_NH = experts_reference(full[0], idx_NK, full[1], full[2], full[3], _activation)
    (out_NH * target_NH).sum().backward()

    ends = [0, *torch.tensor(case.counts).cumsum(0).tolist()]
    mine = slice(*list(pairwise(ends))[rank])
    owned = slice(rank * LOCAL_EXPERTS, (rank + 1) * LOCAL_EXPERTS)
    parts = [mine, mine, owned, owned]
    local = [tensor.detach()[part].to(dtype).clone() for tensor, part in zip(full, parts, strict=True)]
    for tensor in local[2:] if case.frozen else local:
        tensor.requires_grad_()
    dispatcher = BACKENDS[case.backend](LOCAL_EXPERTS)
    received: list[Dispatched] = []

    def layer(x_TH: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        sent = dispatcher.dispatch(x_TH, idx_NK[mine], weights_TK)
        received.append(sent)
        rows_RH = experts_reference(sent.rows_RH, sent.idx_RK, sent.weights_RK, local[2], local[3], _activation)
        # Slots of other ranks weigh 0, and whatever gradient they get here has to be ignored.
        elsewhere_R1 = (sent.weights_RK * (sent.idx_RK == LOCAL_EXPERTS)).sum(dim=1, keepdim=True)
        return dispatcher.combine(rows_RH + 7 * elsewhere_R1, sent)

    launched: list[str] = []
    for name in ("all_to_all_single", "all_gather_into_tensor"):
        _record(name, launched)
    out_TH = checkpoint(layer, *local[:2], use_reentrant=False) if case.checkpointed else layer(*local[:2])
    (out_TH.float() * target_NH[mine]).sum().backward()

    assert out_TH.dtype == dtype
    found = {"out": _difference(out_TH, out_NH[mine], out_NH)}
    for name, tensor, whole, part in zip(("x", "weights", "up", "down"), local, full, parts, strict=True):
        if tensor.requires_grad:
            assert tensor.grad is not None
            assert whole.grad is not None
            found[name] = _difference(tensor.grad, whole.grad[part], whole.grad)
    here_RK = received[0].idx_RK < LOCAL_EXPERTS
    assert received[0].num_slots in (None, here_RK.sum())
    rows = int(here_RK.any(dim=1).sum())
    return found, launched, rows


def _record(name: str, launched: list[str]) -> None:
    original = getattr(dist, name)

    def recorded(*args: object, **kwargs: object) -> object:
        launched.append(name)
        return original(*args, **kwargs)

    setattr(dist, name, recorded)


def _difference(found: torch.Tensor, expected: torch.Tensor, whole: torch.Tensor) -> float:
    assert found.shape == expected.shape
    if not found.numel():
        return 0.0
    return ((found.float() - expected).abs().max() / whole.abs().max().clamp(min=1e-6)).item()


def _check(case: Case, tolerance: float) -> list[tuple[dict[str, float], list[str], int]]:
    backend = "gloo" if case.device == "cpu" else "nccl"
    results = run_ranks(_differences, len(case.counts), case, backend=backend)
    for rank, (found, launched, _) in enumerate(results):
        assert max(found.values()) < tolerance, (rank, found)
        assert launched == results[0][1], "every rank launches the same collectives"
    return results


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("routing", ["random", "skewed", "one_expert", "last_rank"])
def test_routings(backend: str, ranks: int, routing: str) -> None:
    _check(Case(backend, EVEN[ranks], routing), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("counts", [RAGGED, EMPTY_RANK, ALL_EMPTY], ids=["ragged", "empty_rank", "all_empty"])
def test_token_counts(backend: str, ranks: int, counts: dict[int, tuple[int, ...]]) -> None:
    _check(Case(backend, counts[ranks]), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16(backend: str) -> None:
    _check(Case(backend, RAGGED[4], dtype=torch.bfloat16), 3e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_experts_train(backend: str) -> None:
    _check(Case(backend, EMPTY_RANK[2], frozen=True), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend: str) -> None:
    _check(Case(backend, EMPTY_RANK[4], checkpointed=True), 1e-5)


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        # sizes, rows, routes; rows back | gradients there; gradients of rows and weights back
        ("all_to_all", ["all_to_all_single"] * 7),
        (
            "all_gather",
            ["all_gather_into_tensor"] * 3
            + ["all_to_all_single", "all_gather_into_tensor", "all_to_all_single", "all_to_all_single"],
        ),
        # the stand-in's: sizes, rows, ids, weights; rows back | gradients there; gradients of rows and weights back
        ("deepep", ["all_to_all_single"] * 8),
    ],
)
def test_collectives_do_not_depend_on_the_routing(backend: str, expected: list[str]) -> None:
    for case in (Case(backend, EVEN[2]), Case(backend, EMPTY_RANK[2], "one_expert")):
        assert _check(case, 1e-5)[0][1] == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_arrives_once(backend: str) -> None:
    counts = RAGGED[4]
    results = _check(Case(backend, counts), 1e-5)
    torch.manual_seed(0)
    torch.randn(sum(counts), HIDDEN)
    owners = _choice("random", sum(counts), LOCAL_EXPERTS * 4) // LOCAL_EXPERTS
    distinct = [int((owners == rank).any(dim=1).sum()) for rank in range(4)]
    assert [rows for *_, rows in results] == distinct
    assert sum(distinct) < owners.numel()


def _sum_of_ranks(backend: str) -> float:
    """What comes back for a token to which rank 0 adds 256, ranks 1 and 2 add 1 each and rank 3 nothing, in bf16."""
    rank = dist.get_rank()
    tokens = 1 if rank == 0 else 0
    dispatcher = BACKENDS[backend](1)
    x_TH = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16)
    sent = dispatcher.dispatch(x_TH, torch.arange(3).repeat(tokens, 1), torch.ones(tokens, 3))
    assert len(sent.rows_RH) >= 1, "grouped GEMMs need not take empty input"
    here_R1 = (sent.idx_RK == 0).any(dim=1, keepdim=True)
    out_TH = dispatcher.combine((sent.rows_RH + (1.0 if rank else 256.0)) * here_R1, sent)
    return out_TH.sum().item() / HIDDEN


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_in_fp32(backend: str) -> None:
    # From 256 on bf16 has only even numbers, so that 256 + 1 = 256 there, and twice.
    assert run_ranks(_sum_of_ranks, 4, backend) == [258.0, 0.0, 0.0, 0.0]


def _host_syncs(backend: str) -> tuple[int, int]:
    """How often the host waits for the device in dispatch, and in combine and both backwards."""
    x_TH = torch.randn(64, HIDDEN, device="cuda", requires_grad=True)
    idx_TK = torch.rand(64, 2 * LOCAL_EXPERTS, device="cuda").topk(TOP_K, dim=1).indices
    weights_TK = torch.rand(64, TOP_K, device="cuda", requires_grad=True)
    dispatcher = BACKENDS[backend](LOCAL_EXPERTS)
    for _ in range(2):  # the first round also sets up NCCL
        counts = []
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sent = dispatcher.dispatch(x_TH, idx_TK, weights_TK)
            counts.append(len(caught))
            out_TH = dispatcher.combine(sent.rows_RH * sent.weights_RK.sum(dim=1, keepdim=True), sent)
            out_TH.sum().backward()
            counts.append(len(caught) - counts[0])
        torch.cuda.set_sync_debug_mode("default")
    return counts[0], counts[1]


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("backend", OURS)
def test_the_host_waits_once(backend: str) -> None:
    assert run_ranks(_host_syncs, 2, backend, backend="nccl") == [(1, 0), (1, 0)]


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("counts", [RAGGED, EMPTY_RANK, ALL_EMPTY], ids=["ragged", "empty_rank", "all_empty"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_nccl(backend: str, counts: dict[int, tuple[int, ...]], dtype: torch.dtype, tolerance: float) -> None:
    for routing in ("random", "one_expert"):
        _check(Case(backend, counts[2], routing, dtype, device="cuda"), tolerance)


def test_local() -> None:
    x_TH, idx_TK, weights_TK = torch.randn(4, 8), torch.randint(0, 6, (4, 2)), torch.rand(4, 2)
    dispatcher = LocalDispatcher(6)
    sent = dispatcher.dispatch(x_TH, idx_TK, weights_TK)
    assert (sent.rows_RH is x_TH, sent.idx_RK is idx_TK, sent.weights_RK is weights_TK) == (True, True, True)
    assert dispatcher.combine(x_TH, sent) is x_TH


def test_refusals() -> None:
    x_TH, idx_TK, weights_TK = torch.randn(4, 8), torch.randint(0, 6, (4, 2)), torch.rand(4, 2)
    with pytest.raises(ValueError, match="1 expert or more"):
        LocalDispatcher(0)
    with pytest.raises(TypeError, match="int64"):
        LocalDispatcher(6).dispatch(x_TH, idx_TK.int(), weights_TK)
    for bad in ((x_TH[:3], idx_TK, weights_TK), (x_TH, idx_TK, weights_TK[:, :1]), (x_TH[None], idx_TK, weights_TK)):
        with pytest.raises(ValueError, match="must fit"):
            LocalDispatcher(6).dispatch(*bad)


def test_routes_travel_exactly() -> None:
    idx_NK = torch.tensor([[5, 1, 7], [0, 6, 4]])
    for dtype in (torch.float32, torch.bfloat16):
        weights_NK = torch.rand(2, 3).to(dtype)
        idx_back, weights_back = unpack_routes(pack_routes(idx_NK, weights_NK), dtype)
        assert torch.equal(idx_back, idx_NK)
        assert torch.equal(weights_back, weights_NK)
    local_NK, kept_NK = keep_local(idx_NK, weights_NK, first_expert=4, num_local_experts=4)
    assert local_NK.tolist() == [[1, 4, 3], [4, 2, 0]]
    assert (kept_NK == 0).tolist() == [[False, True, False], [True, False, False]]
