"""Exchange in two stages, between nodes and inside them; here a node is so many neighbouring ranks.

Dims: see slipstream/moe/dispatch/base.py.
"""

import os
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist

import slipstream
from slipstream import AutoModelForCausalLM
from slipstream.moe.dispatch import AllGatherDispatcher, Dispatcher, HierarchicalDispatcher
from slipstream.moe.dispatch.hierarchical import RANKS_PER_NODE, ranks_of_group_in_node
from tests.distributed import test_dispatch
from tests.distributed.harness import run_ranks
from tests.distributed.test_dispatch import ALL_EMPTY, EMPTY_RANK, EVEN, LOCAL_EXPERTS, RAGGED, Case
from tests.tiny_models import sgd_losses, tiny_config

HIDDEN = 16
NODES = [(4, 2), (2, 1), (2, 2)]  # ranks, ranks per node
AS_NODES = pytest.mark.parametrize(("ranks", "per_node"), NODES, ids=["2 x 2", "2 x 1", "1 x 2"])


def _cases(ranks: int, device: str = "cpu") -> list[Case]:
    routings = ("random", "skewed", "one_expert", "last_rank")
    cases = [Case("hierarchical", EVEN[ranks], routing) for routing in routings]
    cases += [Case("hierarchical", counts[ranks]) for counts in (RAGGED, EMPTY_RANK, ALL_EMPTY)]
    cases += [Case("hierarchical", EMPTY_RANK[ranks], "one_expert", checkpointed=True)]
    cases += [Case("hierarchical", EMPTY_RANK[ranks], frozen=True)]
    cases += [Case("hierarchical", RAGGED[ranks], dtype=torch.bfloat16)]
    return [case._replace(device=device) for case in cases]


def _differences(ranks: int, per_node: int, device: str) -> list[tuple[dict[str, float], list[str]]]:
    """From one process, and the collectives launched, for each case."""
    test_dispatch.BACKENDS["hierarchical"] = partial(HierarchicalDispatcher, ranks_per_node=per_node)  # type: ignore[assignment]
    original, results = dist.all_to_all_single, []
    for case in _cases(ranks, device):
        found, launched, _ = test_dispatch._differences(case)
        dist.all_to_all_single = original
        results.append((found, launched))
    return results


def _check(ranks: int, per_node: int, device: str = "cpu") -> None:
    backend = "gloo" if device == "cpu" else "nccl"
    results = run_ranks(_differences, ranks, ranks, per_node, device, timeout=180, backend=backend)
    for case, *by_rank in zip(_cases(ranks), *results, strict=True):
        for found, launched in by_rank:
            assert max(found.values()) < (1e-5 if case.dtype == torch.float32 else 3e-2), (case, found)
            # In each stage: sizes, rows and routes, rows back | gradients there, gradients of rows and weights back.
            each = 4 + (4 if case.checkpointed else 0) + (1 if case.frozen else 3)
            assert launched == ["all_to_all_single"] * 2 * each, (case, launched)


@AS_NODES
def test_against_one_process(ranks: int, per_node: int) -> None:
    _check(ranks, per_node)


def _inputs(counts: tuple[int, ...], experts: int) -> list[torch.Tensor]:
    """Tokens that say which they are, ids and weights, and what experts make of them, of this rank."""
    torch.manual_seed(0)
    tokens = sum(counts)
    x_NH = torch.randn(tokens, HIDDEN)
    x_NH[:, 0] = torch.arange(tokens)
    whole = [x_NH, test_dispatch._choice("skewed", tokens, experts), torch.rand(tokens, 3), torch.randn(tokens, HIDDEN)]
    mine = slice(*list(pairwise([0, *accumulate(counts)]))[dist.get_rank()])
    return [tensor[mine] for tensor in whole]


