"""How many rows a micro-batch has: found by trial steps that leave no trace."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from slipstream.train import batch_size
from slipstream.train import run as run_module
from slipstream.train.batch_size import (
    Memory,
    TrialStep,
    agreed,
    find_batch_size,
    largest_power,
    search,
    set_rows_per_step,
)
from slipstream.train.recipe_file import load_recipe
from slipstream.train.resume import StoppedBySignal
from slipstream.train.trainer import SlipstreamTrainer
from tests.distributed.harness import run_ranks
from tests.train.tiny_chat import fine_tune, write_recipe


class Device:
    """A pretended device: what a step on so many tokens takes, in bytes, and what was tried."""

    def __init__(self, per_token: float, fixed: int = 1000, update: int = 0, capacity: float = 1e18) -> None:
        self.per_token, self.fixed, self.update, self.capacity = per_token, fixed, update, capacity
        self.tried: list[int] = []

    def __call__(self, tokens: int) -> Memory:
        self.tried.append(tokens)
        backward = int(self.fixed + self.per_token * tokens)
        if max(backward, self.update) > self.capacity:
            raise torch.OutOfMemoryError("pretended")
        return Memory(backward, self.update)


def alone(value: int) -> int:
    return value


def test_the_largest_power_of_two_that_fits() -> None:
    for limit, wanted in ((2000, 1), (3000, 2), (4999, 2), (5000, 4), (9000, 8), (10**6, 16)):
        device = Device(per_token=10)
        assert search(device, 16, 100, limit, alone)[0] == wanted
        assert max(device.tried) == wanted * 100, "nothing was tried that does not fit"
    size, peak = search(Device(per_token=10), 16, 100, 5000, alone)
    assert (size, peak) == (4, 5000)
    assert search(Device(per_token=10), 12, 100, 10**6, alone)[0] == 4  # 8 does not divide 12
    assert search(Device(per_token=10), 1, 100, 10**6, alone)[0] == 1


def test_an_update_that_needs_more_than_backward_does_not_hide_what_rows_cost() -> None:
    device = Device(per_token=10, update=4000)
    assert search(device, 64, 100, 4500, alone)[0] == 2
    assert max(device.tried) == 200


def test_out_of_memory() -> None:
    """Alone one goes back, as where a step needs more than the line says; with not even a row there is no size."""
    assert search(Device(per_token=10, capacity=2500), 16, 100, 10**6, alone)[0] == 1
    with pytest.raises(torch.OutOfMemoryError):
        search(Device(per_token=10, capacity=10), 16, 100, 10**6, alone)


def one_rank() -> tuple[int, list[int]]:
    """Rank 1 needs twice as much for a token."""
    cpu = torch.device("cpu")
    device = Device(per_token=10 * (1 + dist.get_rank()))
    limit = agreed(9000 + 500 * dist.get_rank(), dist.ReduceOp.MIN, cpu)
    assert limit == 9000
    size, _ = search(device, 16, 100, limit, lambda value: agreed(value, dist.ReduceOp.MAX, cpu))
    return size, device.tried


def test_ranks_agree() -> None:
    results = run_ranks(one_rank, 2)
    assert results[0] == results[1]
    assert results[0][0] == 4


def test_largest_power() -> None:
    assert [largest_power(rows, 8) for rows in (1, 2, 6, 8, 12, 64, 7)] == [1, 2, 2, 8, 4, 8, 1]


def arguments(folder: Path, checkpoint: Path, world_size: int = 1, **train: Any) -> Any:
    recipe, _ = load_recipe(write_recipe(folder, checkpoint, train=train))
    size = recipe.train.per_device_train_batch_size
    args = SimpleNamespace(world_size=world_size, gradient_accumulation_steps=recipe.train.gradient_accumulation_steps,
                           per_device_train_batch_size=1 if size == "auto" else size)  # fmt: skip
    set_rows_per_step(recipe, args)  # type: ignore[arg-type]
    return args


def test_rows_of_a_step_stay_as_asked(tmp_path: Path, checkpoint: Path) -> None:
    def steps(**train: Any) -> int:
        return int(arguments(tmp_path, checkpoint, **train).gradient_accumulation_steps)

    assert steps(per_device_train_batch_size=4, gradient_accumulation_steps=3) == 3
    assert steps(per_device_train_batch_size=4, global_batch_size=32) == 8
    assert steps(per_device_train_batch_size=4, global_batch_size=32, world_size=2) == 4
    assert steps(per_device_train_batch_size="auto", global_batch_size=32, world_size=2) == 16
    assert steps(per_device_train_batch_size="auto") == 8
    assert steps(per_device_train_batch_size="auto", gradient_accumulation_steps=4) == 32
    message = r"global_batch_size=30 is no multiple of 8 \(2 ranks x 4 rows each\); use 24 or 32"
    with pytest.raises(ValueError, match=message):
        steps(per_device_train_batch_size=4, global_batch_size=30, world_size=2)
    with pytest.raises(ValueError, match=r"global_batch_size=31 is no multiple of 2 \(2 ranks\); use 30 or 32"):
        steps(per_device_train_batch_size="auto", global_batch_size=31, world_size=2)


def curve(folder: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["tokens"], line["moe"]) for line in lines if "loss" in line]


def test_auto_on_a_cpu(tmp_path: Path, checkpoint: Path) -> None:
    """The curve of the same rows asked for by hand."""
    auto = {"per_device_train_batch_size": "auto", "global_batch_size": 4, "max_steps": 3}
    _, screen = fine_tune(tmp_path / "auto", checkpoint, train=auto)
    assert "train: 3 steps of 4 rows a device" in screen
    assert "micro-batch: 4 rows a device, 1 for each step (there is no limit to find on a CPU)" in screen
    fine_tune(tmp_path / "hand", checkpoint, train={"per_device_train_batch_size": 4, "max_steps": 3})
    assert curve(tmp_path / "auto") == curve(tmp_path / "hand")


PACKED, LORA = {"data": {"packing": True, "max_length": 96}}, {"lora": {"r": 2}}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [PACKED, {}, LORA])
def test_trial_steps_leave_no_trace(
    changes: dict[str, Any], tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The curve with trial steps of many sizes before training is the one without, bit for bit."""
    train = {"per_device_train_batch_size": "auto", "global_batch_size": 4, "num_train_epochs": 2}
    fine_tune(tmp_path / "without", checkpoint, train=train, **changes)

    def tried(trainer: SlipstreamTrainer, max_length: int, known: int | None = None) -> str:
        trial = TrialStep(trainer, max_length)
        assert search(trial, 4, trial.length, 10**18, alone)[0] == 4
        for tokens in (trial.length // 2, trial.length, 4 * trial.length):
            rows = trial._batch(tokens)
            assert sum(len(row["input_ids"]) for row in rows) == tokens
            assert all(len(row["input_ids"]) == len(row["labels"]) for row in rows)
            assert all(sum(row.get("seq_lengths", [tokens])) in (tokens, trial.length) for row in rows)
        trial.finish()
        assert trainer.optimizer is None
        return find_batch_size(trainer, max_length, known)

    monkeypatch.setattr(run_module, "find_batch_size", tried)
    fine_tune(tmp_path / "with", checkpoint, train=train, **changes)
    assert curve(tmp_path / "with") == curve(tmp_path / "without")


def test_a_gpu_is_measured(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pretended one: its trials decide, and a continued run keeps what they found."""
    device = Device(per_token=10)

    class Pretended:
        length = 100

        def __init__(self, trainer: Any, max_length: int) -> None:
            """As `TrialStep`."""

        def __call__(self, tokens: int) -> Memory:
            return device(tokens)

        def finish(self) -> None: ...

    monkeypatch.setattr(batch_size, "TrialStep", Pretended)
    monkeypatch.setattr(batch_size, "memory_limit", lambda device: 4000)
    found: list[str] = []

    def on_a_gpu(trainer: Any, max_length: int, known: int | None = None) -> str:
        args = trainer.args
        shell = SimpleNamespace(args=SimpleNamespace(device=torch.device("cuda"), gradient_accumulation_steps=4))
        with monkeypatch.context() as patch:
            patch.setattr(batch_size, "agreed", lambda value, how, device: value)
            found.append(find_batch_size(shell, max_length, known))
        batch_size.hf_trainer.set_batch_size(trainer, shell._train_batch_size)
        args.gradient_accumulation_steps = shell.args.gradient_accumulation_steps
        return found[-1]

    monkeypatch.setattr(run_module, "find_batch_size", on_a_gpu)
    train = {"per_device_train_batch_size": "auto", "global_batch_size": 4, "max_steps": 3}
    original = SlipstreamTrainer.training_step

    def training_step(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        assert len(inputs["input_ids"]) == 2
        if trainer.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SlipstreamTrainer, "training_step", training_step)
    with pytest.raises(StoppedBySignal):
        fine_tune(tmp_path, checkpoint, train=train)
    assert found == ["micro-batch: 2 rows a device, 2 for each step (2 x 100 tokens need 0.0 of 0.0 GiB)"]
    monkeypatch.setattr(SlipstreamTrainer, "training_step", original)
    device.tried.clear()
    fine_tune(tmp_path, checkpoint, train=train)
    assert found[1] == "micro-batch: 2 rows a device, 2 for each step (as before)"
    assert device.tried == []
