"""`slipstream coverage`: what CI checks of it, and that its checks can fail."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import slipstream
from slipstream import hf
from slipstream.bench.measure import token_ids
from slipstream.bench.options import Job
from slipstream.cli import app
from slipstream.coverage import architectures, checks, ranks, shapes, speed, table, warm
from slipstream.coverage.compare import Attempt, Cell
from slipstream.coverage.tiny import tiny_config, tiny_model

# One of each kind of experts, routers, attention and layers; the command does all of them.
REPRESENTATIVE = [
    "qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "gemma4_text", "bailing_hybrid", "qwen3_next", "llama4_text",
    "dbrx", "jetmoe", "llama", "gpt2", "bart",
]  # fmt: skip


@pytest.mark.long
def test_a_subset_passes_every_check(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["coverage", "--models", ",".join(REPRESENTATIVE), "--output", f"{tmp_path}/out"])
    assert result.exit_code == 0, result.output
    rows = table.read(tmp_path / "out.json")
    assert [row.why_not for row in rows.values()] == [""] * len(REPRESENTATIVE)
    found = {name: {check: cell.status for check, cell in row.checks.items()} for name, row in rows.items()}
    assert all(cells["parity"] == cells["save"] == "ok" for cells in found.values()), found
    assert {name for name, cells in found.items() if cells.get("ep2") == "ok"} >= {"qwen3_moe", "gpt_oss", "nemotron_h"}
    assert (found["qwen3_moe"]["packing"], found["bart"]["packing"]) == ("ok", "refused")
    page = (tmp_path / "out.md").read_text()
    assert "| qwen3_moe | slipstream: 4 layers; [gate; up], silu |" in page


def test_every_architecture_is_listed() -> None:
    names = architectures.architectures()
    assert names[0] in architectures.moe_architectures()
    assert {"qwen3_moe", "llama", "dbrx"} < set(names)
    assert "more than a language model" in checks.check_architecture("llama4").why_not


def test_a_wrong_gradient_fails() -> None:
    reference = tiny_model("llama")
    ours = copy.deepcopy(reference)
    assert checks.CHECKS["parity"](reference, ours).status == "ok"
    ours.lm_head.weight.register_hook(lambda grad: grad * 1.001)
    reference.zero_grad()
    ours.zero_grad()
    cell = checks.CHECKS["parity"](reference, ours)
    assert cell.status == "failed"
    assert "lm_head.weight" in cell.text


def test_a_leak_between_documents_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipstream.train.packing.check_packing", lambda config: None)
    model = tiny_model("mamba2")
    cell = checks.CHECKS["packing"](model, slipstream.accelerate(copy.deepcopy(model)))
    assert cell.status == "failed"
    assert "leaks" in cell.text


@pytest.mark.slow
def test_expert_parallelism_notices_a_wrong_checkpoint_and_goes_on(tmp_path: Path) -> None:
    for name in ("mixtral", "olmoe"):
        ranks.prepare(tiny_model(name), tmp_path / name)
    wrong = torch.load(tmp_path / "mixtral" / "expected.pt")
    wrong["loss"] *= 1.1
    torch.save(wrong, tmp_path / "mixtral" / "expected.pt")
    cells = ranks.check_expert_parallelism({name: tmp_path / name for name in ("mixtral", "olmoe")})
    assert (cells["mixtral"].status, cells["olmoe"].status) == ("failed", "ok")


def test_too_long_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "build", lambda model_type: __import__("time").sleep(5))
    assert "longer than 0.2 s" in checks.check_architecture("llama", seconds=0.2).why_not


def test_rows_survive_the_file(tmp_path: Path) -> None:
    row = checks.Row("llama", passes={"loss": "fused"}, checks={"parity": Cell("failed", "a | b")}, speed={"step": 2.0})
    row.speed |= {"memory": 0.5, "shapes": "4 layers", "device": "H100"}
    table.write(tmp_path / "out", [row])
    assert table.read(tmp_path / "out.json") == {"llama": row}
    assert "2.00 x | 0.50 | 4 layers, H100" in (tmp_path / "out.md").read_text()
    (tmp_path / "out.json").write_text("{}")
    with pytest.raises(ValueError, match="no table of slipstream coverage"):
        table.read(tmp_path / "out.json")


def test_the_next_models_are_compiled_before_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    monkeypatch.setattr(warm, "warm", lambda every, *_: events.append([timed.model for timed in every]))
    monkeypatch.setattr(speed, "measure", lambda options, seconds: events.append(options.model) or {"step": 2.0})
    rows = [checks.Row(name) for name in ("llama", "qwen3", "qwen2", "mistral")]

    def timed(name: str) -> speed.Timed:
        return speed.Timed(name, device="cpu", tiny=True)

    limits: dict[str, Any] = {"limit_seconds": None, "seconds_per_model": 1, "done": lambda *_: None}
    speed.measure_all(rows, timed, compile_workers=1, **limits)
    assert events == [["llama", "qwen3", "qwen2"], "llama", "qwen3", "qwen2", ["mistral"], "mistral"]


@pytest.mark.slow
def test_models_are_compiled_by_processes_of_their_own() -> None:
    options = {"device": "cpu", "tiny": True, "seq_len": 32, "backend": {"compile": "none"}}
    told: list[str] = []
    warm.warm([speed.Timed(name, **options) for name in ("llama", "nonsense")], 2, 120, told.append)
    assert len(told) == 1
    assert told[0].startswith("nonsense: not compiled beforehand: ")


def test_speed_resumes(tmp_path: Path) -> None:
    command = [
        "coverage",
        "--speed",
        "--tiny",
        "--no-compile",
        "--seq-len",
        "32",
        "--models",
        "qwen3_moe,jetmoe",
        "--output",
    ]
    result = CliRunner().invoke(app, [*command, f"{tmp_path}/out", "--limit-seconds", "0"])
    assert result.exit_code == 0, result.output
    assert result.stderr.count("left: qwen3_moe,jetmoe") == 1
    result = CliRunner().invoke(app, [*command, f"{tmp_path}/out"])
    measured = json.loads((tmp_path / "out.json").read_text())["architectures"]
    assert [row["speed"]["step"] > 0 for row in measured] == [True, True]
    assert "qwen3_moe: step" in result.stderr
    assert "step" not in CliRunner().invoke(app, [*command, f"{tmp_path}/out"]).stderr


def test_what_checkpoints_keep_in_fp32_is_timed_so() -> None:
    found = speed.measure(speed.Timed("inkling2_text", device="cpu", tiny=True, seq_len=32, steps=1, warmup=1), 60)
    assert "error" not in found, found
    assert found["loss_error"] < 1e-2


def test_a_padded_head_is_timed_with_tokens_that_it_has_logits_for() -> None:
    padded = shapes.timed_config("inkling2_text", 4096)
    assert token_ids(padded) == 200058 < padded.vocab_size
    assert token_ids(shapes.timed_config("inkling_text", 4096)) == 201024
    assert token_ids(tiny_config("inkling2_text")) == 256


def test_a_lost_gpu_ends_the_run_and_keeps_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(speed, "execute", lost)
    monkeypatch.setattr(speed, "_forget", lost)  # as empty_cache would then
    timed = speed.Timed("llama", device="cpu", tiny=True)
    rows, seen = [checks.Row("llama"), checks.Row("qwen3")], []
    left = speed.measure_all(
        rows,
        lambda name: timed,
        limit_seconds=None,
        seconds_per_model=1,
        done=lambda row, _: seen.append(row.model_type),
    )
    assert (seen, left) == (["llama"], ["qwen3"])
    assert "CUDA error" in rows[0].speed["error"]


def test_neither_side_makes_a_cache() -> None:
    """Bamba's in Transformers fails where all layers are recurrent."""
    found = speed.measure(speed.Timed("bamba", device="cpu", tiny=True, seq_len=32, steps=1, warmup=1), 60)
    assert "error" not in found, found


