"""Where rows come from: files of several kinds, folders of them, and data sets on the Hugging Face hub."""

import csv
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
from pyarrow import parquet

from slipstream.train.formats import RowMap, drop_nulls, read_row
from slipstream.train.recipe import DataSection, Source

Placed = tuple[str, Any]  # where a row stands, `file:line` for instance, and what it holds
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
LISTED = 1000  # bad rows that are kept; the rest is counted


class Unreadable(NamedTuple):
    """In the place of a row that could not be read."""

    reason: str


@dataclass
class BadRows:
    """What becomes of rows that are malformed: the first one ends the run, or all are left out, counted and listed.

    Attributes:
        aloud: say on stderr, on the first rank, which are left out: where nobody reads the list.
    """

    skip: bool = False
    aloud: bool = False
    count: int = 0
    listed: list[tuple[str, str]] = field(default_factory=list)

    def add(self, place: str, reason: str) -> None:
        """Raises: ValueError naming the place, unless bad rows are skipped."""
        if not self.skip:
            raise ValueError(f"{place}: {reason}")
        self.count += 1
        if len(self.listed) < LISTED:
            self.listed.append((place, reason))
            if self.aloud and os.environ.get("RANK", "0") == "0":
                print(f"left out: {place}: {reason}", file=sys.stderr)


def find_files(path: str) -> list[Path] | None:
    """The files that a source's path stands for, a folder's in alphabetical order; None for a name on the hub.

    Raises: ValueError when there is no such file, or nothing to read in the folder.
    """
    given = Path(path)
    if given.is_dir():
        found = sorted(
            file
            for file in given.rglob("*")
            if file.suffix.lower() in READERS
            and not any(part.startswith(".") for part in file.relative_to(given).parts)
        )
        if not found:
            raise ValueError(f"{path}: no data in this folder; files end with {', '.join(READERS)}")
        return found
    if given.is_file():
        if given.suffix.lower() not in READERS:
            raise ValueError(f"{path}: {given.suffix or 'no ending'} is not known; files end with {', '.join(READERS)}")
        return [given]
    if given.suffix.lower() in READERS or not _HUB_NAME.fullmatch(path):
        raise ValueError(f"{path}: no such data file")
    return None


def check_sources(section: DataSection) -> None:
    """Raises: ValueError when a file that the recipe names does not exist, or its templates are not valid."""
    for source in [*section.train, *(section.eval or [])]:
        find_files(source.path)
    if section.chat_template is not None and not Path(section.chat_template).is_file():
        raise ValueError(f"data.chat_template: no such file: {section.chat_template}")
    if section.map is not None:
        RowMap(section.map)


def read_rows(
    source: Source, section: DataSection, chat: bool, bad: BadRows, streaming: bool = False
) -> Iterator[Placed]:
    """(place, row) for each row of a source, in one of the forms of `formats.read_row`.

    Raises: ValueError naming file and line for a malformed row, unless `bad` skips them; for a file that is not what
        its name says; for a data set that cannot be had.
    """
    files = find_files(source.path)
    yield from read_files(files if files is not None else [source], section, chat, bad, streaming)


def read_files(
    parts: Iterable[Path | Source], section: DataSection, chat: bool, bad: BadRows, streaming: bool = False
) -> Iterator[Placed]:
    """As `read_rows`, of some of a source's files, or of a data set on the hub."""
    mapped = RowMap(section.map) if section.map is not None else None
    for part in parts:
        raw = _hub(part, streaming) if isinstance(part, Source) else READERS[part.suffix.lower()](part)
        for place, row in raw:
            if isinstance(row, Unreadable):
                bad.add(place, row.reason)
                continue
            try:
                yield place, read_row(mapped(row) if mapped else row, chat)
            except (ValueError, RecursionError) as error:
                bad.add(place, str(error))


def _jsonl(path: Path) -> Iterator[Placed]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            place = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig").strip()
                if line:
                    yield place, json.loads(line)
            except UnicodeDecodeError as error:
                yield place, Unreadable(f"not UTF-8 text ({error.reason})")
            except json.JSONDecodeError as error:
                yield place, Unreadable(f"not valid JSON: {error.msg} (column {error.colno})")
            except (ValueError, RecursionError) as error:  # a number of too many digits, brackets in too many brackets
                yield place, Unreadable(f"not readable JSON: {error}")


def _json(path: Path) -> Iterator[Placed]:
    """A list of rows, or JSONL under a shorter name."""
    with path.open("rb") as file:
        listed = file.read(1000).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if not listed:
        yield from _jsonl(path)
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    for index, row in enumerate(rows):
        yield f"{path}[{index}]", row


def _csv(path: Path) -> Iterator[Placed]:
    csv.field_size_limit(2**31 - 1)  # else 131,072 characters, less than a document may have
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        line = 1
        try:
            for row in reader:
                place, line = f"{path}:{line + 1}", reader.line_num
                if None in row:
                    yield place, Unreadable(f"more cells than the {len(reader.fieldnames or ())} columns of the header")
                else:
                    yield place, row
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}:{line + 1}: not valid CSV: {error}") from error


def _parquet(path: Path) -> Iterator[Placed]:
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", _of_arrow(row)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a Parquet file, or a damaged one: {error}") from error


def _text(path: Path) -> Iterator[Placed]:
    """A file as one document."""
    try:
        yield str(path), {"text": path.read_text(encoding="utf-8-sig")}
    except UnicodeDecodeError as error:
        yield str(path), Unreadable(f"not UTF-8 text ({error.reason})")


def _hub(source: Source, streaming: bool) -> Iterator[Placed]:
    try:
        rows = datasets.load_dataset(source.path, source.subset, split=source.split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source.path}: no such file or folder here, and not to be had from the hub: {error}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{source.path} ({source.split}): row {number}", _of_arrow(row)


def _of_arrow(row: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that Arrow gives every message and call because others have them; ids have none."""
    if row.get("input_ids") is not None:
        return row
    return {key: drop_nulls(value) for key, value in row.items()}


READERS: dict[str, Callable[[Path], Iterator[Placed]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _text,
}
