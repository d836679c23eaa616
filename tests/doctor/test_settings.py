"""Each misconfiguration is told with its fix, and a machine that is well says nothing."""

from dataclasses import replace
from typing import Any

import pytest

from slipstream.doctor.settings import Machine, hints, problems, this_machine

WELL = Machine(torch_cuda="13.0", gpus=2, driver_gpus=2, driver="580.82.07", used_gib=(0.5, 0.0), shared_gib=64.0)
CPU = Machine()


def env(**variables: str) -> dict[str, Any]:
    return {"environment": variables}


def test_nothing_is_wrong_where_nothing_is() -> None:
    assert problems(WELL) == problems(CPU) == hints(CPU) == []
    quiet = env(NCCL_P2P_DISABLE="0", CUDA_LAUNCH_BLOCKING="", OMP_NUM_THREADS="4,2", TRITON_INTERPRET="false")
    assert problems(replace(WELL, **quiet)) == []


@pytest.mark.parametrize(
    ("machine", "changes", "words"),
    [
        (WELL, {"torch_cuda": None, "gpus": 0}, "torch is a CPU build: reinstall torch"),
        (CPU, {"torch_cuda": "13.0"}, "there is no GPU: the CPU build takes"),
        (WELL, {"gpus": 0}, "torch cannot use it: check CUDA_VISIBLE_DEVICES"),
        (WELL, {"gpus": 0, "driver": "570.86.10"}, "the driver (570.86.10) is older than torch's CUDA 13.0 allows"),
        (WELL, {"torch_cuda": "12.8", "driver": "515.1"}, "update it to 525 or newer"),
        (WELL, {"compiler": False}, "no C compiler: Triton needs one"),
        (WELL, {"used_gib": (0.0, 31.5)}, "GPU 1 has 31.5 GiB in use already"),
        (WELL, env(NCCL_P2P_DISABLE="1"), "NCCL_P2P_DISABLE=1: GPUs of one host exchange through"),
        (replace(WELL, gpus=1), env(CUDA_LAUNCH_BLOCKING="1"), "the host waits for every kernel"),
        (WELL, env(TORCH_DISTRIBUTED_DEBUG="detail"), "TORCH_DISTRIBUTED_DEBUG=DETAIL: every collective"),
        (CPU, env(OMP_NUM_THREADS="64"), "OMP_NUM_THREADS=64, but this process may use 8 cores"),
        (CPU, env(OMP_NUM_THREADS="all"), "OMP_NUM_THREADS='all' is no number"),
        (CPU, env(OMP_NUM_THREADS="0"), "OMP_NUM_THREADS='0' is no number"),
        (WELL, {"shared_gib": 0.0625}, "/dev/shm has 64 MiB"),
        (
            CPU,
            {"cache_gib": 3.2, "cache": "/data/hub"},
            "/data/hub has 3.2 GiB left for models from the hub: set HF_HOME",
        ),
    ],
)
def test_each_problem_alone(machine: Machine, changes: dict[str, Any], words: str) -> None:
    (problem,) = problems(replace(machine, **changes))
    assert words in problem


def test_what_only_matters_between_gpus_is_not_told_of_one() -> None:
    one = replace(WELL, gpus=1, driver_gpus=1, used_gib=(None,), **env(NCCL_P2P_DISABLE="1", NCCL_IB_DISABLE="1"))
    assert problems(one) == []
    assert not any("OMP_NUM_THREADS" in hint for hint in hints(one))


def test_hints_end_when_they_are_followed() -> None:
    assert [hint.split(":")[0][:30] for hint in hints(WELL)] == [
        "if a run goes out of memory wh", "torchrun gives each rank one C", "before torchrun --max-restarts"
    ]  # fmt: skip
    assert "OMP_NUM_THREADS=4" in hints(WELL)[1]
    followed = env(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True", OMP_NUM_THREADS="4",
                   TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")  # fmt: skip
    assert hints(replace(WELL, **followed)) == []


def test_facts_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/no/such/compiler -O2")
    found = this_machine("13.0", 1, "580.1", (0.0,))
    assert found.cores >= 1
    assert found.cache_gib > 0
    assert (found.gpus, found.driver_gpus, found.driver, found.compiler) == (1, 1, "580.1", False)
    monkeypatch.setenv("CC", "sh -O2")  # there is one on every machine
    assert this_machine(None, 0, None, ()).compiler
