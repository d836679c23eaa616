"""Checkpoints that a run continues from, written by all ranks in the background.

    checkpoints/
      step-000100/     checkpoint.json: run, step, ranks, what the caller added, every file's size; written last
                       .metadata, *.distcp: torch.distributed.checkpoint
      step-000200.incomplete/
      latest           the name of the newest complete one; gone once the run is over

What else is in the folder stays: a run removes its own checkpoints, and those of an unfinished one that it replaces.

Every tensor is stored by its parameter's name and whole shape, so any number of ranks in any layout can read it.
"""

import json
import os
import re
import shutil
import uuid
import warnings
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from slipstream.checkpoint.output import INCOMPLETE
from slipstream.checkpoint.training_state import (
    Leaf,
    State,
    compare,
    in_any_layout,
    model_state,
    optimizer_template,
    put_back,
    rng_state,
    set_rng_state,
    training_state,
)
from slipstream.parallel.setup import failing_together, rank_and_ranks

FORMAT = 1
INFO_FILE, LATEST = "checkpoint.json", "latest"
_UNFINISHED = re.compile(rf"step-\d+(\.replaced)?{re.escape(INCOMPLETE)}")

# One process needs no process group.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint made after `step` optimizer steps."""
    return f"step-{step:06d}"


class Checkpointer:
    """Writes checkpoints below `folder` while training goes on. Make and use it on all ranks.

    Args:
        folder: on a file system that all ranks share.
        save_total_limit: complete checkpoints to keep, the newest; None keeps all.
        timeout: how long a rank waits for the others while one is written; None for PyTorch's default.
        continues: the checkpoint that training goes on from. Where it is of the unfinished run in `folder`, this is the
            same run, and all of that one's checkpoints are its own.

    Attributes:
        saved_step: of the last checkpoint that was started.
    """

    def __init__(
        self,
        folder: Path,
        save_total_limit: int | None = None,
        timeout: timedelta | None = None,
        continues: Path | None = None,
    ) -> None:
        self.folder, self.save_total_limit = folder, save_total_limit
        self.rank, self.ranks = rank_and_ranks()
        # A group of its own: its collectives run in a thread, beside those of training.
        self._group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self.saved_step: int | None = None
        unfinished = latest(folder)
        earlier = None if unfinished is None else _run_of(unfinished)
        same = continues is not None and _run_of(continues) == earlier
        self._run = earlier if same and earlier is not None else uuid.uuid4().hex
        self._replaceable = {self._run, earlier} - {None}
        if self.rank == 0:
            for left in folder.glob(f"*{INCOMPLETE}"):
                if _UNFINISHED.fullmatch(left.name):
                    shutil.rmtree(left)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | None = None,
        *,
        info: Mapping[str, Any] | None = None,
        rank_info: Mapping[str, Any] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Start a checkpoint; when this returns, all tensors are copied and training may change them.

        Only what trains is stored: frozen weights come from where the model was loaded.

        Args:
            step: optimizer steps done.
            info: JSON data, the same on all ranks.
            rank_info: JSON data of this rank.
            files: name to text, written beside the tensors.

        Raises: OSError when the checkpoint before this one could not be written.
        """
        self.wait()
        state = training_state(model, optimizer, scheduler)
        state["rank"] = {str(self.rank): Leaf((rng_state(), dict(rank_info or {})))}
        incomplete = self.folder / (checkpoint_name(step) + INCOMPLETE)
        record = {"format": FORMAT, "run": self._run, "step": step, "ranks": self.ranks, "info": dict(info or {})}
        self.saved_step = step
        self._pending = self._thread.submit(self._write_all, incomplete, state, record, dict(files or {}))

    def wait(self) -> None:
        """Until the checkpoint under way is complete.

        Raises: OSError when it could not be written; the one before is still `latest`.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except CheckpointException as error:
            raise OSError(f"{self.folder}: a checkpoint could not be written: {_first(error)}") from error

    def close(self) -> None:
        """Wait on all ranks, and give back the thread. Raises as `wait`."""
        self.wait()
        if self._group is not None:
            dist.barrier(self._group)
        self._thread.shutdown()

    def finish(self, keep: bool) -> None:
        """Say that the run is over: nothing continues it by itself any more. Without `keep` its checkpoints go, and
        those of an unfinished one that it replaced.

        Those of finished runs stay, and what is not ours.
        """
        if self.rank != 0:
            return
        if _pointed_to(self.folder) is not None:
            (self.folder / LATEST).unlink()
        if not keep:
            for path in _complete(self.folder):
                if _run_of(path) in self._replaceable:
                    shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):  # where something is left
                self.folder.rmdir()

    def _write_all(
        self, incomplete: Path, state: dict[str, Any], record: dict[str, Any], files: dict[str, str]
    ) -> None:
        """In the background."""
        dcp.save(state, storage_writer=dcp.FileSystemWriter(incomplete), process_group=self._group)
        if self.rank != 0:
            return
        # Rank 0 comes here when all ranks' files are written.
        for name, text in files.items():
            _write(incomplete / name, text)
        sizes = {path.name: path.stat().st_size for path in sorted(incomplete.iterdir())}
        record |= {"files": sizes, "metadata_crc32": zlib.crc32((incomplete / ".metadata").read_bytes())}
        _write(incomplete / INFO_FILE, json.dumps(record, indent=2))
        complete = self.folder / checkpoint_name(record["step"])
        if complete.exists():
            # Of a run that went back to an earlier step.
            replaced = complete.with_name(f"{complete.name}.replaced{INCOMPLETE}")
            complete.rename(replaced)
        incomplete.rename(complete)
        _write(self.folder / LATEST, complete.name)
        known = [path for path in _complete(self.folder) if _run_of(path) in self._replaceable]
        earlier = known[: known.index(complete) + 1]  # later ones are of a run that went back
        for path in {*known} - {*earlier[-(self.save_total_limit or len(known)) :]}:
            shutil.rmtree(path)
        shutil.rmtree(complete.with_name(f"{complete.name}.replaced{INCOMPLETE}"), ignore_errors=True)


