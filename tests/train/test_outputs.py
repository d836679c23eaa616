"""Runs from a config alone, what they leave behind, ranks that the command starts itself, and previews."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from slipstream.cli import main
from slipstream.train.byte_tokenizer import byte_tokenizer
from slipstream.train.preview import histogram, preview, token_segments
from slipstream.train.recipe_file import load_recipe
from slipstream.train.run import prepare, run
from tests.train.ranks import finetune_on_ranks
from tests.train.tiny_chat import CHATML, CONVERSATIONS, write_jsonl, write_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPES = {"num_hidden_layers": 2, "hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 4, "head_dim": 8,
          "num_experts_per_tok": 2, "vocab_size": 272, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def recipe_of_config(folder: Path, **changes: dict[str, Any]) -> Path:
    """A recipe for random weights of the preset's architecture, on rows of bytes."""
    path = write_recipe(folder, folder, **changes)
    values = yaml.safe_load(path.read_text())
    values["model"] = {"config": "qwen3-30b-a3b", "config_overrides": SHAPES}
    path.write_text(yaml.safe_dump(values))
    return path


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(folder) if "loss" in line]


def test_random_weights_learn_and_the_output_repeats_the_run(tmp_path: Path) -> None:
    train = {"max_steps": 6, "learning_rate": 0.01, "lr_scheduler_type": "constant"}
    path = recipe_of_config(tmp_path, train=train, data={"packing": True, "max_length": 512, "on_bad_row": "skip"})
    with (tmp_path / "rows.jsonl").open("a") as rows:
        rows.write("not JSON\n")
    with (tmp_path / "screen").open("w") as screen:
        assert run(load_recipe(path)[0], file=screen) is not None
    losses = [loss for _, loss in curve(tmp_path)]
    assert losses[-1] < losses[0] - 0.5
    out = tmp_path / "out"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert (model.config.num_experts, model.config.eos_token_id) == (4, tokenizer.eos_token_id)
    assert tokenizer.decode(tokenizer("Grüße, 世界!")["input_ids"]) == "Grüße, 世界!"
    report = json.loads((out / "data.json").read_text())
    assert (report["rows"], report["bad_rows"]) == (20, 1)
    assert report["bad"] == [{"place": f"{tmp_path}/rows.jsonl:21",
                              "reason": "not valid JSON: Expecting value (column 1)"}]  # fmt: skip
    environment = json.loads((out / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert environment["ranks"] == 1
    assert environment["batch"].keys() == {"per_device_train_batch_size", "gradient_accumulation_steps"}
    page = (out / "report.html").read_text()
    assert "training from random weights, finished" in page
    assert all(f'<section id="{name}">' in page for name in ("loss", "speed", "experts", "data", "recipe"))
    if shutil.which("git") and (EXAMPLES.parent / ".git").exists():
        assert len(environment["slipstream_git"]["revision"]) == 40
    again, _ = load_recipe(out / "recipe.resolved.yaml", [f"train.output_dir={tmp_path / 'again' / 'out'}"])
    with (tmp_path / "screen").open("a") as screen:
        run(again, file=screen)
    assert curve(tmp_path / "again") == curve(tmp_path)


def test_overrides_of_a_config_that_do_not_exist(tmp_path: Path) -> None:
    path = recipe_of_config(tmp_path)
    for override, message in (
        ("model.config_overrides.num_expert=8", r"model\.config_overrides\.num_expert: Qwen3MoeConfig has no such"),
        ("model.config=nowhere", r"model\.config: no such file: nowhere; or use a preset: qwen3-30b-a3b, "),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(load_recipe(path, [override])[0], overwrite=False)


def test_a_stream_trains_and_continues_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipstream.train.data.SHUFFLED", 30)
    monkeypatch.setattr("slipstream.train.packing.PACKED_AT_ONCE", 10)
    data = {"streaming": True, "eval_fraction": 0, "packing": True, "max_length": 512}
    changes = {"data": data, "train": {"max_steps": 6, "per_device_train_batch_size": 1}}
    screen = tmp_path / "screen"
    for name, override in (
        ("whole", "checkpoint.save_steps=4"),
        ("rest", f"checkpoint.resume_from_checkpoint={tmp_path}/whole/out/checkpoints/step-000004"),
    ):
        (tmp_path / name).mkdir()
        recipe, _ = load_recipe(recipe_of_config(tmp_path / name, **changes), [override])
        with screen.open("w") as file:
            run(recipe, file=file)
    assert "continues from: " in screen.read_text()
    assert [step for step, _ in curve(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6]
    assert curve(tmp_path / "rest") == curve(tmp_path / "whole")[4:]


def slipstream(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-m", "slipstream.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
def test_the_command_starts_its_ranks_and_hands_signals_on(tmp_path: Path, checkpoint: Path) -> None:
    """Two ranks that share the experts; stopped half-way, the same command continues the same curve."""
    train = {"num_train_epochs": 4, "per_device_train_batch_size": 2}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        write_recipe(tmp_path / name, checkpoint, train=train, distributed={"ep_size": 2})
    whole, parts = tmp_path / "whole" / "recipe.yaml", tmp_path / "parts" / "recipe.yaml"
    assert [outcome.error for outcome in finetune_on_ranks(whole)] == [None, None]
    process = slipstream("finetune", parts, "--nproc", "2")
    file, deadline = parts.parent / "out" / "metrics.jsonl", time.monotonic() + 120
    while not (file.exists() and '"step": 4' in file.read_text()) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=180)
    assert process.returncode == os.EX_TEMPFAIL, errors
    assert "stopped by SIGTERM after step " in out
    process = slipstream("finetune", parts, "--nproc", "2")
    out, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert "continues from: " in out
    assert out.count("saved: ") == out.count("report: ") == 1
    assert curve(parts.parent) == curve(whole.parent)
    assert len(curve(whole.parent)) == 16


def test_ranks_that_fail_end_the_command(tmp_path: Path, checkpoint: Path) -> None:
    recipe = write_recipe(tmp_path, checkpoint, distributed={"ep_size": 3})
    process = slipstream("finetune", recipe, "--nproc", "2")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "ep_size=3 does not divide 4 experts" in errors


def test_nproc_is_checked(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = str(write_recipe(tmp_path, checkpoint))
    with pytest.raises(ValueError, match="--nproc 0: give the number of ranks"):
        main(["finetune", recipe, "--nproc", "0", "--debug"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun has started this already"):
        main(["finetune", recipe, "--nproc", "2", "--debug"])


@pytest.mark.parametrize("name", ["qwen3-30b-a3b.yaml", "multiple-choice.yaml"])
def test_examples_run_dry_without_network_or_weights(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as caught:
        main(["finetune", f"examples/{name}", "--dry-run", "--gpus", "8xH100-80GB"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "its shapes are those of the preset qwen3-30b-a3b" in printed
    assert "packed: " in printed
    assert "plan for 8xH100-80GB: fits: " in printed
    assert "<|im_end|>\n⟧" in printed or "<|im_end|>⟧" in printed


def test_preview_counts_what_is_there(tmp_path: Path, checkpoint: Path) -> None:
    recipe = write_recipe(tmp_path, checkpoint, data={"max_length": 60})
    rows = [{"messages": turns} for turns in CONVERSATIONS[:10]]
    write_jsonl(tmp_path / "rows.jsonl", [*rows, rows[3], rows[3]])
    held_out = write_jsonl(tmp_path / "eval.jsonl", [rows[5], {"messages": CONVERSATIONS[11]}])
    found = preview(load_recipe(recipe, [f"data.eval={held_out}"])[0])
    assert (len(found.rows), found.held_out, found.duplicates, found.leaked) == (12, 2, 2, 1)
    assert (found.lengths > 60).all()
    assert found.counts.cut_rows == 12
    assert found.counts.cut_tokens == int((found.lengths - 60).sum())
    assert (found.packed_rows, found.packing) == (12, 1.0)
    assert found.padding == 1.0
    assert len(preview(load_recipe(recipe)[0], rows=4).rows) == 3  # one of four is held out


def test_preview_renders_with_the_recipes_template(tmp_path: Path, checkpoint: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(CHATML.replace("<|im_start|>", "<|im_start|>own "))
    recipe, _ = load_recipe(write_recipe(tmp_path, checkpoint, data={"chat_template": str(template)}))
    found = preview(recipe)
    assert found.rows[:] == prepare(recipe, overwrite=False).data.train[:]
    assert "<|im_start|>own user" in found.tokenizer.decode(found.rows[0]["input_ids"])


def test_preview_on_the_screen(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, checkpoint, data={"max_length": 60, "eval_fraction": 0})
    with pytest.raises(SystemExit) as caught:
        main(["preview", str(recipe), "--samples", "1"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "⟦After one comes the end.<|im_end|>\n⟧" in printed
    assert printed.count("✂") == 1
    for line in ("tokens a row", "rows: 20 to train on, 0 held out", "max_length 60: 20 rows are longer and get cut, ",
                 "packing: 20 rows of 60, 100.0% filled", "duplicates: 0 rows"):  # fmt: skip
        assert line in printed
    assert not (tmp_path / "out").exists()


def test_pieces_of_a_row(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("<|im_start|>one two")["input_ids"]
    row = {"input_ids": ids, "labels": [*[-100] * (len(ids) - 1), ids[-1]]}
    pieces = token_segments(row, tokenizer, len(ids) - 1)
    assert pieces[0] == ("<|im_start|>", "special", False)
    assert (pieces[-1][1:], "".join(text for text, _, _ in pieces)) == (("trained", True), "<|im_start|>one two")


def test_histogram_covers_every_length() -> None:
    assert histogram(np.array([3, 5, 9]), 2) == [(3, 4, 1), (5, 9, 2)]
    assert histogram(np.array([7, 7])) == [(7, 7, 2)]
    lengths = np.random.default_rng(0).integers(1, 5000, 300)
    bins = histogram(lengths)
    assert sum(number for _, _, number in bins) == 300
    assert (bins[0][0], bins[-1][1]) == (lengths.min(), lengths.max())
    assert all(high + 1 == low for (_, high, _), (low, _, _) in itertools.pairwise(bins))


def test_bytes_round_trip() -> None:
    tokenizer = byte_tokenizer()
    text = "tabs\tand \U0001f600 and\r\n  spaces"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 259
