"""A second run in an output folder is refused, and leaves the first alone."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from slipstream.train.lock import LOCK_FILE, check_free, held
from tests.distributed.harness import run_ranks
from tests.train.test_resume import fine_tune


def hold(output: Path, ready: Any, enough: Any) -> None:
    with held(output):
        ready.set()
        enough.wait(60)


def test_a_folder_is_held_by_one_run(tmp_path: Path) -> None:
    output = tmp_path / "out"
    context = multiprocessing.get_context("forkserver")
    ready, enough = context.Event(), context.Event()
    other = context.Process(target=hold, args=(output, ready, enough))
    other.start()
    assert ready.wait(60)
    for refused in (lambda: check_free(output), lambda: held(output).__enter__()):
        with pytest.raises(ValueError, match=rf"another run is writing to .*out \(.*process {other.pid}\)"):
            refused()
    assert [path.name for path in output.iterdir()] == [LOCK_FILE]
    other.kill()  # the system lets go of it
    other.join()
    check_free(output)
    with held(output):
        (output / "kept").touch()
    assert [path.name for path in output.iterdir()] == ["kept"]


def test_a_folder_that_nothing_was_written_to_goes(tmp_path: Path) -> None:
    with held(tmp_path / "out" / "deep"):
        pass
    assert not (tmp_path / "out" / "deep").exists()


def test_a_run_is_refused_before_it_reads_anything(tmp_path: Path, checkpoint: Path) -> None:
    with held(tmp_path / "out"), pytest.raises(ValueError, match="another run is writing to"):
        fine_tune(tmp_path, checkpoint, train={"max_steps": 1})
    fine_tune(tmp_path, checkpoint, train={"max_steps": 1})
    assert not (tmp_path / "out" / LOCK_FILE).exists()


def _on_two_ranks(output: Path) -> str:
    try:
        with held(output):
            return "held"
    except ValueError as error:
        return str(error)


def test_ranks_are_refused_together(tmp_path: Path) -> None:
    assert run_ranks(_on_two_ranks, 2, tmp_path / "out") == ["held"] * 2
    with held(tmp_path / "out"):
        for message in run_ranks(_on_two_ranks, 2, tmp_path / "out"):
            assert "another run is writing to" in message
