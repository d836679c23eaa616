"""A run that is stopped and started again has the curve of one that was not; what cannot be continued is refused."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn

from slipstream.checkpoint.resume import Checkpointer, latest, load, read_info
from slipstream.train.recipe_file import load_recipe
from slipstream.train.resume import SaveAndStop, StoppedBySignal
from slipstream.train.run import RunResult, run
from slipstream.train.trainer import SlipstreamTrainer
from tests.train.tiny_chat import write_recipe

# 16 rows: 4 steps an epoch, with two micro-batches each; step 6 is in the middle of the second epoch.
TRAIN = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 4,
    "eval_steps": 5,
}


class Stop:
    """Patches the trainer so that something happens in the first micro-batch of a step, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def in_step(self, step: int, what: Callable[[], None]) -> None:
        original = SlipstreamTrainer.training_step

        def training_step(trainer: SlipstreamTrainer, *args: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step == step - 1 and not self.done:
                self.done = True
                what()
            return original(trainer, *args, **kwargs)

        self.done = False
        self.monkeypatch.setattr(SlipstreamTrainer, "training_step", training_step)


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Stop:
    return Stop(monkeypatch)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fail() -> None:
    raise RuntimeError("told to")


def written(path: Path) -> None:
    """Wait for a checkpoint that was under way when training failed; a process that ends does so by itself."""
    deadline = time.monotonic() + 30
    while latest(path.parent) != path and time.monotonic() < deadline:
        time.sleep(0.01)


def fine_tune(folder: Path, checkpoint: Path, *overrides: str, overwrite: bool = False, **changes: Any) -> RunResult:
    folder.mkdir(exist_ok=True)
    changes.setdefault("train", TRAIN)
    recipe, _ = load_recipe(write_recipe(folder, checkpoint, **changes), overrides)
    result = run(recipe, overwrite=overwrite, file=io.StringIO())
    assert result is not None
    return result


def curve(folder: Path) -> list[dict[str, Any]]:
    """What was logged, without the times."""
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss", "epoch")
    return [
        {key: line[key] for key in kept if key in line}
        for line in lines
        if not {"train_runtime", "samples"} & set(line)
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "out").glob("*model.safetensors")))


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    fine_tune(folder, checkpoint, eval={"sample_prompt": "What?", "max_new_tokens": 2})
    return folder


