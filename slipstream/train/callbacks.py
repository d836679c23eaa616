"""What a run writes down while it goes: one JSON object a line."""

import json
import os
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Logs = dict[str, Any]
PER_LAYER = "moe"  # how the names of what is logged for each layer begin


class MetricsFile(TrainerCallback):
    """Append every log of the Trainer to a JSONL file, at once, so that it can be followed.

    A disk that is full ends no training: lines wait until they can be written.

    A line holds `step`, `elapsed` (seconds since the callback was made), and what was logged: in training `loss`,
    `learning_rate`, `grad_norm`, `tokens_per_second`, `tokens` (so far, no padding), `memory_gib` and on a known GPU
    `mfu`; in evaluation `eval_loss`; and `samples`. What is logged for each layer as `moe/NAME/LAYER` stands together:
    `"moe": {"layer": ["0", "1"], "load_entropy": [0.98, 0.97], …}`.
    """

    def __init__(self, path: Path, earlier: list[Logs] | None = None) -> None:
        """`earlier` are lines to begin with, of the part of the run before this one; their `elapsed` goes on."""
        self.path = path
        self.start = time.perf_counter() - (earlier[-1]["elapsed"] if earlier else 0.0)
        self._waiting = ""
        path.write_text("".join(json.dumps(line) + "\n" for line in earlier or ()))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Logs | None = None,
        **kwargs: Any,
    ) -> None:
        self.write(state.global_step, by_layer(logs or {}))

    def write(self, step: int, values: Logs) -> None:
        """Append a line of the caller's own."""
        line = {"step": step, "elapsed": round(time.perf_counter() - self.start, 3), **values}
        self._waiting += json.dumps(line) + "\n"
        whole = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write(self._waiting)
            self._waiting = ""
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, whole)
            warnings.warn(f"{self.path} cannot be written to ({error}); what is logged waits", stacklevel=2)


def by_layer(logs: Logs) -> Logs:
    """`logs` with all `moe/NAME/LAYER` as one entry `moe`: the layers, and a list for each name."""
    folded: dict[str, dict[str, float]] = {}
    rest: Logs = {}
    for key, value in logs.items():
        parts = key.split("/")
        if len(parts) == 3 and parts[0] == PER_LAYER:
            folded.setdefault(parts[1], {})[parts[2]] = value
        else:
            rest[key] = value
    if folded:
        layers = list(dict.fromkeys(layer for values in folded.values() for layer in values))
        lists = {name: [values.get(layer) for layer in layers] for name, values in folded.items()}
        rest[PER_LAYER] = {"layer": layers, **lists}
    return rest


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
