"""A checkpoint's files, read so that a damaged one is named."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


def open_tensors(path: Path, setting: str) -> Any:
    """A safetensors file, open. Raises: ValueError where it is damaged or cut short. `setting`: what names it."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{setting}: {path} is damaged ({error}); fetch it again") from error


def read_json(path: Path, setting: str) -> dict[str, Any]:
    """A JSON file's object. Raises: ValueError where it holds something else. `setting`: what names it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # a JSONDecodeError or a UnicodeDecodeError
        raise ValueError(f"{setting}: {path} is damaged ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{setting}: {path} is damaged (it holds no JSON object); fetch it again")
    return found


def indexed_files(path: Path, setting: str) -> list[str]:
    """The names of the files that an index lists, in order. Raises as `read_json`."""
    places = read_json(path, setting).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{setting}: {path} is damaged (it has no weight_map); fetch it again")
    return sorted(set(places.values()))
