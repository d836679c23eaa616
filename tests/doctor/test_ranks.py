"""Probes on two processes: one that answers, one that cannot, one that crashes, and one that hangs."""

import time

import pytest

from slipstream.doctor.ranks import on_ranks


def test_bandwidth_of_two_ranks() -> None:
    found = on_ranks("small_bandwidth", 2, "cpu", 120)
    assert isinstance(found, dict), found
    assert (found["ranks"], found["mib"]) == (2, 1)
    assert found["all_reduce"] > 0
    assert found["all_to_all"] > 0


def test_a_probe_that_fails_says_why_and_takes_the_others_along() -> None:
    found = on_ranks("symmetric_memory", 2, "cpu", 120)
    assert isinstance(found, str)
    assert "ended with exit code 1: " in found
    assert "SymmetricMemory" in found


def test_a_rank_that_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter itself dies, as under a bad driver."""
    monkeypatch.setattr("slipstream.doctor.ranks.sys.executable", "/bin/false")
    assert on_ranks("bandwidth", 2, "cpu", 30) == "rank 0 ended with exit code 1"


def test_ranks_that_hang_are_ended() -> None:
    started = time.monotonic()
    assert on_ranks("bandwidth", 2, "cpu", 0.3) == "no answer within 0.3 s"
    assert time.monotonic() - started < 60
