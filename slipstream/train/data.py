"""The recipe's data: rows of any form to token ids and labels, checked, counted, held out, mixed and packed.

Labels equal the ids where the model is trained and IGNORE elsewhere (the model itself shifts by one).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Sequence, Value, concatenate_datasets, interleave_datasets
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

from slipstream.train.formats import IGNORE
from slipstream.train.masking import Tokens, UnstableTemplateError, encode_rows
from slipstream.train.packing import pack
from slipstream.train.recipe import DataSection, Source
from slipstream.train.sources import BadRows, Placed, find_files, read_files, read_rows

FEATURES = Features({"input_ids": Sequence(Value("int32")), "labels": Sequence(Value("int32"))})
AT_ONCE = 1000  # rows that are tokenized together
PROBED = 1000  # rows of a stream that are looked at before training
SHUFFLED = 10_000  # rows of a stream that are shuffled among themselves


@dataclass
class Counts:
    """What became of the rows: how many were kept, cut, left out, and how many of their tokens are trained on.

    `rows` are documents; a row that is split counts as its parts. `source_rows` are those of each source. Of a stream,
    the first `PROBED` rows of each source are counted.
    """

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    split_rows: int = 0
    dropped_rows: int = 0
    masked_rows: int = 0
    bad_rows: int = 0
    packed_rows: int = 0
    source_rows: list[int] = field(default_factory=list)


@dataclass
class TokenizedData:
    """`train` and `eval` hold `input_ids` and `labels`, each a list of at most `max_length` int32 a row.

    Packed, `train` has `seq_lengths` too: the lengths of the documents of each row. `bad_rows` are (place, reason) of
    the first that were left out; `template` is the chat template rows were rendered with; `notes` says what a user
    should know of how they were read.
    """

    train: Dataset | IterableDataset
    eval: Dataset | None
    counts: Counts
    template: str | None
    notes: list[str] = field(default_factory=list)
    bad_rows: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Tokenizing:
    """How rows become tokens: everything that does not depend on the file they are in."""

    section: DataSection
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    max_length: int
    vocab_size: int

    def rows(self, placed: Iterable[Placed], counts: Counts, bad: BadRows) -> Iterator[Tokens]:
        """The tokens of each document that has any to train on, no longer than `max_length`.

        Raises: ValueError naming file and line for a row that the chat template refuses, unless `bad` skips it, or
            that has a token the model lacks; UnstableTemplateError.
        """
        placed = iter(placed)
        while chunk := list(islice(placed, AT_ONCE)):
            made = encode_rows([row for _, row in chunk], self.tokenizer, self.template)
            for (place, _), tokens in zip(chunk, made, strict=True):
                if isinstance(tokens, UnstableTemplateError):
                    raise UnstableTemplateError(f"{place}: {tokens}") from tokens
                if isinstance(tokens, ValueError):
                    bad.add(place, str(tokens))
                    continue
                self._check_ids(place, tokens.ids)
                yield from self._fitted(tokens, counts)

    def _check_ids(self, place: str, ids: np.ndarray) -> None:
        if (largest := int(ids.max(initial=0))) >= self.vocab_size:
            raise ValueError(
                f"{place}: token {largest} ({self.tokenizer.convert_ids_to_tokens(largest)!r}), but the model's "
                f"vocabulary has {self.vocab_size}; use the tokenizer that belongs to the model"
            )

    def _fitted(self, tokens: Tokens, counts: Counts) -> Iterator[Tokens]:
        """The row, cut, split or dropped when it is too long."""
        starts: Iterable[int] = (0,)
        if (excess := len(tokens.ids) - self.max_length) > 0:
            if self.section.excess_length == "drop":
                counts.dropped_rows += 1
                return
            if self.section.excess_length == "split":
                counts.split_rows += 1
                starts = range(0, len(tokens.ids), self.max_length)
            else:
                counts.cut_rows += 1
                counts.cut_tokens += excess
        for start in starts:
            part = Tokens(*(values[start : start + self.max_length] for values in tokens))
            if not part.trained[1:].any():  # nothing predicts the first token
                counts.masked_rows += 1
                continue
            counts.rows += 1
            counts.tokens += len(part.ids)
            counts.trained_tokens += int(part.trained[1:].sum())
            yield part


def load_data(
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    vocab_size: int,
    limit: int | None = None,
) -> TokenizedData:
    """Read, check and tokenize the recipe's data. The same section gives the same rows in the same order.

    Args:
        section: the recipe's `data`.
        tokenizer: a fast one; its chat template renders `messages`.
        max_length: tokens of a row; `section.excess_length` says what becomes of more.
        vocab_size: rows of the model's embedding.
        limit: read this many rows of each source.

    Raises: ValueError naming file and line for a malformed row, unless `section.on_bad_row` skips them; ValueError for
        a missing file, data without a single trained token, a tokenizer without a chat template that needs one, or
        whose ids the model does not have.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters a token covers, so the assistant's tokens "
            "cannot be told apart; use a model with a tokenizer.json"
        )
    notes: list[str] = []
    bad = BadRows(section.on_bad_row == "skip")
    how = Tokenizing(section, tokenizer, _default_template(tokenizer), max_length, vocab_size)
    if section.streaming and limit is None:
        limit = PROBED
    try:
        parts, counts = _tokenize(section.train, how, bad, limit)
        held_out, _ = _tokenize(section.eval or [], how, bad, limit=None if section.streaming else limit)
    except UnstableTemplateError as error:
        # TRL carries variants of the well-known templates (Qwen3 …) that keep earlier turns as they were.
        try:
            template = get_training_chat_template(tokenizer)
        except ValueError:
            raise error from None
        notes.append("the chat template changes earlier turns when later ones follow; rendering with TRL's variant")
        bad = BadRows(bad.skip)
        how = Tokenizing(section, tokenizer, template, max_length, vocab_size)
        parts, counts = _tokenize(section.train, how, bad, limit)
        held_out, _ = _tokenize(section.eval or [], how, bad, limit=None if section.streaming else limit)
    counts.bad_rows = bad.count
    if bad.count:
        notes += [f"bad row left out: {place}: {reason}" for place, reason in bad.listed[:5]]
        notes.append(f"{bad.count:,} bad rows were left out; data.json lists them")
    evaluation = concatenate_datasets(held_out) if held_out else None
    if section.streaming:
        stream = _stream(how)
        return TokenizedData(stream, evaluation, counts, how.template, notes, bad.listed)
    if section.eval is None and section.eval_fraction > 0:
        parts, evaluation = _hold_out(parts, section)
    train = _mix(parts, section)
    if section.packing:
        train = pack(train.shuffle(seed=section.seed), max_length)
        counts.packed_rows = len(train)
    return TokenizedData(train, evaluation, counts, how.template, notes, bad.listed)


