"""Every recorded benchmark of ours against the plan: memory within 10 %, step time within 20 %."""

import itertools
import json
from pathlib import Path

import pytest

from slipstream.bench.presets import build_config
from slipstream.planning.gpus import GPUS
from slipstream.planning.memory import Layout
from slipstream.planning.plan import describe_model
from slipstream.planning.records import compare

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
TORCH = {"optimizer": "adamw_torch_fused"}
EAGER = {"compiled": False, **TORCH}
TWO = {"gpus": 2, "ep_size": 2, **EAGER}
# From the runs that have no JSON: preset, layers, settings, peak GiB, step ms (None where the file has none).
BY_HAND = [
    ("first-compiled-step", "qwen3-30b-a3b", 8, {}, None, 73.5),
    ("first-compiled-step", "qwen3-30b-a3b", 8, TORCH, 41.9, 94.0),
    ("first-compiled-step", "qwen3-30b-a3b", 8, EAGER, 41.9, 114.7),
    ("h200-step", "qwen3-30b-a3b", 8, {"micro_batch": 4, **EAGER}, 47.2, 297.1),
    ("h200-step", "qwen3-8b", 8, EAGER, 26.4, 136.7),
    ("2xh200-expert-parallel", "qwen3-30b-a3b", 16, TWO, 41.2, 227.0),
    ("2xh200-expert-parallel", "qwen3-30b-a3b", 16, {**TWO, "dispatcher": "all_gather"}, 42.8, 273.3),
]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_runs(path: Path) -> None:
    for run in compare(path):
        assert run.predicted_gib == pytest.approx(run.peak_gib, rel=0.10), run
        assert run.predicted_ms == pytest.approx(run.step_ms, rel=0.20), run


def test_there_are_recorded_runs() -> None:
    runs = (run for path in RESULTS.glob("*.json") for run in compare(path))
    assert len(list(itertools.islice(runs, 3))) == 3


@pytest.mark.parametrize(("file", "preset", "layers", "settings", "gib", "ms"), BY_HAND)
def test_runs_without_json(
    file: str, preset: str, layers: int, settings: dict[str, object], gib: float | None, ms: float
) -> None:
    recorded = next(iter(RESULTS.glob(f"*{file}.md"))).read_text()
    assert str(ms) in recorded
    model = describe_model(preset, build_config(preset, layers), 4096)
    estimate = model.estimate(Layout(**settings), GPUS["H200"])  # type: ignore[arg-type]
    assert estimate.time.step_ms == pytest.approx(ms, rel=0.20)
    if gib is not None:
        assert str(gib) in recorded
        assert estimate.memory.peak_gib == pytest.approx(gib, rel=0.10)


def test_what_is_no_step_of_ours(tmp_path: Path) -> None:
    other = tmp_path / "layer.json"
    other.write_text('{"rows": [], "options": {"experts": 8}}')
    assert compare(other) == []


def test_what_ran_in_fp8_is_not_held_against_a_plan_of_16_bits(tmp_path: Path) -> None:
    path = next(path for path in sorted(RESULTS.glob("*.json")) if compare(path))
    record = json.loads(path.read_text())
    record["options"]["backend"] = {"experts": "fp8"}
    (tmp_path / "fp8.json").write_text(json.dumps(record))
    assert compare(tmp_path / "fp8.json") == []


def test_what_scanned_in_plain_pytorch_is_not_held_against_a_fused_scan() -> None:
    compared = {}
    for path in RESULTS.glob("*nemotron*.json"):
        rows = json.loads(path.read_text())["rows"]
        settings = next(row["settings"] for row in rows if row["contender"] == "slipstream")
        compared[settings["recurrent"]] = len(compare(path))
    assert compared == {"torch": 0, "triton": 1}


def test_a_run_with_experts_in_4_bits_is_planned_as_one(tmp_path: Path) -> None:
    """A record of its own making: the weights of 128 x 8 experts become smaller, and nothing else does but time."""
    settings = {"compile": "layers", "loss": "fused", "dispatcher": "local"}
    found = []
    for on in (False, True):
        options = {"model": "qwen3-30b-a3b", "layers": 8, "lora": 16, "load_in_4bit": on, "device": "cuda"}
        row = {"contender": "slipstream", "gate": "balanced", "peak_gib": 1.0, "back_to_back_ms": 1.0,
               "settings": settings}  # fmt: skip
        path = tmp_path / f"{on}.json"
        path.write_text(json.dumps({"options": options, "device": "NVIDIA H200", "model": {}, "rows": [row]}))
        found += compare(path)
    whole, packed = found
    weights = 8 * 128 * 3 * 2048 * 768
    at_once = 2 * weights / 8
    assert (whole.predicted_gib - packed.predicted_gib) * 2**30 == pytest.approx(weights * (2 - 4.5 / 8) - at_once)
    assert packed.predicted_ms > whole.predicted_ms
