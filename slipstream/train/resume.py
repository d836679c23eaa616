"""A run that stops and goes on: when it saves, which signals stop it, and the checkpoint that it continues from."""

import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slipstream.checkpoint.resume import latest, read_info
from slipstream.parallel.setup import DistributedSetup
from slipstream.train.data import Counts
from slipstream.train.recipe import AUTO, Recipe

EXIT_REQUEUE = os.EX_TEMPFAIL  # 75: not finished; the same command again continues
EXIT_INTERRUPTED = 128 + signal.SIGINT  # what shells expect: a loop that requeues must not start it again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ONE_CTRL_C = 1.0  # seconds in which SIGINT counts once: torchrun sends its ranks another one
CHECKPOINTS = "checkpoints"  # below the output folder
# What may change between the parts of a run without changing its curve. Rows are counted, rows a step kept; of what
# shares out a stream `identity` adds the number of workers.
_FREE = {
    "model": {"attn_implementation", "trust_remote_code", "backend", "tokenizer"},
    "data": {"train", "eval", "chat_template", "on_bad_row"},
    "train": {
        "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size", "on_bad_step",
        "max_loss_spike", "activation_checkpointing",
        "dataloader_num_workers",
    },
    "distributed": True,
    "checkpoint": True,
    "eval": True,
    "log": True,
}  # fmt: skip


class StoppedBySignal(Exception):
    """The run was told to stop, and has written a checkpoint to continue from. `exit_code` is the command's."""

    def __init__(self, name: str, step: int, path: Path) -> None:
        self.exit_code = EXIT_INTERRUPTED if name == "SIGINT" else EXIT_REQUEUE
        super().__init__(f"stopped by {name} after step {step}; the same command continues from {path}")


class SaveAndStop(TrainerCallback):
    """Decides at the end of each step, on all ranks alike, whether to save and whether to stop.

    As a context it catches SIGTERM and SIGUSR1, which schedulers send before they take a machine away, and SIGINT. Any
    rank's signal stops all ranks at the same step. A second SIGINT raises KeyboardInterrupt at once.

    A signal in the last step, or later, ends nothing early: the model is about to be saved. A checkpoint is made first,
    as there may be no time for that (`received`).

    Attributes:
        stopped_by: the name of the signal that ended training early, or None.
    """

    def __init__(self, save_steps: int | None, timeout: timedelta) -> None:
        self.save_steps = save_steps
        self.stopped_by: str | None = None
        self._received = 0
        self._interrupted: float | None = None
        self._group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "SaveAndStop":
        if threading.current_thread() is threading.main_thread():
            ignored = {signal.SIGINT} if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else set()  # a shell's `&`
            self._previous = {number: signal.signal(number, self._receive) for number in {*SIGNALS} - ignored}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
            if int(os.environ.get("RANK", "0")) == 0:  # not by print, which may be what was interrupted
                os.write(2, b"\nCtrl-C: stopping after this step, with a checkpoint; once more ends at once\n")
        elif now - self._interrupted > ONE_CTRL_C:
            raise KeyboardInterrupt

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps
        if self.save_steps and (last or state.global_step % self.save_steps == 0):
            control.should_save = True
        received = self.received()
        if received is not None:
            control.should_save = True
            if not last:
                self.stopped_by = received
                control.should_training_stop = True

    def received(self) -> str | None:
        """The name of a signal that any rank has had so far. Call it on all ranks."""
        number = torch.tensor(self._received)
        if self._group is not None:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
        return signal.Signals(int(number)).name if number else None


def collective_timeout(recipe: Recipe, args: TrainingArguments) -> timedelta:
    """How long a rank waits for the others: what the recipe says, or what Transformers would take."""
    minutes = DistributedSetup.of(recipe.distributed).timeout_minutes
    return timedelta(seconds=args.ddp_timeout) if minutes is None else timedelta(minutes=minutes)