def _default_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    return template["default"] if isinstance(template, dict) else template


def _tokenize(sources: list[Source], how: Tokenizing, bad: BadRows, limit: int | None) -> tuple[list[Dataset], Counts]:
    """The rows of each source, and what became of all of them."""
    counts = Counts()
    made = []
    for source in sources:
        placed = _placed(source, how, bad)
        columns: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": []}
        for tokens in how.rows(islice(placed, limit), counts, bad):
            columns["input_ids"].append(tokens.ids)
            columns["labels"].append(np.where(tokens.trained, tokens.ids, IGNORE))
        made.append(Dataset.from_dict(columns, features=FEATURES))
        counts.source_rows.append(len(made[-1]))
    if sources and not counts.rows:
        raise ValueError(_explain_no_labels(sources, counts, how, bad))
    if any(source.weight is not None for source in sources) and not all(map(len, made)):
        empty = next(source.path for source, part in zip(sources, made, strict=True) if not len(part))
        raise ValueError(f"{empty}: no row with a token to train on, so none can be drawn; leave this source out")
    return made, counts


def _placed(source: Source, how: Tokenizing, bad: BadRows) -> Iterator[Placed]:
    return read_rows(source, how.section, how.template is not None, bad, how.section.streaming)


def _name(sources: list[Source]) -> str:
    return sources[0].path if len(sources) == 1 else f"{sources[0].path} and {len(sources) - 1} more"


