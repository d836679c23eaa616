"""Settings that Transformers would refuse late, with rows tokenized and weights loaded."""

import inspect
from typing import Any

import torch
from transformers import SchedulerType, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from slipstream.train.recipe import LogSection, TrainSection

# What a schedule gets from the trainer.
_GIVEN = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}


def check_schedule(train: TrainSection) -> None:
    """Raises: ValueError when the scheduler has not all it needs, or has no such setting, or not that value for it."""
    kind, given = SchedulerType(train.lr_scheduler_type), train.lr_scheduler_kwargs or {}
    schedule: Any = TYPE_TO_SCHEDULER_FUNCTION[kind]
    parameters = inspect.signature(schedule).parameters
    known = {name: value for name, value in parameters.items() if name not in _GIVEN}
    for name in given:
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"train.lr_scheduler_kwargs: {kind.value} has no {name!r}; {takes}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in given:
            raise ValueError(f"train.lr_scheduler_kwargs: {kind.value} needs {name}")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=train.learning_rate or 1e-3)
    try:
        get_scheduler(kind, optimizer, 0, 1000, given)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"train.lr_scheduler_kwargs: {kind.value} refuses {given}: {error}") from error


def check_loggers(log: LogSection) -> None:
    """Raises: ValueError for one that does not exist, or whose package is not installed."""
    for name in log.report_to:
        if name in ("none", "all"):
            continue
        try:
            for logger in get_reporting_integration_callbacks([name]):
                logger()
        except (ValueError, RuntimeError, ImportError) as error:
            raise ValueError(f"log.report_to: {name}: {error}") from error
