"""Progress on the screen: a bar on a terminal, a plain line for each log elsewhere."""

import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slipstream.train.callbacks import Logs


class ProgressReport(TrainerCallback):
    """A progress bar on a terminal; elsewhere a plain line for each log, which `grep` and log collectors can read.

    Both say the loss, the newest held-out loss, tokens/s, MFU (on a GPU whose peak is known), peak memory, the learning
    rate and how long is left, by what the steps of this part of the run took so far, evaluations included.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.task: TaskID | None = None
        self._held_out: float | None = None
        self._started = self._first_step = 0.0
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[latest]}"))
        self.bar = Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started, self._first_step = time.perf_counter(), state.global_step
        self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, latest="")
        self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.task is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Logs | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        place = f"step {state.global_step}/{state.max_steps}" if state.max_steps else f"step {state.global_step}"
        if "eval_loss" in logs:
            self._held_out = logs["eval_loss"]
            self.console.print(f"{place}  held-out loss {self._held_out:.4f}")
        elif "loss" in logs and self.task is not None:
            latest = describe(logs, self._held_out, self._left(state))
            self.bar.update(self.task, latest=latest)
            if not self.console.is_terminal:
                self.console.print(f"{place}  {latest}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar off the screen; a run that fails must not leave it there."""
        self.bar.stop()

    def _left(self, state: TrainerState) -> float:
        """Seconds to the last step."""
        done = state.global_step - self._first_step
        return (time.perf_counter() - self._started) / max(done, 1) * (state.max_steps - state.global_step)


def describe(logs: Logs, held_out: float | None, left: float) -> str:
    """A log of the trainer in one line; `held_out` is the newest held-out loss, `left` seconds to the end."""
    parts = [f"loss {logs['loss']:.4f}"]
    if held_out is not None:
        parts.append(f"held-out {held_out:.4f}")
    parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in logs:
        parts.append(f"MFU {logs['mfu']:.1%}")
    if "memory_gib" in logs:
        parts.append(f"{logs['memory_gib']:.1f} GiB")
    if "moe_load_max_over_mean" in logs:
        parts.append(f"max load {logs['moe_load_max_over_mean']:.1f}x")
    if logs.get("moe_dead_experts"):
        parts.append(f"{logs['moe_dead_experts']:.0f} dead experts")
    parts += [f"lr {logs['learning_rate']:.2e}", f"{timedelta(seconds=round(left))} left"]
    return "  ".join(parts)
