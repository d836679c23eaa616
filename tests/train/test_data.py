"""Data: which lines are refused, which tokens are trained on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import qwen3_chat_template

from slipstream.train.data import TokenizedData, load_data
from slipstream.train.formats import IGNORE, KNOWN
from slipstream.train.masking import encode, trained_segments
from slipstream.train.recipe import DataSection
from tests.train.tiny_chat import CHATML, CHATML_MARKED, CONVERSATIONS, make_tokenizer, write_jsonl

ANSWERED = {"messages": CONVERSATIONS[0]}
# Writes an earlier answer differently once the conversation goes on.
UNSTABLE = CHATML.replace("message['content']", "(message['content'] if loop.last else message['content'] | upper)")


def load(
    tokenizer: PreTrainedTokenizerFast, *paths: Path, max_length: int = 128, vocab_size: int = 10**6, **section: Any
) -> TokenizedData:
    section = {"train": [str(path) for path in paths], "eval_fraction": 0, **section}
    return load_data(DataSection.model_validate(section), tokenizer, max_length, vocab_size)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "not valid JSON: Expecting value (column 15)"),
        ("[1]", "a line must be one JSON object, not a list"),
        (
            '{"conversation": []}',
            f"needs {KNOWN}; has 'conversation'",
        ),
        ('{"messages": "hi"}', "'messages' must be a list, not a string"),
        ('{"messages": []}', "'messages' is empty"),
        ('{"messages": ["hi"]}', "messages[0] must be an object with 'role' and 'content', not a string"),
        ('{"messages": [{"role": "user"}]}', "messages[0]: 'content' is missing"),
        ('{"messages": [{"role": "user", "content": null}]}', "messages[0]: 'content' is missing"),
        ('{"messages": [{"role": "user", "content": ""}]}', "messages[0]: 'content' is empty"),
        (
            '{"messages": [{"role": "gpt", "content": "hi"}]}',
            "messages[0]: role 'gpt' is not one of system, developer, user, assistant, tool",
        ),
        ('{"prompt": "a"}', "'completion' is missing beside 'prompt'"),
        ('{"text": 3}', "'text' must be a string, not a number"),
        ('{"text": ""}', "'text' is empty"),
        ('{"text": "a \\ud83d"}', "text holds half a character ('\\ud83d', a surrogate without its other half)"),
        (
            '{"messages": [{"role": "user", "content": "a", "name": "\\ude00"}]}',
            "messages[0].name holds half a character ('\\ude00', a surrogate without its other half)",
        ),
        ('{"input_ids": [1, 99999999999]}', "'input_ids' holds 99999999999; ids are 0 or more, and below 2**31"),
    ],
)
def test_malformed_line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, line: str, message: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [ANSWERED, "", line])
    with pytest.raises(ValueError, match="rows") as caught:
        load(tokenizer, path)
    assert str(caught.value) == f"{path}:3: {message}"


def test_line_that_is_not_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: not UTF-8 text"):
        load(tokenizer, path)


def test_line_that_is_nested_too_deeply(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ["[" * 10**5 + "]" * 10**5])
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: not readable JSON: "):
        load(tokenizer, path)


def test_template_that_refuses_a_conversation(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = write_jsonl(tmp_path / "rows.jsonl", [ANSWERED])
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: roles must alternate"):
        load(tokenizer, path)
    tokenizer.chat_template = CHATML.replace("'<|im_end|>", "message.get('tool_calls', '') + '<|im_end|>")
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}
    write_jsonl(path, [ANSWERED, {"messages": [*CONVERSATIONS[0][:2], call]}])
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: the chat template fails at this row: TypeError: can only"):
        load(tokenizer, path)
    assert load(tokenizer, path, on_bad_row="skip").counts.bad_rows == 1
    write_jsonl(path, [ANSWERED])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*name one as data\.chat_template"):
        load(tokenizer, path)


@pytest.mark.parametrize("turns", [CONVERSATIONS[0], CONVERSATIONS[1][1:3], CONVERSATIONS[2][:4]])
def test_prefix_rendering_equals_generation_markers(
    tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, str]]
) -> None:
    ids, trained = encode({"messages": turns}, tokenizer, CHATML)
    marked_ids, marked = encode({"messages": turns}, tokenizer, CHATML_MARKED)
    assert trained.any()
    np.testing.assert_array_equal(ids, marked_ids)
    np.testing.assert_array_equal(trained, marked)


def test_trained_part_is_the_answers_and_their_end(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    row = load(tokenizer, write_jsonl(tmp_path / "rows.jsonl", [ANSWERED])).train[0]
    segments = trained_segments(row, tokenizer)
    assert [text for text, trained in segments if trained] == [
        "After one comes the end.<|im_end|>\n",
        "Yes, 0 times.<|im_end|>\n",
    ]
    assert "".join(text for text, _ in segments) == tokenizer.apply_chat_template(CONVERSATIONS[0], tokenize=False)


def test_text_and_completions_end_with_a_stop(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": "one two"}, {"prompt": "one", "completion": " two", "source": "ignored"}]
    data = load(tokenizer, write_jsonl(tmp_path / "rows.jsonl", rows)).train
    assert trained_segments(data[0], tokenizer) == [("one two<|im_end|>", True)]
    assert trained_segments(data[1], tokenizer) == [("one", False), (" two<|im_end|>", True)]


def test_known_unstable_template_takes_trls_variant(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = qwen3_chat_template
    data = load(tokenizer, write_jsonl(tmp_path / "rows.jsonl", [ANSWERED]))
    assert "TRL" in data.notes[0]
    answers = [text for text, trained in trained_segments(data.train[0], tokenizer) if trained]
    assert answers[0].endswith("After one comes the end.<|im_end|>\n")
    assert len(answers) == 2


def test_unknown_unstable_template_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = UNSTABLE
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: the chat template renders .*messages\[2\].*generation"):
        load(tokenizer, write_jsonl(tmp_path / "rows.jsonl", [ANSWERED]))


def test_variant_keeps_the_reasoning_of_earlier_turns(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = qwen3_chat_template
    turns = [turn | {"reasoning_content": f"Why {i}."} for i, turn in enumerate(CONVERSATIONS[0])]
    data = load(tokenizer, write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}]), max_length=1000)
    answers = [text for text, trained in trained_segments(data.train[0], tokenizer) if trained]
    assert [answer.split("</think>")[0] for answer in answers] == [f"<think>\nWhy {i}.\n" for i in (2, 4)]


def test_cells_of_any_length(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "long " * 30_000 + "\n")
    assert load(tokenizer, path, max_length=10**6).counts.tokens > 30_000


def test_truncation_is_counted_and_masked_rows_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [ANSWERED, {"messages": CONVERSATIONS[1][:2]}])
    whole = load(tokenizer, path)
    assert (whole.counts.rows, whole.counts.masked_rows, whole.counts.cut_rows) == (1, 1, 0)
    cut = load(tokenizer, path, max_length=whole.counts.tokens - 5)
    assert (cut.counts.cut_rows, cut.counts.cut_tokens, cut.counts.tokens) == (1, 5, whole.counts.tokens - 5)
    labels = cut.train[0]["labels"]
    assert cut.counts.trained_tokens == sum(label != IGNORE for label in labels)


def test_all_labels_masked(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": CONVERSATIONS[0][:2]}])
    with pytest.raises(ValueError, match=r"none of the 1 rows .*every label is masked.*role 'assistant'"):
        load(tokenizer, path)
    path = write_jsonl(tmp_path / "rows.jsonl", [ANSWERED])
    with pytest.raises(ValueError, match=r"max_length=4 cuts 1 of them before .*raise data\.max_length"):
        load(tokenizer, path, max_length=4)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no rows"):
        load(tokenizer, path)


def test_token_the_model_does_not_have(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [ANSWERED])
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: token .* vocabulary has 10;"):
        load(tokenizer, path, vocab_size=10)


def test_folders_and_held_out_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for name, part in (("b", CONVERSATIONS[:5]), ("a", CONVERSATIONS[5:10])):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"messages": turns} for turns in part])
    whole = load(tokenizer, tmp_path)
    assert whole.eval is None
    assert whole.train[0] == load(tokenizer, tmp_path / "a.jsonl").train[0]
    split, again = (load(tokenizer, tmp_path, eval_fraction=0.2, seed=3) for _ in range(2))
    assert split.eval is not None
    assert again.eval is not None
    assert (len(split.train), len(split.eval)) == (8, 2)
    assert split.eval[:] == again.eval[:]
    named = load(tokenizer, tmp_path / "a.jsonl", eval=str(tmp_path / "b.jsonl"))
    assert named.eval is not None
    assert (len(named.train), len(named.eval)) == (5, 5)
    with pytest.raises(ValueError, match="leaves none to hold out"):
        load(tokenizer, write_jsonl(tmp_path / "one.jsonl", [ANSWERED]), eval_fraction=0.5)
    with pytest.raises(ValueError, match="no such data file"):
        load(tokenizer, tmp_path / "none.jsonl")


def test_weights_mix_sources_and_no_row_is_on_both_sides(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", [{"text": f"few {i}"} for i in range(20)])
    many = write_jsonl(tmp_path / "many.jsonl", [{"text": f"many {i}"} for i in range(200)])
    sources = [{"path": str(few), "weight": 3}, {"path": str(many), "weight": 1}]
    data = load(tokenizer, train=sources, eval_fraction=0.1)
    assert data.eval is not None
    train, held_out = ([tokenizer.decode(ids) for ids in part["input_ids"]] for part in (data.train, data.eval))
    assert (sum("few" in text for text in held_out), len(held_out)) == (2, 22)
    assert not set(train) & set(held_out)
    assert len(set(train)) == 198  # each row is seen, those of the small source again and again
    assert sum("few" in text for text in train) / len(train) == pytest.approx(0.75, abs=0.05)
    assert load(tokenizer, train=sources, eval_fraction=0.1).train[:] == data.train[:]
    write_jsonl(many, [{"text": "one"}])
    with pytest.raises(ValueError, match=r"many\.jsonl: 1 row to train on leaves none to hold out"):
        load(tokenizer, train=sources, eval_fraction=0.1)
    write_jsonl(many, [{"input_ids": [3, 4], "labels": [IGNORE, IGNORE]}])
    with pytest.raises(ValueError, match=r"many\.jsonl: no row with a token to train on"):
        load(tokenizer, train=sources)


@pytest.mark.parametrize(("excess", "kept"), [("truncate", [4, 8]), ("drop", [4]), ("split", [4, 8, 8, 5])])
def test_rows_that_are_too_long(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, excess: str, kept: list[int]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": list(range(4))}, {"input_ids": list(range(21))}])
    data = load(tokenizer, path, max_length=8, excess_length=excess)
    assert [len(ids) for ids in data.train["input_ids"]] == kept
    counts = data.counts
    expected = {"truncate": (1, 13, 0, 0), "drop": (0, 0, 1, 0), "split": (0, 0, 0, 1)}[excess]
    assert (counts.cut_rows, counts.cut_tokens, counts.dropped_rows, counts.split_rows) == expected
    if excess == "split":
        assert [i for ids in data.train["input_ids"][1:] for i in ids] == list(range(21))


def test_bad_rows_are_left_out_on_request(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    refusing = "{% if messages[0].role != 'user' %}{{ raise_exception('no user') }}{% endif %}"
    tokenizer.chat_template = refusing + CHATML
    rows = [{"messages": turns} for turns in (CONVERSATIONS[0][1:3], CONVERSATIONS[1])]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, "{"])
    data = load(tokenizer, path, on_bad_row="skip")
    assert (data.counts.rows, data.counts.bad_rows) == (1, 2)
    assert data.bad_rows == [
        (f"{path}:3", "not valid JSON: Expecting property name enclosed in double quotes (column 2)"),
        (f"{path}:2", "no user"),
    ]
    assert data.notes[-1] == "2 bad rows were left out; data.json lists them"
    write_jsonl(path, ["{", "["])
    with pytest.raises(ValueError, match=r"all 2 rows are bad, the first at .*:1: not valid JSON"):
        load(tokenizer, path, on_bad_row="skip")


def test_bad_rows_of_a_stream_are_named_as_they_come(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*({"text": str(i)} for i in range(1200)), "{"])
    data = load(tokenizer, path, streaming=True, on_bad_row="skip")
    assert data.counts.bad_rows == 0  # nobody has read as far
    assert "left out" not in capfd.readouterr().err
    assert len([row for row, _ in zip(data.train, range(1200), strict=False)]) == 1200
    assert f"left out: {path}:1201: not valid JSON" in capfd.readouterr().err
    with pytest.raises(ValueError, match=r"a\.jsonl:1201: not valid JSON"):
        list(zip(load(tokenizer, path, streaming=True).train, range(1200), strict=False))


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_gives_the_rows_again_and_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slipstream.train.data.SHUFFLED", 30)
    monkeypatch.setattr("slipstream.train.packing.PACKED_AT_ONCE", 30)
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(6)]) for name in "ab"]
    data = load(tokenizer, *paths, streaming=True, packing=packing)
    whole = load(tokenizer, *paths)
    assert data.counts == whole.counts

    def first(number: int) -> list[str]:
        rows = [row for row, _ in zip(data.train, range(number), strict=False)]
        return [text for row in rows for text in tokenizer.decode(row["input_ids"]).split("<|im_end|>") if text]

    texts = first(4 if packing else 40)
    assert {tokenizer.decode(ids).removesuffix("<|im_end|>") for ids in whole.train["input_ids"]} >= set(texts)
    assert len(texts) >= 40
    assert texts == first(4 if packing else 40)
