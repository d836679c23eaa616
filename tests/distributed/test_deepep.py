"""DeepEP as a dispatcher: refusals, buffers, a model and the bench on a stand-in; the exchange by the package on GPUs.

The exchange on the stand-in is among the cases of test_dispatch.py and test_models.py.
"""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist

import slipstream
from slipstream import AutoModelForCausalLM, BackendConfig
from slipstream.bench.dispatch import bench_dispatch
from slipstream.moe.dispatch import DeepEPDispatcher, deepep
from tests.distributed import stand_in_deep_ep, test_dispatch
from tests.distributed.harness import run_ranks
from tests.distributed.stand_in_deep_ep import StandInDispatcher
from tests.distributed.test_dispatch import ALL_EMPTY, EMPTY_RANK, EVEN, LOCAL_EXPERTS, RAGGED, Case
from tests.tiny_models import sgd_losses, tiny_config

installed = find_spec("deep_ep") is not None


@pytest.mark.skipif(installed, reason="DeepEP is installed")
def test_without_the_package() -> None:
    with pytest.raises(ImportError, match=r"'deep_ep', which is not installed: build it from github.com/deepseek-ai"):
        BackendConfig(dispatcher="deepep")
    assert all("pip install sgl-deep-ep" in said[0] for said in run_ranks(_said, 2, [None]))


def _said(cases: list[Any]) -> list[str]:
    """What is said to tokens of each dtype, hidden size and experts per token; None makes the dispatcher only."""
    said = []
    for case in cases:
        try:
            dispatcher = DeepEPDispatcher(LOCAL_EXPERTS)
            if case is not None:
                dtype, hidden, top_k = case
                dispatcher.dispatch(torch.zeros(3, hidden, dtype=dtype), *torch.zeros(2, 3, top_k).long())
        except (ImportError, TypeError, ValueError) as error:
            said.append(str(error))
    dist.barrier()  # a rank that ended early would disturb those that still connect
    return said


def _refused(cases: list[Any]) -> list[str]:
    stand_in_deep_ep.install()
    said = _said(cases)
    if None not in cases:
        del stand_in_deep_ep.Buffer
        said += _said([None])
    return said


def test_refusals() -> None:
    bf16 = torch.bfloat16
    for said in run_ranks(_refused, 2, [(torch.float32, 16, 2), (bf16, 24, 2), (bf16, 8192, 2), (bf16, 16, 33)]):
        dtype, hidden, wide, top_k, build = said
        assert "carries bfloat16 rows, not torch.float32; load the model with dtype=torch.bfloat16" in dtype
        assert "hidden size 24, but DeepEP takes a multiple of 16 up to 8048" in hidden
        assert "hidden size 8192, but" in wide
        assert "33 experts per token" in top_k
        assert "built without" in build
    assert "Unsupported number of EP ranks: 3); use 2, 4 or 8" in run_ranks(_refused, 3, [None])[0][0]


def _buffers(_: None) -> tuple[list[int], list[int]]:
    """Buffers made until after each exchange, of which one grows them between a forward and its backward; how many
    there are in the end, and freed."""
    dispatcher, made, waiting = StandInDispatcher(LOCAL_EXPERTS), [], []
    for hidden in (32, 32, 16, 64):
        x_TH = torch.randn(4, hidden, requires_grad=True)
        sent = dispatcher.dispatch(x_TH, torch.tensor([[0, 3]] * 4), torch.ones(4, 2))
        waiting.append((x_TH, dispatcher.combine(sent.rows_RH, sent)))
        made.append(stand_in_deep_ep.Buffer.made)
    for x_TH, out_TH in waiting:
        assert torch.equal(out_TH, 2 * x_TH), "one row from each of two ranks"
        out_TH.sum().backward()
        assert torch.equal(x_TH.grad, torch.full_like(x_TH, 2.0))
    made.append(stand_in_deep_ep.Buffer.made)
    alive = [stand_in_deep_ep.Buffer.alive]
    deepep.free_buffers()
    return made, [*alive, stand_in_deep_ep.Buffer.alive]


def test_one_buffer_a_group_grown_for_wider_rows() -> None:
    assert run_ranks(_buffers, 2, None) == [([1, 1, 1, 2, 2], [1, 0])] * 2


def _train(_: None) -> tuple[list[float], str, str]:
    stand_in_deep_ep.install()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        tiny_config("qwen3_moe", num_hidden_layers=2), dtype=torch.bfloat16, backend={"dispatcher": "deepep"},
        distributed_setup={"ep_size": 2},
    )  # fmt: skip
    losses = sgd_losses(model, [torch.arange(5 + 6 * dist.get_rank())[None]] * 3)
    choice = slipstream.describe(model)["dispatcher"]
    return losses, choice.chosen, choice.why


def test_a_model_trains() -> None:
    for losses, chosen, why in run_ranks(_train, 2, None):
        assert losses[-1] < losses[0]
        assert (chosen, why) == ("deepep", "asked for")


def _bench(model: str) -> list[dict[str, Any]]:
    stand_in_deep_ep.install()
    rows = bench_dispatch(model, 8, torch.device("cpu"), tiny=True, iterations=1)
    assert not deepep._BUFFERS
    return [row for row in rows if row["contender"] == "deepep"]


def test_the_bench_times_it() -> None:
    rows = run_ranks(_bench, 2, "qwen3-30b-a3b")[0]
    assert [row["routing"] for row in rows] == ["uniform", "zipf", "one rank"]
    assert all(set(row["ms"]) == {"dispatch", "combine", "backward"} for row in rows)


def _cases() -> list[Case]:
    cases = [Case("real", EVEN[2], routing) for routing in ("random", "skewed", "one_expert", "last_rank")]
    cases += [Case("real", counts[2]) for counts in (RAGGED, EMPTY_RANK, ALL_EMPTY)]
    cases += [Case("real", EMPTY_RANK[2], checkpointed=True), Case("real", EMPTY_RANK[2], frozen=True)]
    return [case._replace(dtype=torch.bfloat16, device="cuda") for case in cases]


def _differences(cases: list[Case]) -> list[dict[str, float]]:
    test_dispatch.BACKENDS["real"] = DeepEPDispatcher
    test_dispatch.HIDDEN = 256
    found = [test_dispatch._differences(case)[0] for case in cases]
    deepep.free_buffers()
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not installed, reason="needs DeepEP (the package deep_ep)")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_the_real_package() -> None:
    for by_case in run_ranks(_differences, 2, _cases(), backend="nccl", timeout=300):
        for case, found in zip(_cases(), by_case, strict=True):
            assert max(found.values()) < 3e-2, (case, found)
