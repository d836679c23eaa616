"""Exchanges by stores into other ranks' memory: the dispatcher, and the operator that holds exchange and experts.

On a CPU the ranks share files and the kernels are interpreted, in a process of their own (`test_interpreted`).

Dims: see slipstream/moe/dispatch/base.py; E experts of all ranks, I intermediate.
"""

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from slipstream.kernels.expert_activation import Activation
from slipstream.moe.activation import register
from slipstream.moe.dispatch import NvlinkDispatcher, nvlink_experts, peers
from slipstream.moe.lora import LowRank
from slipstream.moe.reference import experts_reference
from tests.distributed import test_dispatch
from tests.distributed.harness import RankFailedError, run_ranks
from tests.distributed.test_dispatch import ALL_EMPTY, EMPTY_RANK, EVEN, LOCAL_EXPERTS, RAGGED, TOP_K
from tests.kernels.conditions import INTERPRETED

HIDDEN, INTERMEDIATE = 24, 16
OPERATOR: Any = sys.modules[nvlink_experts.__module__]
ROOM = OPERATOR.WORST_CASE_BYTES  # which some cases change
gpus = torch.cuda.device_count()
DEVICE = "cuda" if gpus > 1 else "cpu"
BACKEND = "nccl" if gpus > 1 else "gloo"
runnable = pytest.mark.skipif(not (INTERPRETED or gpus > 1), reason="run by test_interpreted, or on two GPUs")
RANKS = [pytest.param(2, id="2 ranks")]
RANKS += [pytest.param(4, id="4 ranks", marks=pytest.mark.skipif(0 < gpus < 4, reason="needs 4 GPUs"))]


