"""JSONL to token ids and labels: loss on what the assistant says, and a precise complaint about every bad line.

A row is `{"messages": [{"role": …, "content": …}, …]}`, `{"prompt": …, "completion": …}` or `{"text": …}`; other keys
are ignored. Labels equal the ids where the model is trained and IGNORE elsewhere (the model itself shifts by one).
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Sequence, Value
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from slipstream.train.recipe import DataSection

IGNORE = -100
ROLES = ("system", "user", "assistant")
FEATURES = Features({"input_ids": Sequence(Value("int32")), "labels": Sequence(Value("int32"))})
Span = tuple[int, int]


class UnstableTemplateError(ValueError):
    """A conversation's beginning is rendered differently once later turns follow, so turns cannot be told apart."""


@dataclass
class Counts:
    """What became of the rows: how many were kept, cut, left out, and how many of their tokens are trained on."""

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    masked_rows: int = 0


@dataclass
class TokenizedData:
    """`train` and `eval` hold `input_ids` and `labels`, each a list of at most `max_length` int32 a row.

    `template` is the chat template rows were rendered with; `notes` says what a user should know of how they were read.
    """

    train: Dataset
    eval: Dataset | None
    counts: Counts
    template: str | None
    notes: list[str] = field(default_factory=list)


def load_data(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, max_length: int, vocab_size: int
) -> TokenizedData:
    """Read, check and tokenize the recipe's data. The same section gives the same rows in the same order.

    Args:
        section: the recipe's `data`.
        tokenizer: a fast one; its chat template renders `messages`.
        max_length: tokens kept of a row; the rest is cut from its end and counted.
        vocab_size: rows of the model's embedding.

    Raises: ValueError naming file and line for a malformed line; ValueError for a missing file, data without a single
        trained token, a tokenizer without a chat template that needs one, or whose ids the model does not have.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters a token covers, so the assistant's tokens "
            "cannot be told apart; use a model with a tokenizer.json"
        )
    train_files, eval_files = jsonl_files(section.train), jsonl_files(section.eval or [])
    template, notes = _default_template(tokenizer), []
    try:
        train, counts = _tokenize(train_files, tokenizer, template, max_length, vocab_size)
        held_out, _ = _tokenize(eval_files, tokenizer, template, max_length, vocab_size)
    except UnstableTemplateError as error:
        # TRL carries variants of the well-known templates (Qwen3 …) that keep earlier turns as they were.
        try:
            template = get_training_chat_template(tokenizer)
        except ValueError:
            raise error from None
        notes.append("the chat template changes earlier turns when later ones follow; rendering with TRL's variant")
        train, counts = _tokenize(train_files, tokenizer, template, max_length, vocab_size)
        held_out, _ = _tokenize(eval_files, tokenizer, template, max_length, vocab_size)
    if section.eval is not None:
        return TokenizedData(train, held_out, counts, template, notes)
    if section.eval_fraction == 0:
        return TokenizedData(train, None, counts, template, notes)
    if len(train) < 2:
        raise ValueError(
            f"{section.train[0]}: {len(train)} row to train on leaves none to hold out; add rows, name a file as "
            "data.eval, or set data.eval_fraction: 0"
        )
    held = min(max(1, round(len(train) * section.eval_fraction)), len(train) - 1)
    parts = train.train_test_split(test_size=held, seed=section.seed)
    return TokenizedData(parts["train"], parts["test"], counts, template, notes)


def jsonl_files(paths: Iterable[str]) -> list[Path]:
    """The files that `paths` (JSONL files, or folders of them) stand for, a folder's in alphabetical order.

    Raises: ValueError when a path does not exist or a folder holds no `*.jsonl`.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path}: no *.jsonl file in this folder")
        if not found[0].is_file():
            raise ValueError(f"{path}: no such data file")
        files += found
    return files


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`file:line`, row) for each line that is not blank; ValueError on the first malformed one."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            place = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig").strip()
                if not line:
                    continue
                row = json.loads(line)
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: not UTF-8 text ({error.reason})") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not valid JSON: {error.msg} (column {error.colno})") from error
            mistake = _find_mistake(row)
            if mistake:
                raise ValueError(f"{place}: {mistake}")
            yield place, row


