"""What a run tells while it goes: one JSON object a line in a file, and progress on the screen."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Logs = dict[str, Any]


class MetricsFile(TrainerCallback):
    """Append every log of the Trainer to a JSONL file, at once, so that it can be followed.

    A line holds `step`, `elapsed` (seconds since the callback was made), and what was logged: in training `loss`,
    `learning_rate`, `grad_norm`, `tokens_per_second`, `tokens` (so far, no padding); in evaluation `eval_loss`.
    """

    def __init__(self, path: Path, earlier: list[Logs] | None = None) -> None:
        """`earlier` are lines to begin with, of the part of the run before this one; their `elapsed` goes on."""
        self.path = path
        self.start = time.perf_counter() - (earlier[-1]["elapsed"] if earlier else 0.0)
        path.write_text("".join(json.dumps(line) + "\n" for line in earlier or ()))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Logs | None = None,
        **kwargs: Any,
    ) -> None:
        line = {"step": state.global_step, "elapsed": round(time.perf_counter() - self.start, 3), **(logs or {})}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def metrics_until(path: Path, step: int) -> list[Logs]:
    """The lines that a run wrote to its metrics file up to an optimizer step, without the summary at its end."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # cut short when the run was killed
        if line["step"] <= step and "train_runtime" not in line:
            lines.append(line)
    return lines


class ProgressReport(TrainerCallback):
    """A progress bar on a terminal; elsewhere a plain line for each log, which `grep` and log collectors can read."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.task: TaskID | None = None
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[latest]}"))
        self.bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.task = self.bar.add_task("train", total=state.max_steps, latest="")
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
            self.console.print(f"{place}  held-out loss {logs['eval_loss']:.4f}")
        elif "loss" in logs and self.task is not None:
            latest = (
                f"loss {logs['loss']:.4f}  {logs['tokens_per_second']:,.0f} tokens/s  lr {logs['learning_rate']:.2e}"
            )
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
