"""A step that must not be applied is not, and its batch is on disk."""

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from slipstream.checkpoint.resume import latest
from slipstream.train.formats import IGNORE
from slipstream.train.guards import ENOUGH, BadStepError, StepGuard, _rows
from slipstream.train.recipe_file import load_recipe
from slipstream.train.resume import StoppedBySignal
from slipstream.train.run import RunResult, run
from slipstream.train.trainer import SlipstreamTrainer
from tests.train.ranks import finetune_on_ranks
from tests.train.tiny_chat import write_recipe

# 16 rows: 4 steps an epoch, with two micro-batches each.
TRAIN = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.fixture
def guard(tmp_path: Path, tokenizer: Any) -> StepGuard:
    return StepGuard("skip", 3.0, tmp_path, tokenizer, Console(quiet=True).print)


def feed(guard: StepGuard, losses: list[float]) -> None:
    for loss in losses:
        assert guard.judge(loss, 1.0) is None
        guard.accept(loss)


def test_what_is_wrong_with_a_step(guard: StepGuard) -> None:
    nan, inf = float("nan"), float("inf")
    assert guard.judge(nan, 1.0) == "its loss is nan"
    assert guard.judge(inf, nan) == "its loss is inf"
    assert guard.judge(1.0, inf) == "the norm of its gradients is inf (its loss, 1.0000, is finite)"
    feed(guard, [1.0] * (ENOUGH - 1))
    assert guard.judge(100.0, 1.0) is None  # too few steps to know what is usual
    feed(guard, [1.0])
    assert guard.judge(2.9, 1.0) is None
    assert guard.judge(3.1, 1.0) == ("its loss is 3.1000, more than 3 times 1.0000, the median of the last 10 steps")
    feed(guard, [0.1] * 60)
    assert guard.judge(0.31, 1.0) is not None  # only the last count
    guard.max_loss_spike = None
    assert guard.judge(1e6, 1.0) is None


def test_skipping_ends_when_nothing_else_is_left(guard: StepGuard) -> None:
    stops = [guard.reject(step, "bad", 0, {}) for step in range(ENOUGH)]
    assert stops == [False] * (ENOUGH - 1) + [True]
    assert guard.state() == {"recent": [], "bad_in_a_row": 0}  # whoever goes on all the same gets as many again
    guard.load_state({"recent": [2.0], "bad_in_a_row": ENOUGH - 2})
    assert [guard.reject(step, "bad", 0, {}) for step in range(2)] == [False, True]
    guard.accept(1.0)
    assert not guard.reject(99, "bad", 0, {})


def test_rows_without_padding_and_packed_ones_apart() -> None:
    ids, mask = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    labels = torch.tensor([[IGNORE, 2, 3], [IGNORE, 5, IGNORE]])
    assert _rows({"input_ids": ids, "labels": labels, "attention_mask": mask}) == [
        {"input_ids": [1, 2, 3], "labels": [IGNORE, 2, 3]},
        {"input_ids": [4, 5], "labels": [IGNORE, 5]},
    ]
    packed = {"input_ids": torch.tensor([[1, 2, 3, 4, 5, 0]]), "labels": torch.tensor([[-100, 2, -100, 4, 5, -100]]),
              "position_ids": torch.tensor([[0, 1, 0, 1, 2, 0]])}  # fmt: skip
    assert _rows(packed) == [
        {"input_ids": [1, 2], "labels": [IGNORE, 2]},
        {"input_ids": [3, 4, 5], "labels": [IGNORE, 4, 5]},  # what only fills the row is left out
    ]