@dataclass(frozen=True)
class Resumed:
    """What `load` found besides tensors.

    Attributes:
        step: optimizer steps done.
        info: what `save` was given.
        rank_infos: each rank's, in their order; this rank's alone where the number of ranks is the same.
        same_ranks: whether as many ranks load as saved.
    """

    step: int
    info: dict[str, Any]
    rank_infos: list[dict[str, Any]]
    same_ranks: bool
    _rng: tuple[Any, ...] | None

    def restore_rng(self) -> None:
        """Set the generators of python, numpy, torch and CUDA as this rank had them; a new rank keeps its own."""
        if self._rng is not None:
            set_rng_state(self._rng)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder` of a run that is not over, or None."""
    path = _pointed_to(folder)
    if path is None:
        return None
    if (path / INFO_FILE).is_file():
        return path
    # Between two renames the pointer's target is missing for a moment. What is later is of another run.
    return next((each for each in reversed(_complete(folder)) if each.name < path.name), None)


def read_info(path: Path) -> dict[str, Any]:
    """`step`, `ranks` and `info` of a checkpoint, once all its files have been found whole.

    Raises: ValueError when `path` holds no complete checkpoint of this format.
    """
    fix = "name a folder like checkpoints/step-000100, or start anew"
    if not (path / INFO_FILE).is_file():
        raise ValueError(f"{path} is no complete checkpoint of Slipstream ({INFO_FILE} is missing); {fix}")
    try:
        record = json.loads((path / INFO_FILE).read_text())
        known = record["format"] == FORMAT
        files, crc32 = dict(record["files"]), record["metadata_crc32"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {INFO_FILE} is damaged; continue from another checkpoint, or start anew") from error
    if not known:
        raise ValueError(f"{path} has format {record['format']}, this version reads {FORMAT}; {fix}")
    for name, size in files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size or (name == ".metadata" and zlib.crc32((path / name).read_bytes()) != crc32):
            what = "is missing" if found is None else f"is damaged ({found} of {size} bytes)"
            raise ValueError(f"{path}: {name} {what}; continue from another checkpoint, or start anew")
    return dict(record)


def load(
    path: Path, model: nn.Module, optimizer: Optimizer | None = None, scheduler: LRScheduler | None = None
) -> Resumed:
    """Put a checkpoint's state into a model, and into a fresh optimizer and its scheduler. Call it on all ranks.

    The layout may be another than at the time of saving. Set the generators with `Resumed.restore_rng` when training
    goes on.

    Raises: ValueError, on all ranks, when the checkpoint is damaged or of another model or optimizer. Where its files
        have their sizes, names and shapes, nothing has been changed then.
    """
    rank, ranks = rank_and_ranks()
    record: dict[str, Any] = {}
    with failing_together():
        record = read_info(path)
    reader = dcp.FileSystemReader(path)
    saved = reader.read_metadata().state_dict_metadata
    state: State = {"model": model_state(model)}
    compare(path, state["model"], saved, "model.")
    same = record["ranks"] == ranks
    state["rank"] = {str(r): None for r in ([rank] if same else range(record["ranks"]))}
    groups: list[State] = []
    try:
        if optimizer is not None:
            entries, groups = optimizer_template(model, optimizer, saved)
            stored = in_any_layout(model, entries)
            compare(path, stored, saved, "optimizer.state.")
            state["optimizer"] = {"state": stored, "param_groups": None}
            if scheduler is not None:
                state["scheduler"] = None
        dcp.load(state, storage_reader=reader)
    except (CheckpointException, ValueError) as failed:
        if optimizer is not None:
            optimizer.state.clear()  # which optimizer_template has filled
        if isinstance(failed, ValueError):
            raise
        raise ValueError(
            f"{path} cannot be loaded into this model ({_first(failed)}); "
            "continue from another checkpoint, or start anew"
        ) from failed
    if optimizer is not None:
        state["optimizer"]["state"] = entries  # the memory that was read into, in the optimizer's own shapes
        put_back(state, groups, optimizer, scheduler)
    of_ranks = {int(r): leaf.value for r, leaf in state["rank"].items()}
    return Resumed(
        step=record["step"],
        info=record["info"],
        rank_infos=[info for _, info in of_ranks.values()],
        same_ranks=same,
        _rng=of_ranks[rank][0] if rank in of_ranks else None,
    )


def _pointed_to(folder: Path) -> Path | None:
    """What `latest` names, where it is ours."""
    pointer = folder / LATEST
    name = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    return folder / name if re.fullmatch(r"step-\d+", name) else None


def _run_of(path: Path) -> str | None:
    """Which run a checkpoint is of, where it says so."""
    try:
        found = json.loads((path / INFO_FILE).read_text()).get("run")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def _complete(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, oldest first."""
    found = [path.parent for path in folder.glob(f"step-*/{INFO_FILE}") if path.parent.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _write(path: Path, text: str) -> None:
    """A file that is whole whenever it can be seen."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _first(error: CheckpointException) -> str:
    """The first rank's error in one line."""
    rank, (cause, _) = min(error.failures.items())
    return f"rank {rank}: {type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"