def _explain_no_labels(sources: list[Source], counts: Counts, how: Tokenizing, bad: BadRows) -> str:
    name = _name(sources)
    if bad.count and not counts.masked_rows:
        place, reason = bad.listed[0]
        return f"{name}: all {bad.count} rows are bad, the first at {place}: {reason}"
    if counts.dropped_rows and not counts.masked_rows:
        return (
            f"{name}: all {counts.dropped_rows} rows are longer than max_length={how.max_length}; raise data.max_length"
        )
    if not counts.masked_rows:
        return f"{name}: no rows; each line must be one JSON object"
    reason = f"{name}: none of the {counts.masked_rows} rows has a token to train on (every label is masked): "
    if counts.cut_rows:
        return reason + (
            f"max_length={how.max_length} cuts {counts.cut_rows} of them before the assistant speaks; raise "
            "data.max_length"
        )
    return reason + "no message has the role 'assistant', and only those are trained; add answers, or use 'text' rows"


def _hold_out(parts: list[Dataset], section: DataSection) -> tuple[list[Dataset], Dataset]:
    """Split rows off before sources are mixed, so that no row is both trained on and held out."""
    names = [source.path for source in section.train]
    if all(source.weight is None for source in section.train):
        names, parts = [_name(section.train)], [concatenate_datasets(parts)]
    kept, held_out = [], []
    for name, part in zip(names, parts, strict=True):
        if len(part) < 2:
            raise ValueError(
                f"{name}: {len(part)} row to train on leaves none to hold out; add rows, name a file as data.eval, or "
                "set data.eval_fraction: 0"
            )
        held = min(max(1, round(len(part) * section.eval_fraction)), len(part) - 1)
        split = part.train_test_split(test_size=held, seed=section.seed)
        kept.append(split["train"])
        held_out.append(split["test"])
    return kept, concatenate_datasets(held_out)


def _mix(parts: list[Any], section: DataSection) -> Any:
    """One source after another, or drawn by their weights until every row of each was seen."""
    if all(source.weight is None for source in section.train):
        return concatenate_datasets(parts)
    weights = [source.weight or 0.0 for source in section.train]
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(parts, probabilities=shares, seed=section.seed, stopping_strategy="all_exhausted")


def _stream(how: Tokenizing) -> IterableDataset:
    """Rows that are read and tokenized when they are asked for, shuffled within a window; packed, they come packed.

    Endless, because a trainer that continues knows how many batches it took, but not of which pass over the rows.
    """

    def generate(parts: list[Path | Source]) -> Iterator[dict[str, Any]]:
        bad = BadRows(how.section.on_bad_row == "skip", aloud=True)
        placed = read_files(parts, how.section, how.template is not None, bad, streaming=True)
        for tokens in how.rows(placed, Counts(), bad):
            yield {"input_ids": tokens.ids, "labels": np.where(tokens.trained, tokens.ids, IGNORE)}

    sources = []
    for source in how.section.train:
        files = find_files(source.path)
        # A list is what the workers of a data loader share out.
        kwargs = {"parts": [source] if files is None else files}
        sources.append(IterableDataset.from_generator(generate, features=FEATURES, gen_kwargs=kwargs))
    stream = _mix(sources, how.section).repeat(None).shuffle(seed=how.section.seed, buffer_size=SHUFFLED)
    return pack(stream, how.max_length) if how.section.packing else stream
