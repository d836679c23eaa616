"""A training step of every architecture on one GPU, plain Transformers' and ours one after another in this process."""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch
from transformers import PretrainedConfig

from slipstream.bench.options import OURS, Job, Options
from slipstream.bench.worker import execute, versions
from slipstream.coverage.checks import Row, time_limit
from slipstream.coverage.compare import Attempt
from slipstream.coverage.shapes import in_words, timed_config
from slipstream.coverage.tiny import tiny_config

RIVAL = "transformers"
LOST = "CUDA error"  # after it nothing runs in this process any more


@dataclass(frozen=True)
class Timed(Options):
    """As for `bench`, of an architecture: `model` is a model type, and `tiny` means the sizes of the checks."""

    steps: int = 5
    warmup: int = 3

    def config(self) -> PretrainedConfig:
        """The model's config."""
        return tiny_config(self.model) if self.tiny else timed_config(self.model, self.seq_len)


def measure_all(
    rows: Iterable[Row],
    options: Callable[[str], Timed],
    *,
    limit_seconds: float | None,
    seconds_per_model: float,
    done: Callable[[Row, float], None],
) -> list[str]:
    """Fill in the `speed` of each row that has none yet with these versions on this GPU.

    Args:
        options: of a model type.
        limit_seconds: after so long no architecture is begun.
        seconds_per_model: after so long a side counts as stopped.
        done: called with each row that was measured, and its seconds.

    Returns:
        The model types that are left.
    """
    rows, begun = list(rows), monotonic()
    for place, row in enumerate(rows):
        timed = options(row.model_type)
        if row.speed.get("of") == _conditions(timed):
            continue
        if limit_seconds is not None and monotonic() - begun > limit_seconds:
            return [row.model_type for row in rows[place:]]
        start = monotonic()
        row.speed = measure(timed, seconds_per_model)
        done(row, monotonic() - start)
        if LOST in row.speed.get("error", ""):
            return [row.model_type for row in rows[place + 1 :]]
    return []


def measure(options: Timed, seconds: float) -> dict[str, Any]:
    """Both sides of one architecture.

    Returns:
        `step` and `memory`, Transformers' over ours and ours over theirs; `milliseconds` and `gib` of either;
        `loss_error`, how far the first losses are apart; `compile_s`, our first step; `imbalance` of the routers;
        `notes`, where a layer did not compile; `shapes`, `device` and `of`, what it was measured with. Or `error`.
    """
    found: dict[str, Any] = {"of": _conditions(options)}
    attempt = Attempt()
    with attempt:
        found["shapes"] = in_words(options.config())
    results: dict[str, dict[str, Any]] = {}
    for contender in (RIVAL, OURS):
        if attempt.error:
            return found | {"error": attempt.error}
        attempt = Attempt()
        with attempt, time_limit(seconds):
            results[contender] = execute(Job(options, contender, "learned"))
        if attempt.error:
            attempt.error = f"{contender}: {attempt.error}"
        _forget()
    if attempt.error:
        return found | {"error": attempt.error}
    theirs, ours = results[RIVAL], results[OURS]
    return found | {
        "step": theirs["back_to_back_ms"] / ours["back_to_back_ms"],
        "memory": ours["peak_gib"] / theirs["peak_gib"] if theirs["peak_gib"] else 1.0,
        "milliseconds": {name: result["back_to_back_ms"] for name, result in results.items()},
        "gib": {name: result["peak_gib"] for name, result in results.items()},
        "loss_error": abs(ours["first_loss"] / theirs["first_loss"] - 1),
        "compile_s": ours["cold_start_s"],
        "device": ours["device_name"],
        "imbalance": ours["imbalance"],
        **({"notes": ours["notes"]} if ours["notes"] else {}),
    }


def _conditions(options: Timed) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    return {"device": device, "tokens": options.tokens, "backend": dict(options.backend), "versions": versions()}


def _forget() -> None:
    """Give back what a side held, its compiled layers with it."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
