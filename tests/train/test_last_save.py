"""When the trained model cannot be saved, or a signal comes at the end, the training is not lost."""

import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM

from slipstream.checkpoint.resume import Checkpointer, latest
from slipstream.train import run as module
from slipstream.train.callbacks import MetricsFile
from slipstream.train.saving import save_trained
from slipstream.train.trainer import SlipstreamTrainer
from tests.distributed.harness import RankFailedError, run_ranks
from tests.train.test_resume import Stop, fine_tune, same_weights, terminate, written

SHORT = {"max_steps": 2}


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Stop:
    return Stop(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    fine_tune(folder, checkpoint, train=SHORT)
    return folder


def goes_on(folder: Path, checkpoint: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command saves the model, without a step more."""
    written(folder / "out" / "checkpoints" / "step-000002")
    monkeypatch.setattr(SlipstreamTrainer, "training_step", lambda *args: pytest.fail("a step too many"))
    fine_tune(folder, checkpoint, train=SHORT)
    assert same_weights(folder, whole)
    assert not (folder / "out" / "checkpoints").exists()


def full(trainer: Any, path: str) -> None:
    Path(path).mkdir()
    (Path(path) / "model.safetensors").write_text("a part")
    raise SafetensorError("No space left on device")


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_checkpoint_in_place_of_the_model(
    lora: dict[str, Any] | None, whole: Path, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"train": SHORT} | ({"lora": lora} if lora else {})
    with monkeypatch.context() as patch:
        patch.setattr(SlipstreamTrainer, "save_model", full)
        with pytest.raises(
            OSError, match=r"could not be saved \(SafetensorError: No space .*step-000002 has all of the training"
        ):
            fine_tune(tmp_path, checkpoint, **changes)
    assert (tmp_path / "out" / "report.html").exists()
    assert not (tmp_path / "out" / ".incomplete" / "model.safetensors").exists()
    if lora is None:
        goes_on(tmp_path, checkpoint, whole, monkeypatch)


def test_nor_a_checkpoint(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SlipstreamTrainer, "save_model", full)
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", no_space)
    with pytest.raises(OSError, match=r"neither could a checkpoint .*No space.*there is no earlier one"):
        fine_tune(tmp_path, checkpoint, train=SHORT)
    assert not [*(tmp_path / "out").rglob("*.incomplete/*"), *(tmp_path / "out").rglob("*.safetensors")]


@pytest.mark.parametrize("when", ["in the last step", "after it"])
def test_a_signal_at_the_end(
    when: str, whole: Path, tmp_path: Path, checkpoint: Path, stop: Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is killed before the model is saved."""
    with monkeypatch.context() as patch:
        original, examine = SlipstreamTrainer.train, module._examine

        def train(trainer: Any, **kwargs: Any) -> Any:
            result = original(trainer, **kwargs)
            if when == "after it":
                terminate()
            patch.setattr(module, "_examine", lambda *args: pytest.fail("killed"))
            return result

        patch.setattr(SlipstreamTrainer, "train", train)
        if when == "in the last step":
            stop.monkeypatch = patch
            stop.in_step(2, terminate)
        with pytest.raises(pytest.fail.Exception, match="killed"):
            fine_tune(tmp_path, checkpoint, train=SHORT)
        assert module._examine is not examine
    goes_on(tmp_path, checkpoint, whole, monkeypatch)


@pytest.mark.parametrize("name", ["save_model", "publish"])
def test_a_signal_while_saving(
    name: str, whole: Path, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner: Any = SlipstreamTrainer if name == "save_model" else module
    original = getattr(owner, name)

    def save(*args: Any) -> None:
        terminate()
        original(*args)

    monkeypatch.setattr(owner, name, save)
    fine_tune(tmp_path, checkpoint, train=SHORT)
    assert same_weights(tmp_path, whole)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_too_small_a_disk_is_told_before_training(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(50_000))
    with pytest.raises(OSError, match=r"train.output_dir .*0.0 GB free there, the model takes .*name another folder"):
        fine_tune(tmp_path, checkpoint, train=SHORT)
    assert not [*(tmp_path / "out").rglob("*")]
    fine_tune(tmp_path, checkpoint, train={"max_steps": 1}, lora={"r": 1, "target_modules": ["q_proj"]})


def test_metrics_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, original = MetricsFile(tmp_path / "metrics.jsonl"), Path.open
    metrics.write(1, {})

    def cut_short(path: Path, mode: str) -> Any:
        with original(path, mode) as file:
            file.write('{"st')
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", cut_short)
        with pytest.warns(UserWarning, match="cannot be written to .*No space"):
            metrics.write(2, {})
    metrics.write(3, {})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [line[: line.index(",")] for line in lines] == [f'{{"step": {step}' for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").unlink()
    metrics.write(4, {})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def _on_one_rank(folder: Path) -> list[str]:
    """What a rank hears when rank 0 alone cannot save."""
    model = nn.Linear(2, 2)
    checkpointer, optimizer = Checkpointer(folder / "checkpoints"), torch.optim.AdamW(model.parameters())

    def save_model(path: str) -> None:
        if dist.get_rank() == 0:
            full(None, path)

    trainer: Any = SimpleNamespace(
        checkpointer=checkpointer,
        state=SimpleNamespace(global_step=3),
        save_model=save_model,
        save_checkpoint=lambda: checkpointer.save(3, model, optimizer),
    )
    with pytest.raises(OSError, match="could not be saved") as caught:
        save_trained(trainer, folder, None)
    checkpointer.close()
    return [str(caught.value), str(latest(folder / "checkpoints"))]


def _out_of_memory_on_one_rank(folder: Path) -> None:
    def save_model(path: str) -> None:
        if dist.get_rank() == 1:
            raise torch.OutOfMemoryError("no memory left on this rank")
        dist.all_reduce(torch.ones(1))

    save_trained(SimpleNamespace(save_model=save_model), folder, None)  # type: ignore[arg-type]


def test_an_error_between_exchanges_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match=r"rank 1 failed:(.|\n)*OutOfMemoryError: no memory left on this rank"):
        run_ranks(_out_of_memory_on_one_rank, 2, tmp_path)


def test_ranks_fail_together(tmp_path: Path) -> None:
    first, second = run_ranks(_on_one_rank, 2, tmp_path)
    assert first == second
    assert "step-000003 has all of the training" in first[0]
    assert first[1] == str(tmp_path / "checkpoints" / "step-000003")