@pytest.mark.parametrize("step", [4, 6])
def test_signal_and_same_command_again(
    step: int, whole: Path, tmp_path: Path, checkpoint: Path, stop: Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of an epoch, and in the middle of one and of a logging interval."""
    stop.in_step(step, terminate)
    handlers = signal.getsignal(signal.SIGTERM)
    sample = {"sample_prompt": "What?", "max_new_tokens": 2}
    with pytest.raises(StoppedBySignal, match=f"SIGTERM after step {step}; the same command continues from .*{step}$"):
        fine_tune(tmp_path, checkpoint, eval=sample)
    assert signal.getsignal(signal.SIGTERM) is handlers
    assert latest(tmp_path / "out" / "checkpoints") == tmp_path / "out" / "checkpoints" / f"step-{step:06d}"
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert f"not finished: the last record is of step {step}" in (tmp_path / "out" / "report.html").read_text()
    evaluated = []
    original = SlipstreamTrainer.evaluate

    def evaluate(trainer: SlipstreamTrainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        evaluated.append(trainer.state.global_step)
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(SlipstreamTrainer, "evaluate", evaluate)
    result = fine_tune(tmp_path, checkpoint, eval=sample)
    assert curve(tmp_path) == curve(whole)
    assert same_weights(tmp_path, whole)
    assert result.eval_loss_before == curve(whole)[0]["eval_loss"]
    assert result.answer_before is not None
    assert evaluated == [at for at in (5, 10, 12) if at > step], "the model's loss before training is known"
    # Nobody asked for checkpoints, and the run is over.
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_failure_continues_from_the_last_checkpoint(whole: Path, tmp_path: Path, checkpoint: Path, stop: Stop) -> None:
    folder = tmp_path / "out" / "checkpoints"
    stop.in_step(9, fail)
    with pytest.raises(RuntimeError, match="told to"):
        fine_tune(tmp_path, checkpoint, "checkpoint.save_steps=2")
    (folder / "step-000099.incomplete").mkdir()
    written(folder / "step-000008")
    assert {path.name for path in folder.glob("step-*0*")} >= {"step-000006", "step-000008"}
    # Metrics of steps after the checkpoint are written again.
    with (tmp_path / "out" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "elapsed": 1, "loss": 7}\n{"step": 9, "los')
    fine_tune(tmp_path, checkpoint, "checkpoint.save_steps=2")
    assert curve(tmp_path) == curve(whole)
    assert same_weights(tmp_path, whole)
    # Those that were asked for stay, but nothing continues from them by itself.
    assert {path.name for path in folder.iterdir()} == {"step-000010", "step-000012"}
    fine_tune(tmp_path, checkpoint, "checkpoint.save_steps=20", overwrite=True)
    assert curve(tmp_path) == curve(whole)
    # Back to an earlier step, by name.
    named = f"checkpoint.resume_from_checkpoint={folder / 'step-000010'}"
    shutil.copytree(folder, tmp_path / "copy")
    fine_tune(tmp_path, checkpoint, named, overwrite=True)
    assert curve(tmp_path)[-1] == curve(whole)[-1]
    assert same_weights(tmp_path, whole)


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 2},
        {"r": 2, "lora_dropout": 0.3, "target_modules": ["q_proj", "v_proj"]},
        {"r": 2, "target_modules": ["q_proj"], "target_parameters": "all-experts", "load_in_4bit": True},
    ],
    ids=["all-linear", "dropout", "4 bits"],
)
def test_lora(lora: dict[str, Any], tmp_path: Path, checkpoint: Path, stop: Stop) -> None:
    """The adapter alone is saved, and the random numbers go on where they were."""
    fine_tune(tmp_path / "whole", checkpoint, lora=lora)
    stop.in_step(6, terminate)
    with pytest.raises(StoppedBySignal):
        fine_tune(tmp_path / "parts", checkpoint, lora=lora)
    path = tmp_path / "parts" / "out" / "checkpoints" / "step-000006"
    metadata = dcp.FileSystemReader(path).read_metadata()
    stored = [name for name in metadata.state_dict_metadata if name.startswith("model.")]
    assert stored
    assert all("lora_" in name for name in stored)
    fine_tune(tmp_path / "parts", checkpoint, lora=lora)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert same_weights(tmp_path / "parts", tmp_path / "whole")


def test_only_the_export_is_left(
    whole: Path, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is trained when saving the model fails."""
    with monkeypatch.context() as patch:
        patch.setattr(SlipstreamTrainer, "save_model", lambda self, path: fail())
        with pytest.raises(OSError, match=r"saved \(RuntimeError: told to\); .*step-000012 has all of the training"):
            fine_tune(tmp_path, checkpoint, "checkpoint.save_steps=100")
    monkeypatch.setattr(SlipstreamTrainer, "training_step", lambda *args: pytest.fail("a step too many"))
    result = fine_tune(tmp_path, checkpoint, "checkpoint.save_steps=100")
    assert result.steps == 12
    assert result.eval_loss_after == curve(whole)[-1]["eval_loss"]
    assert same_weights(tmp_path, whole)


def test_what_cannot_be_continued_is_refused(tmp_path: Path, checkpoint: Path, stop: Stop, whole: Path) -> None:
    stop.in_step(2, terminate)
    with pytest.raises(StoppedBySignal):
        fine_tune(tmp_path, checkpoint)
    folder = tmp_path / "out" / "checkpoints"
    path = folder / "step-000002"

    def refused(*overrides: str) -> str:
        before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
        with pytest.raises(ValueError, match=r"\w") as caught:
            fine_tune(tmp_path, checkpoint, *overrides)
        assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == before
        return str(caught.value)

    message = refused("train.learning_rate=0.02")
    assert (
        f"{path} is of an unfinished run of another recipe (train.learning_rate is 0.01 there and 0.02 here)" in message
    )
    assert "--overwrite" in message
    assert "made with 4 rows a step" in refused("train.per_device_train_batch_size=3")
    assert "is no complete checkpoint" in refused(f"checkpoint.resume_from_checkpoint={whole / 'out'}")

    data = path / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[:-100])
    message = refused()
    assert f"{path}: __0_0.distcp is damaged" in message
    assert "start anew" in message
    data.unlink()
    assert "__0_0.distcp is missing" in refused()
    data.write_bytes(content)
    metadata = path / ".metadata"
    intact = metadata.read_bytes()
    metadata.write_bytes(intact[:50] + b"x" + intact[51:])
    assert ".metadata is damaged" in refused()
    metadata.write_bytes(intact)
    (path / "checkpoint.json").write_text("{")
    assert "checkpoint.json is damaged" in refused()

    # Asked to, a run starts anew, and its checkpoints take the place of the others.
    fine_tune(tmp_path, checkpoint, "checkpoint.resume_from_checkpoint=never", "checkpoint.save_steps=1")
    assert curve(tmp_path) == curve(whole)
    assert {file.name for file in folder.iterdir()} == {"step-000011", "step-000012"}


