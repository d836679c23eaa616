"""What a run did not write stays where it is, also under names like its own."""

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from slipstream.checkpoint.output import model_files, publish
from slipstream.checkpoint.resume import Checkpointer, checkpoint_name, latest
from tests.train.test_resume import fine_tune

THEIRS = ("tokenizer_training.py", "vocab.py", "adapter_notes.md", "chat_template.py", "pytorch_model_of_mine.bin.md",
          "model.bin", "checkpoints/llama/w.pt", "checkpoints/mine.incomplete/a", "checkpoints/latest")  # fmt: skip


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def saved(folder: Path, *steps: int, continues: Path | None = None, limit: int | None = None) -> Checkpointer:
    model = nn.Linear(2, 2)
    checkpointer = Checkpointer(folder, limit, continues=continues)
    for step in steps:
        checkpointer.save(step, model, torch.optim.AdamW(model.parameters()))
    checkpointer.close()
    return checkpointer


def test_a_run_in_a_folder_with_files(tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "out"
    put(out, *THEIRS)
    for overwrite in (False, True):
        fine_tune(tmp_path, checkpoint, train={"max_steps": 1}, overwrite=overwrite)
        assert {(out / name).read_text() for name in THEIRS} == {"mine"}


def test_checkpoints_that_were_kept(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20).finish(keep=True)
    earlier = kept(tmp_path)
    assert earlier == {checkpoint_name(10), checkpoint_name(20)}
    for steps in ((), (5, 15), (25,)):
        saved(tmp_path, *steps, limit=1).finish(keep=False)
        assert kept(tmp_path) == earlier
    # One that goes back to a checkpoint by its name is another run.
    saved(tmp_path, 15, continues=tmp_path / checkpoint_name(10)).finish(keep=False)
    assert kept(tmp_path) == earlier


def test_a_continued_run_removes_what_it_continued_from(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20).finish(keep=True)
    saved(tmp_path, 5, 6)
    newest = latest(tmp_path)
    assert newest is not None
    saved(tmp_path, 7, continues=newest)
    assert latest(tmp_path) == tmp_path / checkpoint_name(7)
    saved(tmp_path, continues=latest(tmp_path)).finish(keep=False)
    assert kept(tmp_path) == {checkpoint_name(10), checkpoint_name(20)}
    # The limit is for this run's, and for those of an unfinished one that it replaces.
    saved(tmp_path, 5, 6)
    saved(tmp_path, 1, 2, 3, limit=2).finish(keep=True)
    assert kept(tmp_path) == {checkpoint_name(step) for step in (2, 3, 10, 20)}


def test_what_a_replaced_run_left_goes_with_the_end_of_its_successor(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoints", 2)
    saved(tmp_path / "checkpoints").finish(keep=False)
    assert not (tmp_path / "checkpoints").exists()


def test_no_run_continues_from_a_finished_ones_later_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 6).finish(keep=True)
    saved(tmp_path, 2, 4)
    shutil.rmtree(tmp_path / checkpoint_name(4))
    assert latest(tmp_path) == tmp_path / checkpoint_name(2)
    shutil.rmtree(tmp_path / checkpoint_name(2))
    assert latest(tmp_path) is None


def test_an_empty_folder_goes(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoints", 1).finish(keep=False)
    assert not (tmp_path / "checkpoints").exists()


def test_only_a_models_own_files_are_replaced(tmp_path: Path) -> None:
    files = ("config.json", "model-00001-of-00002.safetensors", "part-a.safetensors", "pytorch_model.bin", "vocab.json",
             "tokenizer.model", "adapter_model.safetensors", "generation_config.json")  # fmt: skip
    put(tmp_path, *files, *THEIRS, "vectors.safetensors")
    index = {"weight_map": {"w": "part-a.safetensors", "v": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {path.name for path in model_files(tmp_path)} == {*files, "model.safetensors.index.json"}
    put(tmp_path / ".incomplete", "config.json", "model.safetensors")
    publish(tmp_path)
    theirs = {name.split("/")[0] for name in THEIRS}
    assert kept(tmp_path) == {"config.json", "model.safetensors", "vectors.safetensors", *theirs}


def test_without_a_model_nothing_is_removed(tmp_path: Path) -> None:
    put(tmp_path, "tokenizer.json", "vocab.json", ".incomplete/config.json")
    publish(tmp_path)
    assert kept(tmp_path) == {"tokenizer.json", "vocab.json", "config.json"}
