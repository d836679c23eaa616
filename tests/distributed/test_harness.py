"""The harness itself: results in order, and a failing, dying or hanging rank is named."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import RankFailedError, run_ranks


def _sum(value: int) -> tuple[int, float]:
    total = torch.tensor([float(dist.get_rank() * value)])
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def _fail_on_rank_1(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("told to")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    dist.barrier()


def test_results_come_in_the_order_of_the_ranks() -> None:
    assert run_ranks(_sum, 2, 3) == [(0, 3.0), (1, 3.0)]


@pytest.mark.parametrize(
    ("how", "says"), [("raise", "(?s)rank 1 failed.*told to"), ("die", "rank 1 died.*-9"), ("hang", r"rank \[0, 1\]")]
)
def test_failure_is_reported(how: str, says: str) -> None:
    # The others notice through their connection to the dead rank, and may report first where it was killed.
    if how == "die":
        says = f"{says}|rank 0 failed"
    with pytest.raises(RankFailedError, match=says):
        run_ranks(_fail_on_rank_1, 2, how, timeout=4.0)
