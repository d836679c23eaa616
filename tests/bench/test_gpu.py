"""What only a GPU shows: events, memory, kernels in the profile."""

import pytest
import torch

from slipstream.bench.layer import bench_layer
from slipstream.bench.loss import bench_loss
from slipstream.bench.measure import PARTS
from slipstream.bench.optimizer import bench_optimizer
from slipstream.bench.options import Job
from slipstream.bench.worker import execute
from tests.bench.test_step import options

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("side", ["transformers", "slipstream"])
def test_a_profiled_step(side: str) -> None:
    found = execute(Job(options(device="cuda", steps=2, warmup=2), side, "learned", profile=True))
    assert found["peak_gib_with_warmup"] >= found["peak_gib"] > 0
    assert all(ms > 0 for part in PARTS for ms in found["times"][part])
    profile = found["profile"]
    categories = {row["name"]: row["launches"] for row in profile["categories"]}
    assert sum(categories.values()) == profile["launches"] > 0
    assert categories.keys() >= {"optimizer", "expert GEMM", "other GEMM"}
    assert 0 < profile["busy_ms"] <= profile["kernel_ms"] * 1.001
    assert profile["busy_ms"] < profile["wall_ms"]
    assert profile["host_launches"] > 0


def test_synchronisations_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from slipstream.bench.measure import Step

    plain = Step.forward

    def with_one_more(self: Step) -> None:
        plain(self)
        self.batch["input_ids"].sum().item()

    monkeypatch.setattr(Step, "forward", with_one_more)
    found = execute(Job(options(device="cuda"), "transformers", "learned", profile=True))
    assert any("tests/bench/test_gpu.py" in sync["place"] for sync in found["profile"]["syncs"])


def test_parts_alone() -> None:
    device = torch.device("cuda", 0)
    for row in bench_layer("qwen3-30b-a3b", [256], device, tiny=True, iterations=2):
        assert "error" in row or row["peak_gib"] > 0
    for row in bench_optimizer("qwen3-30b-a3b", device, tiny=True, iterations=2)["rows"]:
        assert "error" in row or row["gb_per_s"] > 0
    rows = [row for row in bench_loss(256, 64, 512, device, iterations=2)["rows"] if "error" not in row]
    assert [row["loss"] for row in rows] == pytest.approx([rows[0]["loss"]] * len(rows), rel=1e-2)
