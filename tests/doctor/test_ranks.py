"""Probes on two processes: one that answers, one that cannot, one that crashes, and one that hangs."""

import io
import time

import pytest

from slipstream.doctor.ranks import _last_words, on_ranks


def test_bandwidth_of_two_ranks() -> None:
    found = on_ranks("small_bandwidth", 2, "cpu", 120)
    assert isinstance(found, dict), found
    assert (found["ranks"], found["mib"]) == (2, 1)
    assert found["all_reduce"] > 0
    assert found["all_to_all"] > 0


def test_a_probe_that_fails_says_why_and_takes_the_others_along() -> None:
    found = on_ranks("symmetric_memory", 2, "cpu", 120)
    assert isinstance(found, str)
    assert "ended with exit code 1: RuntimeError: " in found
    assert "SymmetricMemory" in found


def test_a_rank_that_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter itself dies, as under a bad driver."""
    monkeypatch.setattr("slipstream.doctor.ranks.sys.executable", "/bin/false")
    found = on_ranks("bandwidth", 2, "cpu", 30)
    assert found in {f"rank {rank} ended with exit code 1" for rank in range(2)}  # either may be seen first


def test_ranks_that_hang_are_ended() -> None:
    started = time.monotonic()
    assert on_ranks("bandwidth", 2, "cpu", 0.3) == "no answer within 0.3 s"
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("", ""),
        ("nvidia: no such device\n", ": nvidia: no such device"),
        (
            '[W1122 some.cpp:1] careful\n[rank0]: Traceback (most recent call last):\n[rank0]:   File "a.py", line 1\n'
            "[rank0]: torch.distributed.DistBackendError: NCCL error in: x.cpp:9\n[rank0]: ncclSystemError: no.\n"
            "[rank0]: Last error:\n[rank0]: no route\n[rank0]:[W1122 other.cpp:2] destroy was not called\n",
            ": torch.distributed.DistBackendError: NCCL error in: x.cpp:9 ncclSystemError: no. Last error: no route",
        ),
    ],
)
def test_the_reason_of_a_failure(written: str, told: str) -> None:
    assert _last_words(io.StringIO(written)) == told
