"""Data: which lines are refused, which tokens are trained on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import qwen3_chat_template

from slipstream.train.data import IGNORE, TokenizedData, encode, load_data, trained_segments
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
        ('{"conversation": []}', "needs 'messages', 'prompt' and 'completion', or 'text'; has 'conversation'"),
        ('{"messages": "hi"}', "'messages' must be a list, not a string"),
        ('{"messages": []}', "'messages' is empty"),
        ('{"messages": ["hi"]}', "messages[0] must be an object with 'role' and 'content', not a string"),
        ('{"messages": [{"role": "user"}]}', "messages[0]: 'content' is missing"),
        ('{"messages": [{"role": "user", "content": null}]}', "messages[0]: 'content' must be a string, not null"),
        ('{"messages": [{"role": "user", "content": ""}]}', "messages[0]: 'content' is empty"),
        (
            '{"messages": [{"role": "gpt", "content": "hi"}]}',
            "messages[0]: role 'gpt' is not one of system, user, assistant",
        ),
        ('{"prompt": "a"}', "'completion' is missing beside 'prompt'"),
        ('{"text": 3}', "'text' must be a string, not a number"),
        ('{"text": ""}', "'text' is empty"),
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


def test_template_that_refuses_a_conversation(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = write_jsonl(tmp_path / "rows.jsonl", [ANSWERED])
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: roles must alternate"):
        load(tokenizer, path)
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
