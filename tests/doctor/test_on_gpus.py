"""The probes where they are meant to run."""

import os

import pytest
import torch

from slipstream.doctor.gpus import links
from slipstream.doctor.ranks import on_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def test_symmetric_memory_answers() -> None:
    assert on_ranks("symmetric_memory", 2, "cuda", 120) == {"ranks": 2}


def test_nccl_moves_data() -> None:
    found = on_ranks("bandwidth", 2, "cuda", 120)
    assert isinstance(found, dict), found
    assert found["all_reduce"] > 1
    assert found["all_to_all"] > 1


@pytest.mark.skipif("CUDA_VISIBLE_DEVICES" in os.environ, reason="the driver lists GPUs that this process can't see")
def test_every_pair_is_listed() -> None:
    count = torch.cuda.device_count()
    assert len(links()) == count * (count - 1) // 2