class Spoil:
    """Patches the trainer so that something happens to the loss or the gradients of one micro-batch of some steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.batches = monkeypatch, []  # type: ignore[var-annotated]

    def loss(self, steps: list[int], change: Callable[[Any], Any]) -> None:
        original = SlipstreamTrainer.compute_loss

        def compute_loss(trainer: SlipstreamTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = original(trainer, model, inputs, *args, **kwargs)
            if trainer.state.global_step + 1 in steps:
                self.batches.append(inputs["input_ids"].clone())
                if len(self.batches) % 2 == 0:  # the second of the step
                    return change(loss)
            return loss

        self.monkeypatch.setattr(SlipstreamTrainer, "compute_loss", compute_loss)


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    return Spoil(monkeypatch)


def fine_tune(folder: Path, checkpoint: Path, screen: io.StringIO | None = None, **changes: Any) -> RunResult:
    folder.mkdir(exist_ok=True)
    changes["train"] = {**TRAIN, **changes.get("train", {})}
    recipe, _ = load_recipe(write_recipe(folder, checkpoint, **changes))
    result = run(recipe, file=screen or io.StringIO())
    assert result is not None
    return result


def curve(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss")
    return [{key: line[key] for key in kept if key in line} for line in lines if "train_runtime" not in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "out").glob("*model.safetensors")))


# Our optimizer leaves an update out when the device says so, and the host hears of it a step later.
OPTIMIZERS = ["slipstream_adamw", "adamw_torch_fused"]


@pytest.mark.parametrize("optim", [OPTIMIZERS[0], pytest.param(OPTIMIZERS[1], marks=pytest.mark.slow)])
def test_stops_before_the_update_and_goes_on_without_it(
    optim: str, tmp_path: Path, checkpoint: Path, spoil: Spoil
) -> None:
    """Dropout shows that random numbers are those of a run that skipped the step at once."""
    lora = {"r": 2, "lora_dropout": 0.3, "target_modules": ["q_proj", "v_proj"]}
    changes = {"lora": lora, "train": {"on_bad_step": "stop", "optim": optim}}
    spoil.loss([6], lambda loss: loss * float("nan"))
    with pytest.raises(BadStepError) as caught:
        fine_tune(tmp_path / "parts", checkpoint, **changes)
    out = tmp_path / "parts" / "out"
    bad = out / "bad-step-000006"
    assert str(caught.value) == (
        f"step 6 was not applied: its loss is nan; its rows are in {bad}; the same command with "
        "train.on_bad_step=skip goes on without this update"
    )
    rows = [json.loads(line) for line in (bad / "rank-0.jsonl").read_text().splitlines()]
    assert [row["micro_batch"] for row in rows] == [0, 0, 1, 1]
    first, second = spoil.batches
    wanted = [ids[ids != 0].tolist() for batch in (first, second) for ids in batch]  # 0 is the padding
    assert [row["input_ids"] for row in rows] == wanted
    assert "<|im_start|>assistant" in rows[0]["text"]
    assert rows[0]["micro_batch_loss"] > 0
    assert rows[2]["micro_batch_loss"] != rows[2]["micro_batch_loss"]
    record = json.loads((bad / "step.json").read_text())
    assert (record["step"], record["reason"]) == (6, "its loss is nan")
    assert record["learning_rate"] > 0
    losses = [line["loss"] for line in curve(tmp_path / "parts") if "loss" in line]
    assert record["recent_losses"] == pytest.approx(losses)
    assert len(losses) == 5
    assert "bad-step-000006 is of a step that was not applied: its loss is nan." in (out / "report.html").read_text()
    # What was good is saved, and the same command goes on.
    assert latest(out / "checkpoints") == out / "checkpoints" / "step-000005"
    changes["train"] = {"on_bad_step": "skip", "optim": optim}
    spoil.batches.clear()
    fine_tune(tmp_path / "parts", checkpoint, **changes)
    spoil.batches.clear()
    screen = io.StringIO()
    fine_tune(tmp_path / "whole", checkpoint, screen, **changes)
    assert "step 6 was not applied: its loss is nan" in screen.getvalue()
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert [line["step"] for line in curve(tmp_path / "whole") if "loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_saved_rows_can_be_trained_on(tmp_path: Path, checkpoint: Path, spoil: Spoil) -> None:
    spoil.loss([1], lambda loss: loss * float("inf"))
    with pytest.raises(BadStepError, match="step 1 was not applied: its loss is inf"):
        fine_tune(tmp_path, checkpoint)
    rows = tmp_path / "out" / "bad-step-000001" / "rank-0.jsonl"
    assert not (tmp_path / "out" / "checkpoints").exists()  # nothing was trained
    spoil.batches.append(None)  # even again
    result = fine_tune(tmp_path / "again", checkpoint, data={"train": str(rows), "eval_fraction": 0},
                       train={"num_train_epochs": 1, "on_bad_step": "ignore"})  # fmt: skip
    assert result.steps == 1


@pytest.mark.parametrize("optim", ["slipstream_adamw", "slipstream_adamw_master", "adamw_torch"])
def test_a_skipped_update_changes_nothing(optim: str, tmp_path: Path, checkpoint: Path, spoil: Spoil) -> None:
    """All steps bad but the first: the weights of a run of one step."""
    train = {"max_steps": 3, "lr_scheduler_type": "constant", "warmup_steps": 0, "on_bad_step": "skip", "optim": optim}
    train["weight_decay"] = 0.1
    fine_tune(tmp_path / "one", checkpoint, train={**train, "max_steps": 1})
    spoil.loss([2, 3], lambda loss: loss * float("nan"))
    fine_tune(tmp_path / "three", checkpoint, train=train)
    one, three = weights(tmp_path / "one"), weights(tmp_path / "three")
    assert all(torch.equal(tensor, three[name]) for name, tensor in one.items())
    logged = [line["loss"] for line in curve(tmp_path / "three") if "loss" in line]
    assert logged == pytest.approx([logged[0]] * 3)
    assert {path.name for path in (tmp_path / "three" / "out").glob("bad-*")} == {"bad-step-000002", "bad-step-000003"}


def test_a_run_of_bad_steps_alone_is_none(tmp_path: Path, checkpoint: Path, spoil: Spoil) -> None:
    spoil.loss([1, 2], lambda loss: loss * float("nan"))
    with pytest.raises(BadStepError, match="none of 2 steps was fit to be applied: nothing was trained"):
        fine_tune(tmp_path, checkpoint, train={"max_steps": 2, "on_bad_step": "skip"})
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert (tmp_path / "out" / "bad-step-000002").is_dir()


def test_a_run_with_a_skipped_step_is_the_same_with_either_way_of_telling(
    tmp_path: Path, checkpoint: Path, spoil: Spoil, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that waits before each update, as for other optimizers, comes to the same weights and logs: with the first
    and last step bad, and one after which everything has to be known at once for an evaluation."""
    train = {"on_bad_step": "skip", "optim": "slipstream_adamw", "router_aux_loss_coef": 0.1}
    waits, verdict = [False], SlipstreamTrainer._judge

    def judge(trainer: SlipstreamTrainer, grad_norm: torch.Tensor) -> torch.Tensor:
        bad = verdict(trainer, grad_norm)
        if waits[0]:
            assert trainer.model is not None
            if trainer.settle():
                trainer.model.zero_grad()
            return torch.zeros_like(bad)
        return bad

    monkeypatch.setattr(SlipstreamTrainer, "_judge", judge)
    spoil.loss([1, 3, 8], lambda loss: loss * float("nan"))
    found = []
    for waits[0] in (False, True):
        folder = tmp_path / str(waits[0])
        fine_tune(folder, checkpoint, train=train, eval={"eval_steps": 3})
        assert {path.name for path in (folder / "out").glob("bad-*")} == {f"bad-step-00000{n}" for n in (1, 3, 8)}
        found.append((json.dumps(curve(folder)), weights(folder)))
    (late, ours), (now, theirs) = found
    assert late == now
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_what_the_device_finds_is_what_the_host_finds(guard: StepGuard) -> None:
    inf = float("inf")
    cases = [(1.0, 1.0), (inf, 1.0), (float("nan"), 1.0), (1.0, inf), (1.0, float("nan")), (-inf, 1.0), (2.9, 1.0),
             (3.0, 1.0), (3.0000002, 1.0), (100.0, 1.0)]  # fmt: skip
    for known in ([], [1.0] * ENOUGH):
        feed(guard, known)
        for case in cases:
            loss, norm = (torch.tensor(value) for value in case)
            assert bool(guard.is_bad(loss, norm)) == (guard.judge(loss.item(), norm.item()) is not None), case
    assert bool(guard.is_bad(torch.tensor(3.0000002), torch.tensor(1.0)))


