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
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.checkpoint import checkpoint

from slipstream import AutoModelForCausalLM, fp8, kernels
from slipstream.adapters import all_experts, install
from slipstream.compilation import compile_layers
from slipstream.kernels.expert_activation import Activation
from slipstream.moe import grouped_mm
from slipstream.moe.activation import register
from slipstream.moe.dispatch import NvlinkDispatcher, nvlink_experts, peers
from slipstream.moe.lora import LowRank
from slipstream.moe.reference import experts_reference
from tests.distributed import test_dispatch
from tests.distributed.harness import RankFailedError, run_ranks
from tests.distributed.test_adapters import adapt
from tests.distributed.test_dispatch import ALL_EMPTY, EMPTY_RANK, EVEN, LOCAL_EXPERTS, RAGGED, TOP_K
from tests.distributed.test_training import full, worst
from tests.kernels.conditions import INTERPRETED
from tests.tiny_models import sgd_losses, tiny_batch, tiny_config, tiny_model

HIDDEN, INTERMEDIATE = 24, 16
OPERATOR: Any = sys.modules[nvlink_experts.__module__]
ROOM = OPERATOR.WORST_CASE_BYTES  # which some cases change
gpus = torch.cuda.device_count()
DEVICE = "cuda" if gpus > 1 else "cpu"
BACKEND = "nccl" if gpus > 1 else "gloo"
runnable = pytest.mark.skipif(not (INTERPRETED or gpus > 1), reason="run by test_interpreted, or on two GPUs")
RANKS = [pytest.param(2, id="2 ranks")]
RANKS += [pytest.param(4, id="4 ranks", marks=pytest.mark.skipif(0 < gpus < 4, reason="needs 4 GPUs"))]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED or gpus > 1, reason="the other tests run by themselves")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_interpreted(which: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    marks = f"{which} and not gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marks, __file__]
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


def _train(dispatcher: str, compiled: bool, adapted: bool = False, experts: str = "auto") -> tuple[list[float], int]:
    """Losses of a tiny model over two steps, and how many graphs its layers had, or -1 if one of them broke."""
    torch.manual_seed(0)
    torch._dynamo.utils.counters.clear()
    if DEVICE == "cuda":
        torch.cuda.set_device(dist.get_rank())
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(
            tiny_config("qwen3_moe", num_hidden_layers=2),
            backend={"dispatcher": dispatcher, "compile": "none", "experts": experts},
            distributed_setup={"ep_size": dist.get_world_size()},
            dtype=torch.bfloat16 if experts == "fp8" else torch.float32,
        )  # fmt: skip
    if adapted:
        lora = LoraConfig(r=4, target_modules=[], target_parameters=all_experts(model), init_lora_weights=False)
        model = get_peft_model(model, lora)
    if compiled:
        compile_layers(model, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    generator, rank = torch.Generator().manual_seed(dist.get_rank()), dist.get_rank()
    ids = (torch.randint(0, 64, (1, 6 + 3 * step * rank), generator=generator) for step in range(2))
    losses = sgd_losses(model, (row.to(DEVICE) for row in ids))
    counters = torch._dynamo.utils.counters
    return losses, -1 if counters["graph_break"] else counters["stats"]["unique_graphs"]


class Adapted(NamedTuple):
    model_type: str
    only: str = ""  # the projection that has an adapter, not both
    shared: bool = False
    twice: bool = False
    in_4bit: bool = False


def _adapters_gradients(cases: dict[Adapted, Path]) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """The loss of the model and the adapter in each folder, and the gradients, on as many ranks as there are."""
    ranks, rank, setup, backend = 1, 0, None, {"compile": "none"}
    if dist.is_initialized():
        ranks, rank, setup, backend["dispatcher"] = dist.get_world_size(), dist.get_rank(), {"ep_size": 2}, "nvlink"
        NvlinkDispatcher.dispatch = None  # type: ignore[method-assign, assignment]  # what a fallback would call
    found = []
    for case, folder in cases.items():
        model = AutoModelForCausalLM.from_pretrained(
            folder, distributed_setup=setup, backend=backend, load_in_4bit=case.in_4bit
        )
        model = PeftModel.from_pretrained(model.train(), folder / "adapter", is_trainable=True)
        if case.twice:
            model.load_adapter(folder / "adapter", "other", is_trainable=True)
            model.base_model.set_adapter(["default", "other"])
        ids = tiny_batch(2, 8)[rank * 2 // ranks : (rank + 1) * 2 // ranks]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        mean = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(mean)
        grads = {name: full(p.grad) for name, p in model.named_parameters() if p.requires_grad}
        found.append((mean.item() / ranks, grads))
    return found


@pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreted")
def test_adapters_train_as_in_one_process(tmp_path: Path) -> None:
    """The same loss and gradients, without a dispatch around the experts."""
    cases = {
        Adapted("qwen3_moe", twice=True): {"target_modules": []},
        Adapted("qwen3_moe", only="gate_up_proj", shared=True): {"use_rslora": True},
        Adapted("gpt_oss", in_4bit=True): {},  # with biases
    }
    folders = {case: tmp_path / str(position) for position, case in enumerate(cases)}
    for case, settings in cases.items():
        model = tiny_model(case.model_type, None, num_hidden_layers=1)
        model.save_pretrained(folders[case])
        install(model)  # PEFT knows nothing of shared factors
        targets = [name for name in all_experts(model) if name.endswith(case.only)]
        adapt(model, case.shared, target_parameters=targets, **settings).save_pretrained(folders[case] / "adapter")
    expected = _adapters_gradients(folders)
    for results in run(_adapters_gradients, 2, folders):
        for case, (loss, grads), (wanted, references) in zip(cases, results, expected, strict=True):
            assert loss == pytest.approx(wanted, rel=1e-5), case
            factors = [grad for name, grad in grads.items() if ".experts." in name]
            assert {min(factor.shape) == 4 for factor in factors} == {case.shared}
            error, name = worst(grads, references)
            assert error < 1e-4, (case, name)


@pytest.mark.slow
@runnable
@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapters"])
def test_a_model_trains_as_with_all_to_all(adapted: bool) -> None:
    expected, found = (run(_train, 2, *how, adapted) for how in (("all_to_all", False), ("nvlink", True)))
    for (losses, graphs), (wanted, _) in zip(found, expected, strict=True):
        assert losses == pytest.approx(wanted, rel=1e-4)
        # With frozen weights what enters the first layer needs no gradient, which is a graph of its own.
        assert graphs == (2 if adapted else 1), "compiled layers share a graph, which contains the exchange"


def _train_in_fp8(dispatcher: str) -> tuple[list[float], int]:
    """Losses, and how many GEMMs were in FP8."""
    fp8.obstacle = lambda device: None
    if INTERPRETED:
        kernels.fp8.DTYPE = torch.float32  # the interpreter cannot cast to e4m3: see tests/kernels/test_fp8.py
    calls, original = [], grouped_mm.grouped_mm_fp8

    def counted(*operands: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return original(*operands)

    grouped_mm.grouped_mm_fp8 = counted
    losses, _ = _train(dispatcher, compiled=False, experts="fp8")
    return losses, len(calls)


@runnable
@pytest.mark.skipif(gpus > 1 and torch.cuda.get_device_capability() != (9, 0), reason="needs Hopper GPUs")
def test_a_model_trains_in_fp8_as_with_all_to_all() -> None:
    expected, found = (run(_train_in_fp8, 2, name) for name in ("all_to_all", "nvlink"))
    for (losses, calls), (wanted, others) in zip(found, expected, strict=True):
        assert losses == pytest.approx(wanted, rel=1e-2)
        assert calls == others == 16, "two GEMMs forward and two back, in two layers, at two steps"