def _rows(dispatcher: Dispatcher, counts: tuple[int, ...]) -> Any:
    """What this rank's experts get, as sorted rows, and outputs and gradients of this rank's tokens."""
    x_TH, idx_TK, weights_TK, target_TH = _inputs(counts, LOCAL_EXPERTS * dist.get_world_size())
    x_TH, weights_TK = x_TH.requires_grad_(), weights_TK.requires_grad_()
    sent = dispatcher.dispatch(x_TH, idx_TK, weights_TK)
    here_RK = sent.idx_RK < LOCAL_EXPERTS
    received = torch.cat([sent.rows_RH, sent.idx_RK, sent.weights_RK], dim=1)[here_RK.any(dim=1)]
    scale_RK = (sent.idx_RK + 1) * (sent.weights_RK * here_RK) * (1 + dist.get_rank())
    out_TH = dispatcher.combine(sent.rows_RH * scale_RK.sum(dim=1, keepdim=True), sent)
    (out_TH * target_TH).sum().backward()
    order = received[:, 0].argsort()
    return received[order].detach(), [out_TH.detach(), x_TH.grad, weights_TK.grad]


def _beside_all_gather(counts: tuple[int, ...], per_node: int) -> tuple[list[int], int]:
    """Rows that this rank sends to other nodes in each all-to-all of rows, and its pairs of a token and such a node."""
    rank = dist.get_rank()
    expected, results = _rows(AllGatherDispatcher(LOCAL_EXPERTS), counts)
    crossing, original = [], dist.all_to_all_single

    def counted(out: Any, rows: Any, out_splits: Any, in_splits: Any, group: Any) -> None:
        original(out, rows, out_splits, in_splits, group=group)
        if rows.dtype == torch.float32 and rows.shape[1] == HIDDEN:
            elsewhere = [peer for peer in range(len(counts)) if peer // per_node != rank // per_node]
            assert all(peer % per_node == rank % per_node for peer in elsewhere if in_splits[peer]), "same local number"
            crossing.append(sum(in_splits[peer] for peer in elsewhere))

    dist.all_to_all_single = counted
    found, values = _rows(HierarchicalDispatcher(LOCAL_EXPERTS, ranks_per_node=per_node), counts)
    assert torch.equal(found, expected), "tokens, experts and weights, bit for bit"
    for value, wanted in zip(values, results, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
    again, values_again = _rows(HierarchicalDispatcher(LOCAL_EXPERTS, ranks_per_node=per_node), counts)
    assert torch.equal(again, found)
    assert all(torch.equal(*pair) for pair in zip(values, values_again, strict=True)), "a fixed order of sums"

    _, idx_TK, *_ = _inputs(counts, LOCAL_EXPERTS * len(counts))
    node_TK = idx_TK // (LOCAL_EXPERTS * per_node)
    others = [node for node in range(len(counts) // per_node) if node != rank // per_node]
    return crossing[: len(crossing) // 2], sum(int((node_TK == node).any(dim=1).sum()) for node in others)


@AS_NODES
def test_a_token_crosses_the_network_once_per_node(ranks: int, per_node: int) -> None:
    results = run_ranks(_beside_all_gather, ranks, RAGGED[ranks], per_node)
    pairs = sum(expected for _, expected in results)
    assert (pairs > 0) == (ranks > per_node)
    # across, within | within, across | across, within | within, across
    there, back = [pairs, 0], [0, pairs]
    assert [sum(rows) for rows in zip(*(rows for rows, _ in results), strict=True)] == [*there, *back, *there, *back]
    for rows, expected in results:
        assert rows[0] == rows[4] == expected


def _sum_in_node(_: None) -> float:
    """What comes back for a token to which ranks 0, 1, 2 of one node add 256, 1 and 1, in bf16."""
    dispatcher = HierarchicalDispatcher(1, ranks_per_node=4)
    x_TH = torch.zeros(1 if dist.get_rank() == 3 else 0, HIDDEN, dtype=torch.bfloat16)
    sent = dispatcher.dispatch(x_TH, torch.arange(3).repeat(len(x_TH), 1), torch.ones(len(x_TH), 3))
    assert len(sent.rows_RH) >= 1, "grouped GEMMs need not take empty input"
    here_R1 = (sent.idx_RK == 0).any(dim=1, keepdim=True)
    return dispatcher.combine((sent.rows_RH + (1.0 if dist.get_rank() else 256.0)) * here_R1, sent).sum().item()


def test_sums_in_fp32() -> None:
    assert run_ranks(_sum_in_node, 4, None) == [0.0, 0.0, 0.0, 258.0 * HIDDEN]


def _train(dispatcher: str, per_node: int, setup: dict[str, Any]) -> tuple[list[float], str, str]:
    """Losses of a tiny model, the dispatcher that it took and why."""
    os.environ[RANKS_PER_NODE] = str(per_node)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        tiny_config("qwen3_moe", num_hidden_layers=2), backend={"dispatcher": dispatcher}, distributed_setup=setup
    )
    generator, rank = torch.Generator().manual_seed(dist.get_rank()), dist.get_rank()
    losses = sgd_losses(
        model, [torch.randint(0, 64, (1, 6 + 3 * step * rank), generator=generator) for step in range(3)]
    )
    choice = slipstream.describe(model)["dispatcher"]
    return losses, choice.chosen, choice.why


@pytest.mark.parametrize(
    ("dispatcher", "per_node", "setup", "reason"),
    [
        ("auto", 2, {"ep_size": 4}, "ep_size=4, 2 nodes of 2 ranks"),
        ("hierarchical", 1, {"ep_size": 2, "activation_checkpointing": "full"}, "asked for"),  # two groups
    ],
    ids=["automatic", "two groups, checkpointed"],
)
def test_a_model_trains_as_with_all_gather(dispatcher: str, per_node: int, setup: dict[str, Any], reason: str) -> None:
    expected, found = (run_ranks(_train, 4, name, per_node, setup) for name in ("all_gather", dispatcher))
    for (losses, chosen, why), (wanted, *_) in zip(found, expected, strict=True):
        assert losses == pytest.approx(wanted, rel=1e-5)
        assert losses[-1] != pytest.approx(losses[0], rel=1e-2), "it trains"
        assert chosen == "hierarchical"
        assert reason in why


def _refused(sizes: list[str | None]) -> list[str]:
    heard = []
    for size in sizes:
        if size is None:
            del os.environ[RANKS_PER_NODE], os.environ["LOCAL_WORLD_SIZE"]
        else:
            os.environ[RANKS_PER_NODE] = size.split()[dist.get_rank() % len(size.split())]
        with pytest.raises(ValueError, match=r"all_to_all|whole number") as error:
            HierarchicalDispatcher(LOCAL_EXPERTS)
        heard.append(str(error.value))
    return heard


def test_refusals_on_all_ranks() -> None:
    for heard in run_ranks(_refused, 4, ["3", "6", "2 4", "0", None]):
        assert "ep_size=4 does not take up whole nodes of 3 ranks; use an ep_size of 1 or a multiple of 3" in heard[0]
        assert "an ep_size of 1, 2, 3 or a multiple of 6" in heard[1]
        assert "nodes of 2 and 4 ranks" in heard[2]
        assert "SLIPSTREAM_RANKS_PER_NODE='0'" in heard[3]
        assert "Start them with torchrun" in heard[4]


@pytest.mark.parametrize(
    ("ranks", "per_node", "inside"), [(4, 8, 4), (8, 8, 8), (16, 8, 8), (12, 8, None), (6, 8, None), (2, 0, None)]
)
def test_ranks_of_a_group_in_a_node(ranks: int, per_node: int, inside: int | None) -> None:
    assert ranks_of_group_in_node(ranks, per_node) == inside


def _host_syncs(per_node: int) -> tuple[int, int]:
    test_dispatch.BACKENDS["hierarchical"] = partial(HierarchicalDispatcher, ranks_per_node=per_node)  # type: ignore[assignment]
    return test_dispatch._host_syncs("hierarchical")


@pytest.mark.gpu
@test_dispatch.two_gpus
def test_the_host_waits_twice() -> None:
    assert run_ranks(_host_syncs, 2, 1, backend="nccl") == [(2, 0), (2, 0)]


@pytest.mark.gpu
@pytest.mark.parametrize(("ranks", "per_node"), [*NODES, (4, 1), (4, 4)])
def test_nccl(ranks: int, per_node: int) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    _check(ranks, per_node, "cuda")