def identity(recipe: Recipe, counts: Counts) -> dict[str, Any]:
    """What makes two runs the same: the settings that shape the loss curve, and the sizes and weights of the data."""
    sections = recipe.model_dump(mode="json", exclude=_FREE)  # type: ignore[arg-type]
    values = {f"{name}.{key}": value for name, section in sections.items() for key, value in (section or {}).items()}
    values |= {"data.rows": counts.rows, "data.tokens": counts.tokens}
    if recipe.data.train[0].weight is not None:  # then all have one
        values["data.train"] = [
            f"{rows} rows of weight {source.weight:g}"
            for source, rows in zip(recipe.data.train, counts.source_rows, strict=True)
        ]
    if recipe.data.streaming:
        # Each reads files of its own.
        values["train.dataloader_num_workers"] = max(1, recipe.train.dataloader_num_workers)
    return values


def find_checkpoint(recipe: Recipe, counts: Counts, overwrite: bool) -> Path | None:
    """The checkpoint that a resolved recipe's run continues from, or None where it starts anew.

    Args:
        recipe: its `checkpoint.resume_from_checkpoint` decides.
        counts: of the data.
        overwrite: leave an unfinished run of another recipe behind.

    Raises: ValueError when the checkpoint is damaged or was made by a run of another recipe.
    """
    output, choice = Path(recipe.train.output_dir), recipe.checkpoint.resume_from_checkpoint
    path = {"never": None, "latest": latest(output / CHECKPOINTS)}.get(choice, Path(choice))
    if path is None:
        return None
    ours, theirs = identity(recipe, counts), read_info(path)["info"].get("identity", {})
    differ = [f"{key} is {theirs.get(key)} there and {ours.get(key)} here"
              for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]  # fmt: skip
    if not differ:
        return path
    if choice == "latest" and overwrite:
        return None
    raise ValueError(
        f"checkpoint.resume_from_checkpoint: {path} is of an unfinished run of another recipe ({'; '.join(differ)}); "
        "use that recipe, another train.output_dir, or --overwrite to start anew"
    )


def agree(path: Path | None) -> None:
    """Raise ValueError on all ranks unless all would continue from `path`."""
    if dist.is_initialized():
        paths: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(paths, str(path))
        if len(set(paths)) > 1:
            raise ValueError(
                f"the ranks see different checkpoints ({', '.join(sorted(set(paths)))}): "
                "put train.output_dir on a file system that all nodes share"
            )


def rows_per_step(recipe: Recipe, args: TrainingArguments) -> int:
    """Rows of all ranks in one optimizer step."""
    streams = args.world_size // DistributedSetup.of(recipe.distributed).tp_size
    return int(args.train_batch_size * args.gradient_accumulation_steps * streams)


def keep_rows_per_step(path: Path, recipe: Recipe, args: TrainingArguments) -> str | None:
    """Accumulate so many micro-batches that a step has as many rows as before; what was changed, if anything.

    Raises: ValueError when no whole number does, or when the rows would be others.
    """
    info = read_info(path)["info"]
    wanted, given = info["rows_per_step"], rows_per_step(recipe, args)
    one = given // args.gradient_accumulation_steps
    if recipe.data.streaming and recipe.train.dataloader_num_workers > 1:
        found = info["micro_batch"] if recipe.train.per_device_train_batch_size == AUTO else 1
        if one * found != info["rows_at_once"]:
            raise ValueError(
                f"{path}: the workers take turns by micro-batches, which had {info['rows_at_once']} rows on all ranks "
                f"and would have {one * found}: set train.per_device_train_batch_size so that they have as many"
            )
    if wanted == given:
        return None
    if wanted % one:
        raise ValueError(
            f"{path} was made with {wanted} rows a step, and this job has {one} a micro-batch on all its ranks: set "
            f"train.per_device_train_batch_size so that {wanted} is a multiple, or use another number of ranks"
        )
    before, args.gradient_accumulation_steps = args.gradient_accumulation_steps, wanted // one
    return f"gradient_accumulation_steps is {wanted // one} instead of {before}, so that a step keeps its {wanted} rows"


def restart_note() -> str | None:
    """What to tell whoever asked torchrun for restarts without the setting that makes them safe, or None."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return (
            "after a restart by torchrun, ranks may look for each other at their old addresses and wait for ever "
            "(pytorch#135712); start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
        )
    return None
