"""Ends training when the held-out loss no longer falls."""

from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EarlyStopping(TrainerCallback):
    """Stops after `patience` evaluations in a row without a new lowest held-out loss.

    Decides from the log alone, which checkpoints carry: a run that was continued stops where it would have. The loss is
    the same on all ranks, so they stop together. (Transformers' `EarlyStoppingCallback` counts in its own state, and
    wants the best model loaded at the end.)

    Args:
        patience: evaluations.
        threshold: a loss has to be lower by more than this to count as new lowest.
        console: says why training ended.

    Attributes:
        first_loss: the held-out loss before training, if known.
    """

    def __init__(self, patience: int, threshold: float, console: Console) -> None:
        self.patience, self.threshold, self.console = patience, threshold, console
        self.first_loss: float | None = None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 0:
            return
        seen = [(entry["step"], entry["eval_loss"]) for entry in state.log_history if "eval_loss" in entry]
        best, best_step, worse = self.first_loss, 0.0, 0
        for step, loss in seen:
            if best is None or loss < best - self.threshold:
                best, best_step, worse = loss, step, 0
            else:
                worse += 1  # nan too
        if worse >= self.patience and state.global_step < state.max_steps:
            control.should_training_stop = True
            self.console.print(
                f"stopping early after step {state.global_step}: the held-out loss was lowest ({best:.4f}) "
                f"after step {best_step:.0f}, {worse} evaluations ago"
            )