class Lazy(nn.Module):
    """One parameter that gets no gradient at first, tied weights, and one that is frozen."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first, self.second, self.frozen = nn.Linear(width, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied = self.first
        self.frozen.requires_grad_(False)
        self.register_buffer("count", torch.zeros(2))


def step(model: Lazy, optimizer: torch.optim.Optimizer, both: bool) -> None:
    x = model.first(torch.ones(1, 4))
    (model.second(x) if both else x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_plain_loop(tmp_path: Path) -> None:
    """Without Trainer; state that AdamW makes late is made late after resuming too."""
    model = Lazy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    checkpointer = Checkpointer(tmp_path, save_total_limit=1)
    checkpointer.save(0, model, optimizer, scheduler)
    assert not optimizer.state
    step(model, optimizer, both=False)
    scheduler.step()
    model.count += 1
    checkpointer.save(1, model, optimizer, scheduler, info={"a": 1})
    expected = torch.rand(3)
    for _ in range(3):
        step(model, optimizer, both=True)
    checkpointer.close()
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000001"]

    torch.manual_seed(9)
    other = Lazy()
    frozen = other.frozen.weight.clone()
    resumed_optimizer = torch.optim.AdamW(other.parameters(), lr=0.7)
    resumed_scheduler = torch.optim.lr_scheduler.StepLR(resumed_optimizer, 1, 0.5)
    path = latest(tmp_path)
    assert path is not None
    found = load(path, other, resumed_optimizer, resumed_scheduler)
    assert (found.step, found.info, resumed_optimizer.param_groups[0]["lr"]) == (1, {"a": 1}, 0.05)
    assert other.second.weight not in resumed_optimizer.state
    assert torch.equal(other.frozen.weight, frozen)
    assert other.count.tolist() == [1, 1]
    found.restore_rng()
    assert torch.equal(torch.rand(3), expected)
    for _ in range(3):
        step(other, resumed_optimizer, both=True)
    for name in ("first", "second"):
        assert torch.equal(getattr(other, name).weight, getattr(model, name).weight)


def test_another_model_or_optimizer_is_refused_and_left_alone(tmp_path: Path) -> None:
    model = Lazy()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, both=True)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, model, optimizer)
    checkpointer.close()
    path = tmp_path / "step-000001"
    assert read_info(path)["ranks"] == 1
    for other, message in (
        (nn.Linear(4, 4), "lacks model.bias, model.weight"),
        (Lazy(width=3), r"differs: model.first.weight is \[4, 4\] there and \[4, 3\] here"),
    ):
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        fresh = torch.optim.AdamW(other.parameters())
        with pytest.raises(ValueError, match=f"{path} is of another model or optimizer: it {message}"):
            load(path, other, fresh)
        assert not fresh.state
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    sgd = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    with pytest.raises(ValueError, match=r"it also has optimizer\.state"):
        load(path, model, sgd)
    assert not sgd.state


def test_write_failure_is_told_and_the_last_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Lazy()
    optimizer = torch.optim.AdamW(model.parameters())
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, model, optimizer)
    checkpointer.wait()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", full)
    checkpointer.save(2, model, optimizer)
    with pytest.raises(OSError, match=r"a checkpoint could not be written: rank 0: OSError.*No space left"):
        checkpointer.wait()
    assert latest(tmp_path) == tmp_path / "step-000001"


@pytest.fixture
def interruptible() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_one_ctrl_c_saves_and_another_ends_at_once(
    tmp_path: Path, checkpoint: Path, stop: Stop, monkeypatch: pytest.MonkeyPatch, interruptible: None
) -> None:
    def interrupt() -> None:
        for _ in range(2):  # as torchrun's ranks see one
            signal.raise_signal(signal.SIGINT)

    stop.in_step(3, interrupt)
    with pytest.raises(StoppedBySignal, match="SIGINT after step 3") as caught:
        fine_tune(tmp_path, checkpoint)
    assert caught.value.exit_code == 130
    assert latest(tmp_path / "out" / "checkpoints") == tmp_path / "out" / "checkpoints" / "step-000003"
    monkeypatch.setattr("slipstream.train.resume.ONE_CTRL_C", 0.0)
    stop.in_step(5, interrupt)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(tmp_path, checkpoint)
    assert signal.signal(signal.SIGINT, signal.SIG_IGN) is signal.default_int_handler
    with SaveAndStop(None, timedelta(minutes=1)):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "as in the background of a script"


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_exit_code(number: signal.Signals, tmp_path: Path, checkpoint: Path) -> None:
    """The command itself, told to stop by its scheduler."""
    path = write_recipe(tmp_path, checkpoint, train={"max_steps": 100_000})
    command = [sys.executable, "-c", "from slipstream.cli import main; main()", "finetune", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(number)
            break
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    assert f"stopped by {number.name} after step" in out
    assert latest(tmp_path / "out" / "checkpoints") is not None
