"""What a recipe's data is like before a model is trained on it: lengths, truncation, packing, duplicates, masks."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from slipstream.train.checks import load_config_and_tokenizer, resolve
from slipstream.train.data import PROBED, Counts, load_data
from slipstream.train.formats import IGNORE
from slipstream.train.packing import LENGTHS, pack
from slipstream.train.recipe import Recipe
from slipstream.train.sources import check_sources

WHOLE = 2**31 - 1  # a max_length that cuts nothing
Kind = Literal["trained", "masked", "special"]


@dataclass(frozen=True)
class Preview:
    """What was found in the rows of `data.train` and `data.eval` that were looked at.

    Attributes:
        rows: documents to train on, uncut: `input_ids` and `labels`.
        lengths: tokens of each, uncut.
        counts: of the rows as training would take them.
        packed_rows, packing: rows of `max_length` that all documents fit into, and how full these are (0 to 1).
        padding: how full batches are without packing, rows drawn at random and padded to the longest (0 to 1).
        duplicates: documents that an earlier one equals.
        leaked: held-out documents that are trained on as well.
        held_out: documents held out.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset
    lengths: np.ndarray
    counts: Counts
    packed_rows: int
    packing: float
    padding: float
    duplicates: int
    leaked: int
    held_out: int
    notes: list[str]
    bad_rows: list[tuple[str, str]]

    @property
    def max_length(self) -> int:
        assert self.recipe.data.max_length is not None
        return self.recipe.data.max_length


def preview(recipe: Recipe, rows: int | None = None) -> Preview:
    """Look at the recipe's data without loading weights.

    Args:
        rows: look at this many rows of each source; None: at all.

    Raises: ValueError as `slipstream.train.run.prepare` does for model and data.
    """
    check_sources(recipe.data)
    config, tokenizer, notes = load_config_and_tokenizer(recipe, stand_in=True)
    recipe = resolve(recipe, config)
    vocab_size, max_length = config.get_text_config().vocab_size, recipe.data.max_length
    assert max_length is not None
    if recipe.data.streaming:
        rows = rows or PROBED
    whole = recipe.data.model_copy(update={"packing": False, "streaming": False, "excess_length": "truncate"})
    uncut = load_data(whole, tokenizer, WHOLE, vocab_size, rows)
    fitted = load_data(whole.model_copy(update={"excess_length": recipe.data.excess_length}), tokenizer, max_length,
                       vocab_size, rows)  # fmt: skip
    assert isinstance(uncut.train, Dataset)
    assert isinstance(fitted.train, Dataset)
    packed = pack(fitted.train, max_length)
    assert isinstance(packed, Dataset)
    tokens = sum(sum(lengths) for lengths in packed[LENGTHS])
    seen = Counter(_keys(uncut.train))
    return Preview(
        recipe=recipe,
        tokenizer=tokenizer,
        rows=uncut.train,
        lengths=np.array([len(ids) for ids in uncut.train["input_ids"]]),
        counts=fitted.counts,
        packed_rows=len(packed),
        packing=tokens / (len(packed) * max_length),
        padding=_padding([len(ids) for ids in fitted.train["input_ids"]], recipe.train.rows_together),
        duplicates=sum(seen.values()) - len(seen),
        leaked=sum(key in seen for key in _keys(uncut.eval)) if uncut.eval is not None else 0,
        held_out=len(uncut.eval) if uncut.eval is not None else 0,
        notes=notes + uncut.notes,
        bad_rows=uncut.bad_rows,
    )


def _keys(rows: Dataset) -> Iterator[bytes]:
    for ids in rows["input_ids"]:
        yield np.asarray(ids, dtype=np.int32).tobytes()


def _padding(lengths: list[int], batch: int) -> float:
    """The share of a padded batch that is not padding, rows drawn at random."""
    order = np.random.default_rng(0).permutation(len(lengths))
    drawn = np.array(lengths)[order]
    padded = sum(len(part) * part.max() for part in (drawn[i : i + batch] for i in range(0, len(drawn), batch)))
    return float(drawn.sum() / padded)


def histogram(lengths: np.ndarray, bins: int = 10) -> list[tuple[int, int, int]]:
    """(shortest, longest, how many) of ranges of lengths that each reach twice as far, or so, as the one before.

    Example: lengths 3, 5, 9 and 2 bins -> [(3, 5, 2), (6, 9, 1)].
    """
    low, high = int(lengths.min()), int(lengths.max())
    edges = np.unique(np.geomspace(low, high + 1, bins + 1).round().astype(int))
    counts, _ = np.histogram(lengths, edges)
    return [(int(a), int(b) - 1, int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]


def token_segments(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[tuple[str, Kind, bool]]:
    """A row as consecutive (text, kind, whether `max_length` cuts it off) pieces; a special token is a piece."""
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}
    runs: list[tuple[list[int], Kind, bool]] = []
    for index, (token, label) in enumerate(zip(row["input_ids"], row["labels"], strict=True)):
        trained = label != IGNORE
        kind: Kind = "special" if token in special and not trained else "trained" if trained else "masked"
        cut = index >= max_length
        if not runs or runs[-1][1:] != (kind, cut):
            runs.append(([], kind, cut))
        runs[-1][0].append(token)
    return [(str(tokenizer.decode(ids)), kind, cut) for ids, kind, cut in runs]
