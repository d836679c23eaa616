"""What a run left in its output folder, read back; every part may be missing."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from slipstream.checkpoint.output import INCOMPLETE

METRICS_FILE, RECIPE_FILE = "metrics.jsonl", "recipe.resolved.yaml"
ENVIRONMENT_FILE, DATA_FILE = "environment.json", "data.json"
_MODEL = ("config.json", "adapter_config.json")

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Records:
    """A run's own records.

    Attributes:
        folder: where they are.
        finished: whether the trained model is there.
        lines: of metrics.jsonl.
        recipe, recipe_text: with every default, as data and as written.
        environment: command, machine and versions.
        data: what became of the rows.
        bad_steps: what was wrong with each step that was not applied, of earlier runs in the same folder too.
    """

    folder: Path
    finished: bool
    lines: list[dict[str, Any]]
    recipe: dict[str, Any]
    recipe_text: str
    environment: dict[str, Any]
    data: dict[str, Any]
    bad_steps: list[dict[str, Any]]

    def points(self, name: str) -> Points:
        """(step, value) of each line that has a finite number under `name`; of several at one step, the last."""
        found = {line["step"]: value for line in self.lines if (value := _number(line.get(name))) is not None}
        return [(float(step), value) for step, value in sorted(found.items())]

    def section(self, name: str) -> dict[str, Any]:
        """A section of the recipe."""
        found = self.recipe.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    @property
    def seconds(self) -> float:
        """How long the run took so far, all its parts together."""
        return max((line["elapsed"] for line in self.lines if _number(line.get("elapsed")) is not None), default=0.0)


def find_records(output: Path) -> Path:
    """The folder below or at `output` that holds the newest run's records.

    A run that replaces a model keeps its records apart until it has finished.

    Raises:
        ValueError: no run has written there.
    """
    for folder in (output / INCOMPLETE, output):
        if (folder / METRICS_FILE).is_file() or (folder / RECIPE_FILE).is_file():
            return folder
    raise ValueError(
        f"{output}: no {METRICS_FILE} there; give the folder that a recipe names as train.output_dir, after "
        "`slipstream finetune` has begun to train"
    )


def read_records(output: Path) -> Records:
    """Everything that the run of an output folder wrote down.

    Raises:
        ValueError: no run has written there.
    """
    folder = find_records(output)
    recipe_text = _text(folder / RECIPE_FILE)
    recipe = _parsed(recipe_text)
    return Records(
        folder=folder,
        finished=folder.name != INCOMPLETE and any((folder / name).is_file() for name in _MODEL),
        lines=_lines(folder / METRICS_FILE),
        recipe=recipe,
        recipe_text=recipe_text,
        environment=_json(folder / ENVIRONMENT_FILE),
        data=_json(folder / DATA_FILE),
        bad_steps=[_json(path) for path in sorted(output.glob("bad-step-*/step.json"))],
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _parsed(text: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}  # changed by hand; it is shown as it is
    return values if isinstance(values, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_text(path) or "{}")
    except json.JSONDecodeError:
        return {}  # cut short
    return values if isinstance(values, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for text in _text(path).splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # the last one, of a run that was killed or that is writing now
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append(line)
    return found


def _number(value: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
