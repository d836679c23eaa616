"""What is seen and decided during a run: progress, metrics, samples, early stopping, routers."""

import io
import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState

from slipstream import hf
from slipstream.planning.flops import forward_flops
from slipstream.train.callbacks import by_layer
from slipstream.train.progress import ProgressReport, describe
from slipstream.train.recipe_file import load_recipe
from slipstream.train.resume import StoppedBySignal
from slipstream.train.routers import Routers
from slipstream.train.stopping import EarlyStopping
from slipstream.train.throughput import flops_per_token, mfu, peak_memory_gib
from slipstream.train.trainer import SlipstreamTrainer
from tests.tiny_models import tiny_batch, tiny_config, tiny_model
from tests.train.ranks import finetune_on_ranks
from tests.train.tiny_chat import fine_tune, write_recipe


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


def test_every_log_says_how_fast_how_full_and_how_the_experts_fare(tmp_path: Path, checkpoint: Path) -> None:
    changes = {"log": {"logging_steps": 2}, "eval": {"eval_steps": 2}}
    _, screen = fine_tune(tmp_path, checkpoint, **changes)
    lines = [line for line in metrics(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line["memory_gib"] > 0.01
        assert "mfu" not in line  # of a CPU no peak is known
        moe = line["moe"]
        assert moe["layer"] == ["0", "1"]
        assert line["moe_load_max_over_mean"] == max(moe["load_max_over_mean"])
        assert line["moe_load_entropy"] == min(moe["load_entropy"])
        assert line["moe_dead_experts"] == sum(moe["dead_experts"])
        assert all(1 <= ratio <= 4 for ratio in moe["load_max_over_mean"])
        assert all(0 < entropy <= 1 for entropy in moe["load_entropy"])
        assert line["router_grad_norm"] == pytest.approx(sum(n**2 for n in moe["router_grad_norm"]) ** 0.5, rel=1e-4)
        assert 0 < line["router_grad_norm"] < line["grad_norm"]
    assert re.search(r"step 4/4  loss [\d.]+  held-out [\d.]+  [\d,]+ tokens/s  [\d.]+ GiB  max load [\d.]+x", screen)
    assert re.search(r"step 2/4 .* lr [\d.e-]+  0:\d\d:\d\d left", screen)


def test_dense_models_have_no_experts_to_speak_of() -> None:
    routers = Routers(tiny_model("llama"), torch.device("cpu"), freeze=False, bias_update_rate=0.0)
    routers.see(None)
    routers.before_update(None, will_log=True, bad=torch.tensor(False))
    assert routers.measure() == {}
    assert routers.health({}) == ({}, {})


def test_layers_stand_together_in_the_metrics() -> None:
    logs = {"loss": 1.0, "moe/load_entropy/1": 0.5, "moe/load_entropy/3": 0.25, "moe/dead_experts/1": 2.0}
    assert by_layer(logs) == {
        "loss": 1.0,
        "moe": {"layer": ["1", "3"], "load_entropy": [0.5, 0.25], "dead_experts": [2.0, None]},
    }


def test_checkpoints_and_loggers_get_their_part(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loggers see every layer; the history that goes into checkpoints only the worst."""
    seen, histories = [], []
    original = SlipstreamTrainer.train

    def train(trainer: SlipstreamTrainer, *args: Any, **kwargs: Any) -> Any:
        class Logger(type(trainer.callback_handler.callbacks[0])):  # type: ignore[misc]
            def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
                seen.append(dict(logs))

        trainer.add_callback(Logger())
        result = original(trainer, *args, **kwargs)
        histories.extend(trainer.state.log_history)
        return result

    monkeypatch.setattr(SlipstreamTrainer, "train", train)
    fine_tune(tmp_path, checkpoint, train={"max_steps": 1})
    training = next(logs for logs in seen if "loss" in logs)
    assert {f"moe/load_entropy/{layer}" for layer in (0, 1)} <= set(training)
    (kept,) = [entry for entry in histories if "loss" in entry]
    assert "moe_load_entropy" in kept
    assert not any(key.startswith("moe/") for key in kept)


def test_progress_on_a_terminal_and_elsewhere() -> None:
    logs = {"loss": 1.25, "tokens_per_second": 12345.6, "learning_rate": 1e-4, "mfu": 0.4215, "memory_gib": 63.14,
            "moe_load_max_over_mean": 1.52, "moe_dead_experts": 2.0}  # fmt: skip
    line = describe(logs, 1.5, 3725.4)
    assert line == (
        "loss 1.2500  held-out 1.5000  12,346 tokens/s  MFU 42.1%  63.1 GiB  max load 1.5x  2 dead experts  "
        "lr 1.00e-04  1:02:05 left"
    )
    for terminal in (True, False):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=terminal, width=240, highlight=False)
        report = ProgressReport(console)
        state, control = TrainerState(max_steps=4), TrainerControl()
        report.on_train_begin(None, state, control)
        state.global_step = 2
        report.on_step_end(None, state, control)
        report.on_log(None, state, control, logs=logs)
        report.on_log(None, state, control, logs={"eval_loss": 1.5})
        report.on_train_end(None, state, control)
        text = screen.getvalue()
        assert "12,346 tokens/s  MFU 42.1%" in text
        assert "held-out loss 1.5000" in text
        assert ("━" in text) == terminal
        assert ("step 2/4  loss 1.2500" in text) != terminal


def test_flops_and_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3_moe")
    forward = forward_flops(model.config, 100).total
    assert flops_per_token(model, 100.4) == 3 * forward
    experts = sum(p.numel() for _, module in hf.experts_modules(model) for p in module.parameters())
    for _, module in hf.experts_modules(model):
        module.requires_grad_(False)
    trained = 1 - experts / sum(p.numel() for p in model.parameters())
    assert flops_per_token(model, 100) == pytest.approx((2 + trained) * forward)
    assert mfu(1000.0, 1e9, torch.device("cpu"), 1) is None
    for name, wanted in (("NVIDIA H200", 0.4), ("a GPU of tomorrow", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert mfu(2 * 0.4 * 989.0, 1e12, torch.device("cuda"), 2) == (pytest.approx(wanted) if wanted else None)
    before = peak_memory_gib(torch.device("cpu"))
    held = torch.ones(2**26)
    assert peak_memory_gib(torch.device("cpu")) >= max(before, held.nbytes / 2**30)


@pytest.mark.parametrize("model_type", ["gemma4_text", "dots3_note_text"])
def test_flops_that_cannot_be_counted(model_type: str) -> None:
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(model_type))
    assert flops_per_token(model, 100) is None


def test_samples_at_each_evaluation(tmp_path: Path, checkpoint: Path) -> None:
    prompts = ["What comes after one?", "And after two?"]
    result, screen = fine_tune(
        tmp_path, checkpoint, eval={"sample_prompt": prompts, "max_new_tokens": 3, "eval_steps": 2}
    )
    lines = [line for line in metrics(tmp_path) if "samples" in line]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert all([pair["prompt"] for pair in line["samples"]] == prompts for line in lines)
    assert result.answer_before == lines[0]["samples"][0]["answer"]
    assert result.answer_after == lines[-1]["samples"][0]["answer"]
    assert screen.count("answer: ") == 6


def stopped_at(losses: list[float], patience: int, threshold: float = 0.0, first: float | None = None) -> int | None:
    """The evaluation, counted from 1, after which training stops."""
    callback, state = EarlyStopping(patience, threshold, Console(quiet=True)), TrainerState(max_steps=1000)
    callback.first_loss = first
    for number, loss in enumerate(losses, start=1):
        state.global_step = number
        state.log_history.append({"step": number, "eval_loss": loss})
        control = TrainerControl()
        callback.on_evaluate(SimpleNamespace(), state, control)
        if control.should_training_stop:
            return number
    return None


def test_when_to_stop_early() -> None:
    assert stopped_at([3, 2, 1, 0.5], 1) is None
    assert stopped_at([3, 2, 2.5, 2.4, 1], 2) == 4
    assert stopped_at([3, 2, 2.5, 1.9, 2, 2], 2) == 6
    assert stopped_at([3, 2.95, 2.9], 2, threshold=0.2) == 3
    assert stopped_at([3, 2], 1, first=2.5) == 1
    assert stopped_at([2, float("nan"), float("nan")], 2) == 3


def test_early_stopping_ends_the_run_and_keeps_the_model(tmp_path: Path, checkpoint: Path) -> None:
    # A rate of almost nothing: the loss falls by less than the threshold.
    changes = {"train": {"max_steps": 10, "learning_rate": 1e-9},
               "eval": {"eval_steps": 2, "early_stopping_patience": 2, "early_stopping_threshold": 0.01}}  # fmt: skip
    result, screen = fine_tune(tmp_path, checkpoint, **changes)
    assert result.steps == 4
    assert re.search(
        r"stopping early after step 4: the held-out loss was lowest \([\d.]+\) after step 0, 2 eval", screen
    )
    assert (result.output_dir / "model.safetensors").is_file()
    assert [line["step"] for line in metrics(tmp_path) if "eval_loss" in line] == [0, 2, 4]


def test_a_continued_run_stops_early_where_it_would_have(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"train": {"max_steps": 10, "learning_rate": 1e-9},
               "eval": {"eval_steps": 1, "early_stopping_patience": 4, "early_stopping_threshold": 0.01}}  # fmt: skip
    original = SlipstreamTrainer.training_step

    def training_step(trainer: SlipstreamTrainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(SlipstreamTrainer, "training_step", training_step)
    with pytest.raises(StoppedBySignal):
        fine_tune(tmp_path, checkpoint, **changes)
    monkeypatch.undo()
    result, screen = fine_tune(tmp_path, checkpoint, **changes)
    assert result.steps == 4
    assert "stopping early after step 4" in screen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval": {"early_stopping_patience": 2}}, "nothing is evaluated while training; set eval_steps"),
        (
            {"data": {"eval_fraction": 0}, "eval": {"early_stopping_patience": 2, "eval_steps": 1}},
            "no data is held out",
        ),
        ({"train": {"freeze_router": True, "router_bias_update_rate": 0.1}}, "changes the routers; leave one out"),
        ({"train": {"global_batch_size": 8, "gradient_accumulation_steps": 2}}, "follows from it; leave one out"),
        ({"train": {"per_device_train_batch_size": "big"}}, "per_device_train_batch_size"),
        ({"train": {"max_loss_spike": 0.5}}, "max_loss_spike: input should be greater than 1"),
        ({"train": {"on_bad_step": "hope"}}, "on_bad_step: input should be 'stop', 'skip' or 'ignore'"),
    ],
)
def test_recipes_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe(write_recipe(tmp_path, checkpoint, **changes))


def routers_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if ".gate." in name}


def test_frozen_routers_stay(tmp_path: Path, checkpoint: Path) -> None:
    result, _ = fine_tune(tmp_path, checkpoint, train={"freeze_router": True, "max_steps": 2})
    before, after = routers_of(checkpoint), routers_of(result.output_dir)
    assert before
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any("router_grad_norm" in line for line in metrics(tmp_path))


def test_no_bias_to_balance_by(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(
        ValueError, match=r"router_bias_update_rate=0.1: the routers of Qwen3MoeForCausalLM have no bias"
    ):
        fine_tune(tmp_path, checkpoint, train={"router_bias_update_rate": 0.1})
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def sigmoid_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """GLM-4 MoE, whose routers have a bias."""
    folder = tmp_path_factory.mktemp("glm")
    tiny_model("glm4_moe", None, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _stop_half_way() -> None:
    step = SlipstreamTrainer.training_step

    def stopping(self: SlipstreamTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 2 and self.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    SlipstreamTrainer.training_step = stopping


def test_balancing_by_bias_is_in_the_model_and_continues_exactly(tmp_path: Path, sigmoid_checkpoint: Path) -> None:
    """On two ranks with expert parallelism, stopped half-way: the weights of a run on one that was not stopped."""
    train = {"router_bias_update_rate": 0.01, "max_steps": 6, "per_device_train_batch_size": 4}
    whole, _ = fine_tune(tmp_path / "whole", sigmoid_checkpoint, train=train)
    before, after = routers_of(sigmoid_checkpoint), routers_of(whole.output_dir)
    names = [name for name in before if name.endswith("e_score_correction_bias")]
    assert len(names) == 3
    for name in names:
        moved = (after[name] - before[name]) / 0.01
        torch.testing.assert_close(moved, moved.round(), atol=1e-4, rtol=0)
        assert 1 <= moved.abs().max() <= 6

    (tmp_path / "parts").mkdir()
    parts = {**train, "per_device_train_batch_size": 2}
    path = write_recipe(tmp_path / "parts", sigmoid_checkpoint, train=parts, distributed={"ep_size": 2})
    for change, error, wanted in (
        (_stop_half_way, "stopped by SIGTERM after step 3", ""),
        (None, "None", "saved: "),
    ):
        for rank, outcome in enumerate(finetune_on_ranks(path, change)):
            assert str(outcome.error).startswith(error)
            assert rank > 0 or wanted in outcome.screen
    # Sums in another order may turn a token to another expert, and a bias by a step.
    continued = routers_of(tmp_path / "parts" / "out")
    assert sum(not torch.allclose(continued[name], after[name], atol=1e-6) for name in names) <= 1
    assert [line["step"] for line in metrics(tmp_path / "parts") if "loss" in line] == [1, 2, 3, 4, 5, 6]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / "out")
    assert torch.isfinite(reloaded(tiny_batch()).logits).all()