class _NoValues(TorchDispatchMode):
    """Lets a model on the meta device ask for a tensor's value, which decides about masks only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool or 1
        return func(*args, **(kwargs or {}))


# What they compute depends on values.
NOT_ON_META = {"dbrx", "jetmoe", "longcat_flash", "qwen4_exp_text"}


def test_every_model_with_experts_runs_at_the_timed_shapes() -> None:
    """Plain Transformers, on the meta device: of a size for one GPU, with all kinds of layers and the real widths."""
    wrong, narrow = {}, []
    for name in filter(architectures.has_experts, architectures.architectures()):
        config = shapes.timed_config(name)
        with torch.device("meta"), torch.no_grad():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
            if not 5e7 < sum(parameter.numel() for parameter in model.parameters()) <= shapes.MAX_PARAMETERS:
                wrong[name] = "size"
            attempt = Attempt()
            with attempt, _NoValues():
                if next(hf.experts_modules(model), None):
                    model.set_experts_implementation("grouped_mm")
                if name not in NOT_ON_META:
                    ids = torch.zeros(1, 128, dtype=torch.long)
                    assert model(input_ids=ids, labels=ids, use_cache=False).loss.shape == ()
        if attempt.error:
            wrong[name] = attempt.error
        if config.hidden_size < 2048:
            narrow.append(name)
        for kinds in ("layer_types", "mlp_layer_types"):
            default = transformers.AutoConfig.for_model(name)
            full = set(getattr(default, kinds, None) or ()) - {"mlp"}  # Nemotron 3 has no dense MLPs
            if missing := full - set(getattr(config, kinds, None) or full):
                wrong[name] = f"without {missing}"
    assert not wrong
    assert narrow == ["doge", "granitemoehybrid"]


def test_what_was_never_timed_comes_first() -> None:
    speeds: dict[str, dict[str, Any]] = {
        "llama": {},
        "mixtral": {"of": {"device": "CPU"}, "step": 1.0},
        "afmoe": {"of": {"device": "H100"}, "step": 1.0},
        "olmoe": {"of": {"device": "CPU"}, "error": "out of memory"},
        "qwen3_moe": {},
    }
    rows = [checks.Row(name, moe=architectures.has_experts(name), speed=found) for name, found in speeds.items()]
    ordered = speed.in_order(rows, lambda name: speed.Timed(name, device="cpu", tiny=True))
    assert [row.model_type for row in ordered] == ["qwen3_moe", "afmoe", "olmoe", "mixtral", "llama"]


def test_an_error_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = speed.Timed("llama", device="cpu", tiny=True)
    found: list[str] = []
    monkeypatch.setattr(speed, "measure", lambda options, seconds: found.append(options.model) or {"step": 2.0})
    for before in ({"step": 1.0}, {"error": "out of memory"}):
        row = checks.Row("llama", speed={"of": speed._conditions(timed), **before})
        speed.measure_all([row], lambda name: timed, limit_seconds=None, seconds_per_model=1, done=lambda *_: None)
    assert found == ["llama"]
    assert row.speed == {"step": 2.0}


def test_a_slow_row_says_why() -> None:
    def row(model_type: str, theirs_ms: float, ours_ms: float) -> str:
        found = speed.limit(speed.Timed(model_type, device="cpu"), "NVIDIA H200", theirs_ms)
        measured = {"step": theirs_ms / ours_ms, "memory": 1.0, "shapes": "some", "device": "NVIDIA H200", **found}
        return table.speed_cells(measured)[2]

    assert "at most 1.44 x" in row("mixtral", 97.8, 80.9)
    assert "at most" not in row("mixtral", 97.8, 60.0)  # what was aimed at
    assert "at most" not in row("mixtral", 60.0, 60.0)  # more than it says: the count does not fit
    assert "linear_attention" in row("kimi_linear", 300.0, 290.0)
    assert row("gemma4_text", 100.0, 90.0) == "some, NVIDIA H200"
    whole = {"step": 1.1, "memory": 1.0, "shapes": "some", "device": "NVIDIA H200", "limit": 5.0, "attention": "eager"}
    assert "whole scores" in table.speed_cells(whole)[2]
    waits = {**whole, "attention": "slipstream", "no_graph": "the host waits for the device at a.py:1"}
    assert "**no CUDA graph: the host waits for the device at a.py:1**" in table.speed_cells(waits)[2]


@pytest.mark.parametrize(
    ("ours_ms", "limit", "no_graph", "expected"),
    [
        (12.0, 2.5, None, 1.25),
        (12.0, None, None, 1.25),
        (12.0, 1.2, None, None),
        (7.0, 2.5, None, None),
        (8.2, 2.5, None, None),
        (12.0, 2.5, "it waits", None),
    ],
    ids=["the host's pace", "no limit known", "the GEMMs' pace", "fast", "no faster as a graph", "no graph"],
)
def test_a_short_step_is_timed_as_a_cuda_graph_too(
    ours_ms, limit, no_graph, expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(job: Job) -> dict[str, Any]:
        ms = 10.0 if job.contender == speed.RIVAL else 8.0 if job.options.cuda_graphs else ours_ms
        result = {"back_to_back_ms": ms, "peak_gib": 1.0, "first_loss": 2.0, "cold_start_s": 1.0}
        result |= {"no_graph": no_graph} if no_graph and job.options.cuda_graphs else {}
        return result | {"device_name": "H200", "imbalance": None, "notes": [], "settings": {"attn": "slipstream"}}

    monkeypatch.setattr(speed, "execute", execute)
    monkeypatch.setattr(speed, "_conditions", lambda options: {"tokens": 4096})
    monkeypatch.setattr(speed, "limit", lambda *_: {} if limit is None else {"limit": limit})
    found = speed.measure(speed.Timed("llama"), 10)
    assert found.get("graphed") == expected
    assert ("1.25 x as a CUDA graph" in table.speed_cells(found)[2]) == (expected is not None)
    assert found.get("no_graph") == no_graph


def test_longer_rows_have_positions() -> None:
    assert shapes.timed_config("bert", 8192).max_position_embeddings > 8192
    assert shapes.timed_config("whisper", 4096).max_target_positions > 4096
    assert shapes.timed_tokens("rwkv", 4096) < shapes.timed_tokens("llama", 4096) == 4096


def test_unknown_model_is_refused() -> None:
    result = CliRunner().invoke(app, ["coverage", "--models", "nothing"])
    assert isinstance(result.exception, ValueError)
    assert "no such causal-LM type" in str(result.exception)


def test_the_published_table_is_whole() -> None:
    """docs/coverage.md, which `slipstream coverage --output docs/coverage` writes."""
    path = Path(__file__).parents[2] / "docs" / "coverage.json"
    if json.loads(path.read_text())["versions"]["transformers"] != transformers.__version__:
        pytest.skip("made with another Transformers")
    rows = table.read(path)
    assert list(rows) == architectures.architectures()
    assert not [name for name, row in rows.items() if row.failed]
    assert path.with_suffix(".md").read_text() == table.as_markdown(list(rows.values()))
