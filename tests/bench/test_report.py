"""From runs to figures, on runs made up here."""

import copy
import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from slipstream.bench.options import Options
from slipstream.bench.report import build_report, failed, markdown, terminal_table, write_results
from slipstream.planning.flops import training_flops

OPTIONS = Options("qwen3-30b-a3b", layers=2, steps=3, warmup=2)


def run(contender: str, gate: str, scale: float, loss: float = 12.0, **more: Any) -> dict[str, Any]:
    times = {"forward": [10 * scale, 11 * scale, 12 * scale], "backward": [20 * scale] * 3, "optimizer": [5.0] * 3}
    imbalance = {"mean": 1.5, "worst": 2.0} if gate == "learned" else None
    return {
        "contender": contender, "gate": gate, "repeat": 0, "times": times, "back_to_back_ms": 1.0,
        "cold_start_s": 9.0, "first_loss": loss,
        "last_loss": loss - 1, "peak_gib": 40.0 * scale, "peak_gib_with_warmup": 42.0 * scale, "imbalance": imbalance,
        "settings": {"attn": "sdpa"}, "notes": ["a note"], "same_weights": True, "versions": {"torch": "2.11"},
        "device_name": "NVIDIA H200", **more,
    }  # fmt: skip


RUNS = [run("transformers", "learned", 1.0), run("slipstream", "learned", 0.5)]


def report(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return build_report(copy.deepcopy(runs), OPTIONS, ("transformers", "slipstream"), "slipstream bench")


def test_figures() -> None:
    theirs, ours = report(RUNS)["rows"]
    assert theirs["step"] == {"median": 36.0, "min": 35.0, "max": 37.0}
    assert ours["step"]["median"] == 20.5
    assert ours["speedup_step"] == pytest.approx(36 / 20.5)
    assert ours["speedup_forward_backward"] == pytest.approx(31 / 15.5)
    assert ours["memory_ratio"] == 0.5
    assert ours["tokens_per_second"] == pytest.approx(4096 / 0.0205)
    tflops = 4096 / 0.0205 * training_flops(OPTIONS.config(), 4096) / 1e12
    assert ours["tflops"] == pytest.approx(tflops)
    assert ours["mfu"] == pytest.approx(tflops / 989)
    assert not failed(report(RUNS))


def test_repeats_are_taken_together() -> None:
    theirs, _ = report([*RUNS, run("transformers", "learned", 2.0)])["rows"]
    assert theirs["step"] == {"median": (37 + 65) / 2, "min": 35.0, "max": 69.0}
    assert theirs["peak_gib"] == 80


def test_a_loss_that_is_no_number_fails_the_run() -> None:
    found = report([RUNS[0], {**RUNS[1], "last_loss": float("nan")}])
    assert found["problems"] == ["slipstream, learned gate: the last loss is nan: steps of that do not compare"]
    assert failed(found)


def test_losses_that_disagree_fail_the_run() -> None:
    found = report([RUNS[0], run("slipstream", "learned", 0.5, loss=12.1)])
    assert failed(found)
    assert "slipstream, learned gate: first loss 12.1000, but 12.0000 in transformers" in found["problems"][0]
    assert failed(report([RUNS[0], run("slipstream", "learned", 0.5, loss=float("nan"))]))
    assert not failed(report([RUNS[0], run("slipstream", "learned", 0.5, loss=12.1, same_weights=False)]))


def test_a_side_that_fails_becomes_a_row() -> None:
    broken = {"contender": "transformers", "gate": "learned", "repeat": 0, "error": "OutOfMemoryError: no", "log": ""}
    found = report([broken, RUNS[1]])
    assert found["rows"][0]["error"] == "OutOfMemoryError: no"
    assert "speedup_step" not in found["rows"][1]
    assert found["problems"] == ["transformers, learned gate: OutOfMemoryError: no"]
    assert not failed(found)
    assert "| learned |  | transformers | failed: OutOfMemoryError |" in markdown(found)
    ours = report([RUNS[0], {**broken, "contender": "slipstream"}])
    assert failed(ours)
    nothing = report([broken, {**broken, "contender": "slipstream"}])
    assert failed(nothing)
    ElementTree.fromstring(write_nothing(nothing))


def write_nothing(found: dict[str, Any]) -> str:
    from slipstream.bench.plot import step_plot

    return step_plot(found)


def test_files_and_table_say_the_same(tmp_path: Path) -> None:
    profile = {
        "layers": 2, "host_ms": {"forward": 4.0, "backward": 5.0, "optimizer": 1.0}, "kernel_ms": 30.0, "busy_ms": 28.0,
        "step_ms": 36.0, "idle_percent": 22.2, "idle_percent_profiled": 40.0, "launches": 100, "host_launches": 90,
        "categories": [{"name": "attention", "ms": 7.5, "percent": 25.0, "launches": 4}],
        "kernels": [{"name": "void f<a|b>", "ms": 7.5, "count": 4, "category": "attention"}],
        "syncs": [{"place": "transformers/x.py:3", "count": 2}],
    }  # fmt: skip
    found = report([{**RUNS[0], "profile": profile, "back_to_back_ms": 32.0}, RUNS[1]])
    paths = write_results(found, tmp_path / "results")
    assert [path.suffix for path in paths] == [".md", ".json", ".svg"]
    assert found["date"] in paths[0].name
    assert "h200-qwen3-30b-a3b-2l-1x4096" in paths[0].name
    text = paths[0].read_text()
    for words in ("36.0 (35.0-37.0)", "| 1.76 |", "| 2.00 |", "1.50 / 2.00", "40.0 (42.0)", "torch 2.11", "a note",
                  "**22.2 % idle**", "12.5 % of a step back to back", "50 a layer", "2.00 ms a layer",
                  "`transformers/x.py:3` (2 x)", "| attention | 7.50 |", f"]({paths[2].name})"):  # fmt: skip
        assert words in text
    assert all(line.count("|") == text.splitlines()[6].count("|") for line in text.splitlines()[6:10])
    assert json.loads(paths[1].read_text()) == found

    bars = [e for e in ElementTree.fromstring(paths[2].read_text()).iter() if e.tag.endswith("rect")][3:]
    widths = [float(bar.get("width", "0")) for bar in bars]
    assert sum(widths[3:]) / sum(widths[:3]) == pytest.approx(20.5 / 36, rel=0.01)

    in_fp8 = {**found, "options": {**found["options"], "backend": {"experts": "fp8", "attn": "sdpa"}}}
    apart = write_results(in_fp8, tmp_path / "results")
    assert apart[0].stem == paths[0].stem + "-experts-fp8"
    assert "our experts in FP8, 1 x 4096 tokens" in apart[0].read_text().splitlines()[0]

    again = write_results(found, tmp_path / "results")
    assert again[0].stem == paths[0].stem + "-2"

    console = Console(width=250, record=True, file=io.StringIO())
    console.print(terminal_table(found))
    assert "36.0 (35.0-37.0)" in console.export_text()
