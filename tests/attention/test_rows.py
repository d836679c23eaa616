"""Documents and padding, found in what a model is called with."""

import pytest
import torch

from slipstream.attention.rows import Segments, rows_of

IDS = torch.zeros(2, 6, dtype=torch.long)


def found(**inputs) -> tuple[list[int], int] | None:
    rows = rows_of({"input_ids": IDS, **inputs})
    assert rows is not None
    assert (rows.batch, rows.length) == (2, 6)
    if rows.segments is None:
        return None
    assert rows.segments.cu_seqlens.dtype == torch.int32
    assert rows.segments.max_length.dtype == torch.int64
    return rows.segments.cu_seqlens.tolist(), int(rows.segments.max_length)


def test_plain_rows() -> None:
    assert found() is None
    assert found(position_ids=torch.arange(6)[None]) is None
    assert found(position_ids=torch.arange(3, 9).expand(2, 6)) is None
    assert found(attention_mask=torch.ones(2, 6, dtype=torch.long)) is None
    assert found(attention_mask=torch.zeros(2, 6, dtype=torch.long)) is None


def test_positions_that_restart() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]])
    assert found(position_ids=positions) == ([0, 3, 6, 11, 12], 5)
    assert found(position_ids=positions[:1]) == ([0, 3, 6, 9, 12], 3)
    assert found(input_ids=None, inputs_embeds=torch.zeros(2, 6, 4), position_ids=positions[:1]) is not None


def test_padding_becomes_documents() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    assert found(attention_mask=mask) == ([0, 4, 6, 7, 12], 5)
    assert found(attention_mask=mask, position_ids=torch.tensor([[0, 1, 0, 1, 2, 3]])) == ([0, 4, 6, 7, 12], 5)
    assert found(attention_mask=torch.tensor([[0, 0, 1, 1, 0, 0]]).expand(2, 6)) == ([0, 2, 4, 6, 8, 10, 12], 2)


def test_lengths_of_the_collator() -> None:
    cu_seqlens = torch.tensor([0, 6, 8, 12])
    assert found(cu_seq_lens_q=cu_seqlens)[1] == 6
    flat = rows_of({"input_ids": IDS.view(1, 12), "cu_seq_lens_q": cu_seqlens, "max_length_q": 6})
    assert flat.segments.cu_seqlens.tolist() == [0, 6, 8, 12]
    # A row's end ends a document, whatever the lengths say.
    crossing = found(cu_seq_lens_q=torch.tensor([0, 4, 12]), max_length_q=8)
    assert sorted({*crossing[0]}) == [0, 4, 6, 12]
    with pytest.raises(ValueError, match="give one of them"):
        rows_of({"input_ids": IDS, "cu_seq_lens_q": cu_seqlens, "attention_mask": torch.ones(2, 6)})


def test_what_is_left_to_transformers() -> None:
    hole = torch.tensor([[1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    for inputs in (
        {"attention_mask": hole},
        {"attention_mask": torch.ones(2, 1, 6, 6)},
        {"attention_mask": torch.ones(2, 9)},
        {"attention_mask": {"full_attention": None}},
        {"past_key_values": object()},
        {"position_ids": torch.zeros(3, 2, 6)},
    ):
        assert rows_of({"input_ids": IDS, **inputs}) is None


def test_segments_as_a_mask() -> None:
    mask = Segments(torch.tensor([0, 2, 4]), torch.tensor(2)).as_mask(1, 4)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    rows = Segments.whole_rows(2, 3, 2, torch.device("cpu"))
    assert rows.as_mask(2, 3)[1, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