def test_a_gradient_that_overflows(tmp_path: Path, checkpoint: Path, spoil: Spoil) -> None:
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * float("inf")

    spoil.loss([2], lambda loss: Overflow.apply(loss))
    with pytest.raises(BadStepError, match=r"step 2 was not applied: the norm of its gradients is (nan|inf) \(its"):
        fine_tune(tmp_path, checkpoint)


def test_a_jump_of_the_loss(tmp_path: Path, checkpoint: Path, spoil: Spoil) -> None:
    train = {"max_steps": 14, "max_loss_spike": 4.0, "optim": "slipstream_adamw"}
    spoil.loss([13], lambda loss: loss * 100)
    with pytest.raises(BadStepError, match=r"step 13 was not applied: its loss is [\d.]+, more than 4 times"):
        fine_tune(tmp_path, checkpoint, train=train)
    spoil.batches.clear()
    fine_tune(tmp_path / "ignore", checkpoint, train={**train, "on_bad_step": "ignore"})
    assert not list((tmp_path / "ignore" / "out").glob("bad-*"))


def test_a_jump_after_going_on(tmp_path: Path, checkpoint: Path, spoil: Spoil, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the guard goes by is in the checkpoint; the log has a part of it."""
    changes = {"train": {"max_steps": 14, "max_loss_spike": 4.0}, "log": {"logging_steps": 7}}
    spoil.loss([13], lambda loss: loss * 100)
    step = SlipstreamTrainer.training_step

    def training_step(trainer: SlipstreamTrainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SlipstreamTrainer, "training_step", training_step)
        with pytest.raises(StoppedBySignal, match="after step 12"):
            fine_tune(tmp_path, checkpoint, **changes)
    with pytest.raises(BadStepError, match=r"step 13 was not applied: .* the median of the last 12 steps"):
        fine_tune(tmp_path, checkpoint, **changes)


def _spoil_a_loss() -> None:
    compute = SlipstreamTrainer.compute_loss

    def spoiled(self: SlipstreamTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = compute(self, *args, **kwargs)
        bad = self.state.global_step == 2 and self.args.process_index == 1
        return loss * float("nan") if bad else loss

    SlipstreamTrainer.compute_loss = spoiled


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_all_ranks_decide_alike(action: str, tmp_path: Path, checkpoint: Path) -> None:
    """One rank's loss is not finite; both stop, or both go on, and each writes its own rows."""
    train = {"max_steps": 4, "per_device_train_batch_size": 2, "on_bad_step": action, "optim": "slipstream_adamw"}
    path = write_recipe(tmp_path, checkpoint, train=train, distributed={"ep_size": 2})
    first, second = finetune_on_ranks(path, _spoil_a_loss)
    bad = tmp_path / "out" / "bad-step-000003"
    assert {file.name for file in bad.iterdir()} == {"rank-0.jsonl", "rank-1.jsonl", "step.json"}
    ours, theirs = ((bad / f"rank-{rank}.jsonl").read_text().splitlines() for rank in (0, 1))
    assert len(ours) == len(theirs) == 2
    assert not set(ours) & set(theirs)
    if action == "skip":
        assert first.error is second.error is None
        assert first.screen.count("step 3 was not applied: its loss is nan") == 1
        assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path).values())
    else:
        for _, error in (first, second):
            assert error is not None
            assert error.startswith("step 3 was not applied: its loss is nan")
        assert latest(tmp_path / "out" / "checkpoints") == tmp_path / "out" / "checkpoints" / "step-000002"
