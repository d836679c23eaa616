"""`slipstream bench dispatch`, tiny and on CPUs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.backend import is_installed
from slipstream.bench.dispatch import ROUTINGS, bench_dispatch
from tests.distributed.harness import run_ranks

OURS = ["nvlink, as in our layer", "nvlink, any experts", "all_to_all", "all_gather"]
CONTENDERS = [*OURS, *(["deepep"] if is_installed("deep_ep") else []), "transformers all_to_all"]
TOKENS, HIDDEN, TOP_K, RANKS = 32, 64, 2, 2


def _rows(model: str) -> list[dict[str, Any]]:
    return bench_dispatch(model, TOKENS, torch.device("cpu"), tiny=True, iterations=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the exchange by stores runs here")
def test_every_contender() -> None:
    rows, others = run_ranks(_rows, RANKS, "qwen3-30b-a3b")
    assert rows == others, "the slowest rank's figures, on all ranks"
    assert [(row["routing"], row["contender"]) for row in rows] == [
        (routing, contender) for routing in ROUTINGS for contender in CONTENDERS
    ]
    for row in rows:
        if row["contender"].startswith("nvlink"):
            assert "need GPUs" in row["error"]
            continue
        assert all(spread["min"] <= spread["median"] <= spread["max"] for spread in row["ms"].values())
        forward = sum(spread["median"] for name, spread in row["ms"].items() if name != "backward")
        assert row["gb_per_s"] == pytest.approx(2 * row["wire_bytes"] / forward / 1e6)
    rows_on_the_wire = {
        (row["routing"], row["contender"]): row["wire_bytes"] / HIDDEN / 2 for row in rows if "ms" in row
    }
    # Some tokens have both experts on the other rank.
    assert 0 < rows_on_the_wire["uniform", "all_to_all"] < rows_on_the_wire["uniform", "transformers all_to_all"]
    # All tokens of the other rank come to the first.
    assert rows_on_the_wire["one rank", "all_to_all"] == TOKENS
    assert rows_on_the_wire["one rank", "transformers all_to_all"] == TOKENS * TOP_K
    assert rows_on_the_wire["zipf", "all_gather"] == TOKENS


def _refused(model: str) -> str:
    try:
        bench_dispatch(model, TOKENS, torch.device("cpu"), tiny=True)
    except ValueError as error:
        return str(error)
    return "not refused"


def test_refusals() -> None:
    assert "dense model" in run_ranks(_refused, 1, "qwen3-8b")[0]
    assert "8 experts" in run_ranks(_refused, 3, "qwen3-30b-a3b")[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes as many GPUs")
def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "slipstream.cli", "bench", "dispatch", "--nproc", "2", "--tiny", "--tokens", "8",
               "--iterations", "1", "--json", "out.json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exchange of qwen3-30b-a3b, 2 ranks of 8 tokens x 64 bf16" in done.stdout
    assert len(json.loads((tmp_path / "out.json").read_text())) == len(ROUTINGS) * len(CONTENDERS)
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert again.returncode != 0
    assert "exists already" in again.stderr


def _on_gpus() -> list[dict[str, Any]]:
    return bench_dispatch("qwen3-30b-a3b", 256, torch.device("cuda", torch.cuda.current_device()), iterations=2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_on_gpus() -> None:
    rows = run_ranks(_on_gpus, 2, backend="nccl", timeout=180)[0]
    assert [row["contender"] for row in rows if "ms" in row] == CONTENDERS * len(ROUTINGS)
