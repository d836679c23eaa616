"""What the host learns late, so that it never waits for the device while it could give it more to do."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slipstream import hf_trainer
from slipstream.checkpoint.training_state import rng_state, set_rng_state


class Later:
    """Numbers on their way from the device to the host, behind everything that the device was given before.

    Attributes:
        known: when they are there: an event on the device, or without one the time (`time.perf_counter`).
    """

    def __init__(self, values: Tensor) -> None:
        """`values` may not be written to afterwards."""
        self._values = values
        self.known: torch.cuda.Event | float = time.perf_counter()
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self.known = _event(values.device)

    def read(self) -> list[Any]:
        """The numbers; waits for them."""
        if isinstance(self.known, torch.cuda.Event):
            self.known.synchronize()
        return self._values.tolist()


class Clock:
    """When the device came to what the host learns later, by the host's clock (`time.perf_counter`)."""

    def __init__(self, device: torch.device) -> None:
        """Starts now; the device should have nothing to do."""
        self._at = time.perf_counter()
        self._event = _event(device) if device.type == "cuda" else None

    def time_of(self, numbers: Later) -> float:
        """When the device had them ready; they have been read."""
        if not isinstance(numbers.known, torch.cuda.Event):
            return numbers.known
        assert self._event is not None
        self._at += self._event.elapsed_time(numbers.known) / 1e3
        self._event = numbers.known
        return self._at


def _event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


class Snapshot:
    """Where a trainer stands before a step: all that moves on beside weights, optimizer states and gradients."""

    def __init__(self, trainer: Any) -> None:
        state = trainer.state
        self.running_loss = hf_trainer.running_loss(trainer).clone()
        self._new_tokens = trainer._new_tokens.clone()
        self._rng = rng_state()
        self._progress = state.global_step, state.epoch, state.total_flos, trainer.current_flos
        self._logged_step = hf_trainer.logged_step(trainer)
        self._scheduler = trainer.lr_scheduler.state_dict()
        self._rates = [group["lr"] for group in trainer.optimizer.param_groups]

    def restore(self, trainer: Any) -> None:
        """Put it back; what was logged since has to be forgotten, and weights and states not to have changed."""
        state = trainer.state
        hf_trainer.running_loss(trainer).copy_(self.running_loss)
        trainer._new_tokens.copy_(self._new_tokens)
        set_rng_state(self._rng)
        state.global_step, state.epoch, state.total_flos, trainer.current_flos = self._progress
        hf_trainer.set_logged_step(trainer, self._logged_step)
        trainer.lr_scheduler.load_state_dict(self._scheduler)
        for group, rate in zip(trainer.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate


@dataclass(frozen=True)
class LateVerdict:
    """A step whose update is under way, if its loss and the norm of its gradients allow it."""

    step: int
    numbers: Later  # both, of all ranks
    learning_rate: float
    before: Snapshot


@dataclass(frozen=True)
class LateLog:
    """A log of training.

    `numbers` are three of each rank (loss since the last log, tokens, GiB), the norm of the gradient, and a row for
    each of `measured`, one number a layer.
    """

    step: int
    epoch: float
    steps: int  # since the last log
    learning_rate: float
    start_time: float | None
    ranks: int
    measured: list[str]
    numbers: Later