@pytest.mark.long
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED or gpus > 1, reason="the other tests run by themselves")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_interpreted(which: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    marks = f"{which} and not gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marks]
    command += [str(Path(__file__).with_name(name)) for name in ("test_nvlink.py", "test_nvlink_models.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def run(function: Any, ranks: int, *args: Any, timeout: float = 300.0) -> list[Any]:
    return run_ranks(function, ranks, *args, timeout=timeout, backend=BACKEND)


def _through_the_dispatcher(cases: dict[str, test_dispatch.Case]) -> dict[str, dict[str, float]]:
    test_dispatch.BACKENDS["nvlink"] = NvlinkDispatcher
    return {name: test_dispatch._differences(case._replace(device=DEVICE))[0] for name, case in cases.items()}


@runnable
@pytest.mark.parametrize("ranks", RANKS)
def test_dispatcher(ranks: int) -> None:
    routings = ("random", "skewed", "one_expert", "last_rank")
    cases = {routing: test_dispatch.Case("nvlink", EVEN[ranks], routing) for routing in routings}
    for found in run(_through_the_dispatcher, ranks, cases):
        for name, differences in found.items():
            assert max(differences.values()) < 1e-5, (name, differences)


CASES = {
    "ragged": test_dispatch.Case("nvlink", RAGGED[2]),
    "empty rank": test_dispatch.Case("nvlink", EMPTY_RANK[2]),
    "all empty": test_dispatch.Case("nvlink", ALL_EMPTY[2]),
    "checkpointed": test_dispatch.Case("nvlink", RAGGED[2], checkpointed=True),
    "only the experts train": test_dispatch.Case("nvlink", EMPTY_RANK[2], frozen=True),
}


@runnable
def test_dispatcher_with() -> None:
    bf16 = test_dispatch.Case("nvlink", RAGGED[2], dtype=torch.bfloat16)
    for found in run(_through_the_dispatcher, 2, CASES | {"bf16": bf16}):
        for name, differences in found.items():
            assert max(differences.values()) < (3e-2 if name == "bf16" else 1e-5), (name, differences)


class Layer(NamedTuple):
    counts: tuple[int, ...]
    biased: bool = False
    exact: bool = False  # the host asks for the number of rows
    checkpointed: bool = False
    compiled: bool = False
    frozen: bool = False
    adapted: str = ""  # the projections that have factors: "up", "down" or both
    frozen_base: bool = False
    divisor: float = 1.0
    dtype: torch.dtype = torch.float32
    calls: int = 1


def _through_the_operator(cases: dict[str, Layer]) -> dict[str, dict[str, float]]:
    return {name: _operator_differences(case) for name, case in cases.items()}


def _operator_differences(case: Layer) -> dict[str, float]:
    """Largest difference from one process, relative to its largest value."""
    torch.manual_seed(0)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    device = torch.device(DEVICE, rank) if DEVICE == "cuda" else torch.device("cpu")
    experts = LOCAL_EXPERTS * ranks
    activation = Activation("silu")
    name = register(str(activation), activation)
    OPERATOR.WORST_CASE_BYTES = 0 if case.exact else ROOM
    group = peers.peers_of(None, device)
    operator: Any = nvlink_experts
    if case.compiled:
        torch._dynamo.config.capture_dynamic_output_shape_ops = True
        operator = torch.compile(nvlink_experts, backend="aot_eager", fullgraph=True, dynamic=True)
    worst: dict[str, float] = {}
    for call in range(case.calls):
        counts = [count + call * (rank + 1) for rank, count in enumerate(case.counts)]  # the areas have to grow
        x_NH = torch.randn(sum(counts), HIDDEN)
        idx_NK = test_dispatch._choice("random", len(x_NH), experts)
        weights_NK, target_NH = torch.rand(idx_NK.shape), torch.randn_like(x_NH)
        up, down = torch.randn(experts, HIDDEN, 2 * INTERMEDIATE) / 5, torch.randn(experts, INTERMEDIATE, HIDDEN) / 4
        inputs = {"x": x_NH, "weights": weights_NK, "up": up, "down": down}
        if case.biased:
            inputs |= {"up_bias": torch.randn(experts, 2 * INTERMEDIATE), "down_bias": torch.randn(experts, HIDDEN)}
        for key in case.adapted.split():
            _, wide, out = inputs[key].shape
            inputs |= {f"{key}_a": torch.randn(experts, wide, 8) / 5, f"{key}_b": torch.randn(experts, 8, out) / 5}
        whole = {key: tensor.to(device, case.dtype).float().requires_grad_() for key, tensor in inputs.items()}
        idx_NK, target_NH = idx_NK.to(device), target_NH.to(device)
        up, down = (
            whole[key] + whole[f"{key}_a"] @ whole[f"{key}_b"] if key in case.adapted else whole[key]
            for key in ("up", "down")
        )
        out_NH = experts_reference(
            whole["x"], idx_NK, whole["weights"], up, down, activation, whole.get("up_bias"), whole.get("down_bias")
        )
        (out_NH * target_NH).sum().backward()

        ends = [0, *torch.tensor(counts).cumsum(0).tolist()]
        mine = slice(*list(pairwise(ends))[rank])
        owned = slice(rank * LOCAL_EXPERTS, (rank + 1) * LOCAL_EXPERTS)
        parts = {key: mine if key in ("x", "weights") else owned for key in whole}
        local = {key: tensor.detach()[parts[key]].to(case.dtype).clone() for key, tensor in whole.items()}
        base = ("up", "down", "up_bias", "down_bias")
        for key, tensor in local.items():
            if not ((case.frozen and key in ("x", "weights")) or (case.frozen_base and key in base)):
                tensor.requires_grad_()

        def layer(x: torch.Tensor, weights: torch.Tensor, idx=idx_NK[mine], local=local) -> torch.Tensor:
            lora = {f"{key}_lora": LowRank(local[f"{key}_a"], local[f"{key}_b"]) for key in case.adapted.split()}
            biases = (local.get("up_bias"), local.get("down_bias"))
            return operator(
                x, weights, idx, local["up"], local["down"], name, *biases, **lora, peers=group.name,
                divisor=case.divisor,
            )  # fmt: skip

        inputs_TH = (local["x"], local["weights"])
        out_TH = checkpoint(layer, *inputs_TH, use_reentrant=False) if case.checkpointed else layer(*inputs_TH)
        (out_TH.float() * target_NH[mine]).sum().backward()
        found = {"out": test_dispatch._difference(out_TH.detach(), out_NH[mine], out_NH)}
        for key, tensor in local.items():
            full = whole[key]
            assert (tensor.grad is not None) == tensor.requires_grad, key
            if tensor.grad is not None:
                assert full.grad is not None
                scale = 1.0 if key in ("x", "weights") else case.divisor
                found[key] = test_dispatch._difference(tensor.grad * scale, full.grad[parts[key]], full.grad)
        worst = {key: max(worst.get(key, 0.0), value) for key, value in found.items()}
    return worst


TOGETHER = {
    "ragged": Layer((9, 4), divisor=2.0),
    "no tokens": Layer((0, 8)),
    "biases, exact": Layer((9, 4), biased=True, exact=True),
    "checkpointed": Layer((5, 6), checkpointed=True),
    "bf16": Layer((9, 4), dtype=torch.bfloat16, biased=True),
    "compiled": Layer((9, 4), compiled=True, calls=3),
    "adapters": Layer((9, 4), adapted="up down", frozen_base=True, divisor=2.0),
    "adapters, biases, trained base": Layer((0, 8), adapted="up down", biased=True, divisor=2.0),
    "adapter on down, exact, bf16": Layer((9, 4), adapted="down", exact=True, frozen_base=True, dtype=torch.bfloat16),
    "adapters, compiled": Layer((9, 4), adapted="up down", frozen_base=True, compiled=True, calls=2),
}
MORE = {
    "even": Layer((7, 7)),
    "none anywhere": Layer((0, 0)),
    "exact": Layer((9, 4), exact=True),
    "exact, none anywhere": Layer((0, 0), exact=True),
    "biases, exact, divisor": Layer((3, 5), biased=True, exact=True, divisor=4.0),
    "only the experts train": Layer((5, 0), frozen=True),
    "compiled, biases, exact": Layer((9, 4), compiled=True, biased=True, exact=True),
    "growing": Layer((1, 2), calls=6),
    "only adapters train": Layer((5, 0), adapted="up down", frozen=True, frozen_base=True),
    "adapter on up, biases": Layer((3, 5), adapted="up", biased=True, frozen_base=True),
    "adapters, compiled, exact": Layer((9, 4), adapted="up down", biased=True, compiled=True, exact=True),
}
FOUR = {"4 ranks": Layer((3, 0, 5, 2), biased=True)}


@runnable
@pytest.mark.parametrize("cases", [TOGETHER, pytest.param(MORE, marks=pytest.mark.slow), FOUR], ids=" ".join)
def test_operator(cases: dict[str, Layer]) -> None:
    ranks = len(next(iter(cases.values())).counts)
    if 0 < gpus < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    for results in run(_through_the_operator, ranks, cases):
        for name, found in results.items():
            case = cases[name]
            assert max(found.values()) < (3e-2 if case.dtype == torch.bfloat16 else 1e-5), (name, found)
            trained = (0 if case.frozen else 2) + (0 if case.frozen_base else 4 if case.biased else 2)
            assert len(found) == 1 + trained + 2 * len(case.adapted.split()), name


def _areas_grow(_: None) -> list[int]:
    group = peers.peers_of(None, torch.device(DEVICE, dist.get_rank()) if DEVICE == "cuda" else torch.device("cpu"))
    sizes = []
    for tokens in (3, 9000 if dist.get_rank() else 5, 100):
        most = max(group.agree(tokens))
        at = group.layout(most, 64, 2, torch.float32)
        sizes.append((most, at.combine_rows - at.rows >= 2 * most * 64 * 4, group.area.numel()))
    return sizes


@runnable
def test_all_ranks_learn_of_the_largest() -> None:
    first, second = run(_areas_grow, 2, None)
    assert first == second
    assert [most for most, *_ in first] == [3, 9000, 100]
    assert all(fits for _, fits, _ in first)
    assert first[0][2] < first[1][2] == first[2][2]


def _left_alone(where: str) -> str:
    """Rank 1 ends its work early; what rank 0 then hears, and whether it was within the timeout."""
    rank = dist.get_rank()
    device = torch.device(DEVICE, rank) if DEVICE == "cuda" else torch.device("cpu")
    group = peers.peers_of(None, device)
    dispatcher = NvlinkDispatcher(LOCAL_EXPERTS)
    x_TH = torch.randn(3, HIDDEN, device=device)
    idx_TK, weights_TK = torch.arange(TOP_K, device=device).repeat(3, 1), torch.rand(3, TOP_K, device=device)
    sent = dispatcher.dispatch(x_TH, idx_TK, weights_TK)  # the kernels compile meanwhile
    dispatcher.combine(sent.rows_RH, sent)
    group.window.timeout = int(group.window.timeout / group.seconds)
    group.seconds = 1.0
    sent = dispatcher.dispatch(x_TH, idx_TK, weights_TK)
    if rank == 0 or where == "before a dispatch":
        dispatcher.combine(sent.rows_RH, sent)
    if rank == 1:
        time.sleep(4)
        return ""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    try:
        dispatcher.dispatch(x_TH, idx_TK, weights_TK)
    except RuntimeError as error:
        assert group.report.item() == (2 if where == "in a combine" else 0)
        return str(error)
    return "no error"


@runnable
@pytest.mark.parametrize("where", ["before a dispatch", "in a combine"])
def test_a_rank_that_does_not_answer(where: str) -> None:
    heard, _ = run(_left_alone, 2, where)
    assert heard.startswith("rank 1 did not answer rank 0 within 1 s"), heard


def _dies(_: None) -> None:
    _left_alone("before a dispatch") if dist.get_rank() == 0 else os._exit(1)


@runnable
def test_a_rank_that_dies() -> None:
    with pytest.raises(RankFailedError, match="rank 1 died"):
        run(_dies, 2, None)


def _out_of_turn(_: None) -> str:
    device = torch.device(DEVICE, dist.get_rank()) if DEVICE == "cuda" else torch.device("cpu")
    dispatcher = NvlinkDispatcher(1)
    inputs = (torch.randn(2, 8, device=device), torch.zeros(2, 1, dtype=torch.int64, device=device))
    dispatcher.dispatch(*inputs, torch.ones(2, 1, device=device))
    try:
        dispatcher.dispatch(*inputs, torch.ones(2, 1, device=device))
    except RuntimeError as error:
        return str(error)
    return "no error"


@runnable
def test_dispatches_need_their_combines() -> None:
    assert all("a dispatch needs its combine" in heard for heard in run(_out_of_turn, 2, None))
