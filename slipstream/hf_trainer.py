"""The rest of `hf.py`: touches of private parts of Transformers' `Trainer`.

Checked against Transformers 5.23.0, each with a test in tests/test_hf_trainer.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor


class CheckpointHooks:
    """Where `Trainer` saves and continues, under names of our own; put it before `Trainer` in a class's bases.

    `Trainer` reads `trainer_state.json` in the folder that it continues from by itself. `continue_training` is called
    when its counters are set up, before the first micro-batch.
    """

    def save_checkpoint(self) -> None:
        raise NotImplementedError

    def load_checkpoint(self, path: str) -> None:
        raise NotImplementedError

    def continue_training(self) -> None:
        raise NotImplementedError

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.save_checkpoint()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Called before the optimizer exists; `load_checkpoint` does both."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.load_checkpoint(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.continue_training()


class UpdateHook:
    """A word before each update, under names of our own; put it before `Trainer` in a class's bases."""

    def total_norm(self) -> torch.Tensor | None:
        """The norm of the whole gradient, which is clipped elsewhere; None where `Trainer` is to take it and to clip.

        Called once an optimizer step, when gradients are whole.
        """
        return None

    def before_update(self, grad_norm: torch.Tensor) -> None:
        """Called once an optimizer step, after clipping; `grad_norm` is from before."""
        raise NotImplementedError

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = self.total_norm()
        return super()._clip_grad_norm(model) if norm is None else norm  # type: ignore[misc]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # nothing is clipped
            grad_norm = self.total_norm()
        if grad_norm is None:
            grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        self.before_update(grad_norm)
        return grad_norm


class LogHook:
    """Lets a log of training be read later than it is due; put it before `Trainer` in a class's bases.

    `Trainer` waits for the device at every log. Here `record_log` is called instead, and `settle` before anything needs
    what was logged: an evaluation, a checkpoint, the end.
    """

    def record_log(self, steps: int, grad_norm: torch.Tensor, learning_rate: float, start_time: float | None) -> None:
        """Keep what a log says of the last `steps` steps; `running_loss` is set to 0 afterwards."""
        raise NotImplementedError

    def settle(self) -> bool:
        """Give out what was kept."""
        raise NotImplementedError

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: Any,
        model: Any,
        trial: Any,
        epoch: Any,
        ignore_keys_for_eval: Any,
        start_time: Any,
        learning_rate: float | None = None,
    ) -> None:
        trainer: Any = self
        control, step = trainer.control, trainer.state.global_step
        if control.should_log and step > trainer._globalstep_last_logged:
            control.should_log = False
            rate = trainer._get_learning_rate() if learning_rate is None else learning_rate
            self.record_log(step - trainer._globalstep_last_logged, grad_norm, rate, start_time)
            tr_loss.zero_()
            trainer._globalstep_last_logged = step
        if control.should_evaluate or control.should_save or control.should_training_stop or control.should_epoch_stop:
            self.settle()
        super()._maybe_log_save_evaluate(  # type: ignore[misc]
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate
        )

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: Any) -> Any:
        self.settle()
        return super()._finalize_training(trial, num_train_samples, start_time)  # type: ignore[misc]


def add_to_whole_loss(trainer: Any, loss: float) -> None:
    """Count the loss of a log in the mean over the whole training."""
    trainer._total_loss_scalar += loss


@contextmanager
def staying_in_training(model: torch.nn.Module) -> Iterator[None]:
    """Spare `Trainer` its walk over all modules in every micro-batch, where `model` is in training mode already.

    A wrapper, DDP's or PEFT's, is so from the start, whatever the model inside is.
    """
    inside: Any = getattr(model, "module", model)
    base = inside.get_base_model() if hasattr(inside, "get_base_model") else inside
    if not (model.training and inside.training and base.training):
        yield
        return
    model.__dict__["train"] = lambda: model
    try:
        yield
    finally:
        del model.__dict__["train"]


def running_loss(trainer: Any) -> torch.Tensor:
    """The sum of this rank's losses since `trainer` logged last: the tensor itself, which it adds to in place."""
    loss: torch.Tensor = trainer._tr_loss
    return loss


def set_batch_size(trainer: Any, size: int) -> None:
    """Let `trainer`, before it trains, take `size` rows a micro-batch."""
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = size


def unlogged_loss(trainer: Any) -> dict[str, float]:
    """The sum of this rank's losses since `trainer` logged last, and the step of that log."""
    return {"loss": running_loss(trainer).item(), "logged_step": logged_step(trainer)}


def set_unlogged_loss(trainer: Any, loss: float, logged_step: int) -> None:
    """Put back what `unlogged_loss` returned."""
    running_loss(trainer).fill_(loss)
    set_logged_step(trainer, logged_step)


def logged_step(trainer: Any) -> int:
    """The step of the last log."""
    step: int = trainer._globalstep_last_logged
    return step


def set_logged_step(trainer: Any, step: int) -> None:
    """Put back what `logged_step` returned."""
    trainer._globalstep_last_logged = step