def _find_mistake(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"a line must be one JSON object, not {_kind(row)}"
    if "messages" in row:
        return _find_message_mistake(row["messages"])
    keys = ("text",) if "text" in row else ("prompt", "completion")
    if not any(key in row for key in keys):
        return f"needs 'messages', 'prompt' and 'completion', or 'text'; has {', '.join(map(repr, row)) or 'nothing'}"
    for key in keys:
        if key not in row:
            return f"{key!r} is missing beside {next(k for k in keys if k in row)!r}"
        if not isinstance(row[key], str):
            return f"{key!r} must be a string, not {_kind(row[key])}"
        if not row[key]:
            return f"{key!r} is empty"
    return None


def _find_message_mistake(messages: Any) -> str | None:
    if not isinstance(messages, list):
        return f"'messages' must be a list, not {_kind(messages)}"
    if not messages:
        return "'messages' is empty"
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            return f"{where} must be an object with 'role' and 'content', not {_kind(message)}"
        for key in ("role", "content"):
            if key not in message:
                return f"{where}: {key!r} is missing"
            if not isinstance(message[key], str):
                return f"{where}: {key!r} must be a string, not {_kind(message[key])}"
        if message["role"] not in ROLES:
            return f"{where}: role {message['role']!r} is not one of {', '.join(ROLES)}"
        if not message["content"] and message["role"] != "system":
            return f"{where}: 'content' is empty"
    return None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _default_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    return template["default"] if isinstance(template, dict) else template


def _tokenize(
    files: list[Path], tokenizer: PreTrainedTokenizerBase, template: str | None, max_length: int, vocab_size: int
) -> tuple[Dataset, Counts]:
    counts = Counts()
    columns: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": []}
    for file in files:
        for place, row in read_rows(file):
            try:
                ids, trained = encode(row, tokenizer, template)
            except UnstableTemplateError as error:
                raise UnstableTemplateError(f"{place}: {error}") from error
            except (ValueError, TemplateError) as error:
                raise ValueError(f"{place}: {error}") from error
            if ids.max(initial=0) >= vocab_size:
                raise ValueError(
                    f"{place}: token {tokenizer.convert_ids_to_tokens(int(ids.max()))!r} has id {ids.max()}, but the "
                    f"model's vocabulary has {vocab_size}; use the tokenizer that belongs to the model"
                )
            counts.cut_rows += len(ids) > max_length
            counts.cut_tokens += max(0, len(ids) - max_length)
            ids, trained = ids[:max_length], trained[:max_length]
            if not trained[1:].any():  # nothing predicts the first token
                counts.masked_rows += 1
                continue
            counts.rows += 1
            counts.tokens += len(ids)
            counts.trained_tokens += int(trained[1:].sum())
            columns["input_ids"].append(ids)
            columns["labels"].append(np.where(trained, ids, IGNORE))
    if files and not counts.rows:
        raise ValueError(_explain_no_labels(files, counts, max_length))
    return Dataset.from_dict(columns, features=FEATURES), counts


def _explain_no_labels(files: list[Path], counts: Counts, max_length: int) -> str:
    name = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    if not counts.masked_rows:
        return f"{name}: no rows; each line must be one JSON object"
    reason = f"{name}: none of the {counts.masked_rows} rows has a token to train on (every label is masked): "
    if counts.cut_rows:
        return reason + (
            f"max_length={max_length} cuts {counts.cut_rows} of them before the assistant speaks; raise data.max_length"
        )
    return reason + "no message has the role 'assistant', and only those are trained; add answers, or use 'text' rows"


def encode(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, template: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids `[T]` int64 and which of them are trained on `[T]` bool.

    `messages`: the assistant's turns, from where the generation prompt ends to the end of the turn, so that the model
    learns to stop. `prompt`/`completion`: the completion and an end-of-sequence token. `text`: everything, likewise.

    Raises: ValueError when `messages` come without a chat template; UnstableTemplateError when turns cannot be told
        apart; jinja2.TemplateError when the template refuses the conversation.
    """
    if "messages" in row:
        if template is None:
            raise ValueError(
                "'messages' need a chat template and the tokenizer has none; name one as data.chat_template"
            )
        if has_generation_markers(template):
            encoded: Any = tokenizer.apply_chat_template(
                row["messages"], chat_template=template, return_dict=True, return_assistant_tokens_mask=True
            )
            return np.array(encoded["input_ids"]), np.array(encoded["assistant_masks"], dtype=bool)
        text, spans = assistant_spans(row["messages"], tokenizer, template)
        return _encode_spans(text, spans, tokenizer, special_tokens=False)
    prompt, answer = ("", row["text"]) if "text" in row else (row["prompt"], row["completion"])
    text = prompt + answer
    ids, trained = _encode_spans(text, [(len(prompt), len(text))], tokenizer, special_tokens=True)
    if tokenizer.eos_token_id is not None and (not ids.size or ids[-1] != tokenizer.eos_token_id):
        ids, trained = np.append(ids, tokenizer.eos_token_id), np.append(trained, True)
    return ids, trained


def assistant_spans(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[str, list[Span]]:
    """The rendered conversation and the characters [start, end) of each assistant turn, found by rendering prefixes.

    Needs no `{% generation %}` markers: turn i starts where the turns before it plus the generation prompt end, and
    ends where the turns up to it end.
    """

    def render(turns: list[dict[str, Any]], prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=prompt)
        )

    text = render(messages, False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, upto = render(messages[:index], True), render(messages[: index + 1], False)
        if not (text.startswith(before) and text.startswith(upto)):
            raise UnstableTemplateError(
                f"the chat template renders what leads to messages[{index}] differently once later turns follow, so "
                "the assistant's tokens cannot be told apart; name a template with {% generation %} markers as "
                "data.chat_template, or split the conversation so that each row ends with its only trained answer"
            )
        spans.append((len(before), len(upto)))
    return text, spans


def _encode_spans(
    text: str, spans: list[Span], tokenizer: PreTrainedTokenizerBase, special_tokens: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of `text`, and which tokens lie in one of `spans`: from the first that reaches into it to the last.

    As a range, because some tokenizers give white space no characters, and an end-of-sequence token has none.
    """
    encoded = tokenizer(text, add_special_tokens=special_tokens, return_offsets_mapping=True)
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    trained = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        reach, begin = np.flatnonzero(offsets[:, 1] > start), np.flatnonzero(offsets[:, 0] < end)
        if reach.size:
            trained[reach[0] : begin[-1] + 1] = True
    return np.array(encoded["input_ids"], dtype=np.int64), trained


def trained_segments(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """A row of `TokenizedData` as consecutive (text, trained on) pieces, special tokens shown."""
    segments: list[tuple[list[int], bool]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        trained = label != IGNORE
        if not segments or segments[-1][1] != trained:
            segments.append(([], trained))
        segments[-1][0].append(token)
    return [(str(tokenizer.decode(ids)), trained) for ids, trained in segments]
