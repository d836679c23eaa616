"""Forms of rows and kinds of files: each gives the tokens that its plain form in JSONL gives."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import trl
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import has_generation_markers

from slipstream.train import sources
from slipstream.train.formats import RowMap, read_row
from slipstream.train.masking import UnstableTemplateError, assistant_spans, encode, encode_rows
from slipstream.train.recipe import DataSection
from slipstream.train.sources import BadRows, find_files, read_rows
from tests.train.tiny_chat import CHATML, CONVERSATIONS, make_tokenizer, write_jsonl

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2."},
]
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# TRL's templates with markers whose turns can be told apart without them, and that mark what our definition does:
# from the end of the generation prompt to the end of the turn.
MARKED = ["cohere", "cohere2", "diffusion_gemma", "gemma", "gemma3", "glm4moe", "idefics3", "lfm2", "lfm2_v2", "llama3",
          "qwen2_5_vl", "qwen3", "qwen3_instruct_2507", "qwen3_vl", "smolvlm"]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": TURNS, "id": 3}, {"messages": TURNS}),
        (
            {
                "conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2."}],
                "system": "Be brief.",
            },
            {"messages": TURNS},
        ),
        ({"conversations": TURNS}, {"messages": TURNS}),
        (
            {"conversations": [{"from": "human", "value": "?", "role": None}, {"from": "gpt", "value": "!", "id": 1}]},
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "id": 1}]},
        ),
        ({"instruction": "1 + 1?", "input": "", "output": "2.", "system": "Be brief."}, {"messages": TURNS}),
        (
            {"instruction": "Add.", "input": "1, 1", "output": "2."},
            {"messages": [{"role": "user", "content": "Add.\n\n1, 1"}, {"role": "assistant", "content": "2."}]},
        ),
        ({"prompt": "a", "completion": "b", "text": None}, {"prompt": "a", "completion": "b"}),
        ({"prompt": TURNS[:2], "completion": TURNS[2:]}, {"messages": TURNS, "trained_from": 2}),
        (
            {"messages": [TURNS[1], {"role": "assistant", "content": [{"type": "text", "text": t} for t in "2."]}]},
            {"messages": TURNS[1:]},
        ),
        ({"text": "a"}, {"text": "a"}),
        ({"input_ids": None, "messages": None, "instruction": None, "text": "a"}, {"text": "a"}),
        ({"input_ids": [1, 2]}, {"input_ids": [1, 2], "labels": None}),
    ],
)
def test_forms(row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read_row(row, chat=True) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": TURNS[:2]}, "'completion' is missing beside 'prompt'"),
        ({"prompt": TURNS[:2], "completion": "2."}, "'completion' must be a list, not a string"),
        ({"prompt": [], "completion": TURNS[2:]}, "'prompt' is empty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}, {"type": "image_url"}]}]},
            r"messages\[0\].content\[1\] is of type 'image_url'; content in parts has",
        ),
        ({"messages": [{"role": "user", "content": ["?"]}]}, r"messages\[0\].content\[0\] is a string; "),
        ({"messages": [{"role": "user", "content": []}]}, "'content' is empty"),
    ],
)
def test_forms_of_chats_that_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_row(row, chat=True)


@pytest.mark.parametrize("template", [CHATML, (TEMPLATES / "qwen3_training.jinja").read_text()], ids=["bare", "marked"])
def test_of_a_prompt_in_messages_nothing_is_trained(template: str) -> None:
    """With and without markers, also where the prompt holds answers; tokens are those of the conversation."""
    tokenizer = make_tokenizer()
    longer = [*TURNS, {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4."}]
    for turns, start in ((TURNS, 2), (longer, 4)):
        row = read_row({"prompt": turns[:start], "completion": turns[start:]}, True)
        made, whole = encode(row, tokenizer, template), encode({"messages": turns}, tokenizer, template)
        assert made.ids.tolist() == whole.ids.tolist()
        answer = tokenizer.decode(made.ids[made.trained])
        assert turns[-1]["content"] in answer
        assert answer.count("<|im_end|>") == 1
    assert not np.array_equal(made.trained, whole.trained)


def test_what_a_developer_says_is_in_the_row_or_the_row_is_bad() -> None:
    tokenizer, turns = make_tokenizer(), [{"role": "developer", "content": "Be brief."}, *TURNS[1:]]
    row = read_row({"messages": turns}, True)
    assert "Be brief." in tokenizer.decode(encode(row, tokenizer, CHATML).ids)
    with pytest.raises(ValueError, match=r"messages\[0\]: the chat template leaves out what the role 'developer' says"):
        encode(row, tokenizer, (TEMPLATES / "qwen3.jinja").read_text())


def test_tool_calls_and_tools_reach_the_template() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    row = read_row({"messages": [*TURNS[:2], call, {"role": "tool", "content": "2"}], "tools": [{"name": "add"}]}, True)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{{ tools | length }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.tool_calls[0].function.name if "
        "m.tool_calls }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    text, spans = assistant_spans(row["messages"], tokenizer, tokenizer.chat_template, row["tools"])
    assert text == "1<system>Be brief.<user>1 + 1?<assistant>add<tool>2"
    assert [text[a:b] for a, b in spans] == ["add"]


def test_what_else_a_message_says_reaches_the_template() -> None:
    turns = [
        {"role": "user", "content": "1 + 1?", "name": "Ann"},
        {"role": "assistant", "reasoning_content": "Add.", "tool_calls": [{"id": "c1", "function": {"name": "add"}}]},
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": None},
        {"role": "assistant", "content": "2.", "reasoning_content": "As it says.", "tool_calls": []},
    ]
    messages, tokenizer = read_row({"messages": turns}, True)["messages"], make_tokenizer()
    assert messages[0] == turns[0]
    assert "name" not in messages[2]
    assert "tool_calls" not in messages[3]
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
        "{% if m.role == 'tool' %}{{ m.tool_call_id + ':' }}{% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    text, spans = assistant_spans(messages, tokenizer, template)
    assert text == "<user>1 + 1?<assistant>(Add.)<tool>c1:2<assistant>(As it says.)2."
    assert [text[a:b] for a, b in spans] == ["(Add.)", "(As it says.)2."]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3", "<think>\nAdd.\n</think>\n\n2.<|im_end|>\n"),
        (
            "gptoss",
            "<|channel|>analysis<|message|>Add.<|end|><|start|>assistant<|channel|>final<|message|>2.<|return|>",
        ),
    ],
)
def test_reasoning_is_trained(name: str, expected: str) -> None:
    """And where a template drops that of earlier turns, these cannot be told apart."""
    answer = {"role": "assistant", "content": "2.", "reasoning_content": "Add.", "thinking": "Add."}
    template, tokenizer = (TEMPLATES / f"{name}.jinja").read_text(), make_tokenizer()
    messages = read_row({"messages": [TURNS[1], answer]}, True)["messages"]
    text, spans = assistant_spans(messages, tokenizer, template)
    assert [text[a:b] for a, b in spans] == [expected]
    with pytest.raises(UnstableTemplateError, match=r"messages\[1\] differently"):
        assistant_spans(messages * 2, tokenizer, template)


@pytest.mark.parametrize("name", ["glm4moe", "lfm2", "llama3", "qwen2_5_vl", "qwen3"])
def test_an_assistant_who_speaks_first(name: str) -> None:
    """qwen2_5_vl writes a system prompt of its own ahead."""
    template, tokenizer = (TEMPLATES / f"{name}_training.jinja").read_text(), make_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    for turns in ([TURNS[2]], [TURNS[2], *TURNS[1:]]):
        text, spans = assistant_spans(turns, tokenizer, template)
        marked = encode({"messages": turns}, tokenizer, template)
        derived = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        inside = [any(a < end and start < b for a, b in spans) for start, end in derived]
        assert inside == marked.trained.tolist()


def test_an_assistant_who_speaks_first_without_the_generation_prompt() -> None:
    tokenizer, turns = make_tokenizer(), [TURNS[2], *TURNS[1:]]
    bare = CHATML.partition("{% if")[0]
    text, spans = assistant_spans(turns, tokenizer, "Date: today\n{{ '' }}" + bare.replace("<|im_start|>", ""))
    assert [text[a:b] for a, b in spans] == ["assistant\n2.<|im_end|>\n"] * 2
    with pytest.raises(UnstableTemplateError, match="begins with the assistant"):
        assistant_spans(turns, tokenizer, CHATML.replace("assistant\n", "assistant\n<think>"))


def test_alpaca_without_a_chat_template() -> None:
    row = {"instruction": "Add.", "input": "1, 1", "output": "2."}
    made = read_row(row, chat=False)
    assert made["completion"] == "2."
    assert made["prompt"].startswith("Below is an instruction that describes a task, paired with an input")
    assert made["prompt"].endswith("### Instruction:\nAdd.\n\n### Input:\n1, 1\n\n### Response:\n")
    del row["input"]
    assert read_row(row, False)["prompt"].endswith("request.\n\n### Instruction:\nAdd.\n\n### Response:\n")


def test_pretokenised_rows_are_taken_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, trained = encode({"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}, tokenizer, None)
    assert (ids.tolist(), trained.tolist()) == ([5, 6, 7], [False, True, False])
    assert encode({"input_ids": [5, 6], "labels": None}, tokenizer, None).trained.all()


def test_many_rows_at_once_are_encoded_like_each_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"messages": CONVERSATIONS[1]}, {"text": "one"}, {"prompt": "a", "completion": "b"}, {"input_ids": [3]}]
    for row, made in zip(rows, encode_rows(rows, tokenizer, CHATML), strict=True):
        alone = encode(row, tokenizer, CHATML)
        assert not isinstance(made, ValueError)
        np.testing.assert_array_equal(made.ids, alone.ids)
        np.testing.assert_array_equal(made.trained, alone.trained)


@pytest.mark.parametrize("name", MARKED)
def test_masks_equal_those_of_templates_with_markers(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    template = (TEMPLATES / f"{name}_training.jinja").read_text()
    assert has_generation_markers(template)
    fast = make_tokenizer()
    fast.bos_token = "<|endoftext|>"
    turns = [turn for turn in CONVERSATIONS[2] if turn["role"] != "system"]
    marked = encode({"messages": turns}, fast, template)
    text, spans = assistant_spans(turns, fast, template)
    derived = fast(text, add_special_tokens=False, return_offsets_mapping=True)
    assert derived["input_ids"] == marked.ids.tolist()
    inside = [any(a < end and start < b for a, b in spans) for start, end in derived["offset_mapping"]]
    assert inside == marked.trained.tolist()
    assert len(spans) == 2


def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} + 1 =", "completion": f' {i + 1}, "yes"\nindeed'} for i in range(3)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "lines.json", rows)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name, mark in (("a.csv", ","), ("a.tsv", "\t")):
        cells = [["prompt", "completion"], *(row.values() for row in rows)]
        lines = (mark.join('"' + cell.replace('"', '""') + '"' for cell in line) for line in cells)
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    for path in sorted(tmp_path.iterdir()):
        assert [row for _, row in placed(path)] == rows, path
    assert [place for place, _ in placed(tmp_path / "a.csv")] == [f"{tmp_path}/a.csv:{line}" for line in (2, 4, 6)]
    assert [place for place, _ in placed(tmp_path / "list.json")][1] == f"{tmp_path}/list.json[1]"
    assert [place for place, _ in placed(tmp_path / "a.parquet")][2] == f"{tmp_path}/a.parquet: row 3"


def test_nested_parquet_and_text_files(tmp_path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist([{"messages": TURNS}, {"messages": TURNS[1:]}]), tmp_path / "a.parquet")
    assert [row for _, row in placed(tmp_path / "a.parquet")] == [{"messages": TURNS}, {"messages": TURNS[1:]}]
    (tmp_path / "b.txt").write_text("A book.\nIts end.\n")
    assert [row for _, row in placed(tmp_path / "b.txt")] == [{"text": "A book.\nIts end.\n"}]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("c")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "README.md").write_text("no")
    assert find_files(str(tmp_path)) == [tmp_path / "a.parquet", tmp_path / "b.txt", tmp_path / "sub" / "c.txt"]


def test_arrow_and_json_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow gives each row, message and call the keys of all others."""
    arguments = [{"city": "Bern"}, {"x": 1, "options": [{}, {"b": 2}]}, {}]
    rows: list[dict[str, Any]] = [{"text": "a", "messages": None}]
    for values in arguments:
        call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": values}}]}
        rows.append({"messages": [*TURNS, call]})
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet")
    monkeypatch.setattr(sources.datasets, "load_dataset", lambda *args, **kwargs: table.to_pylist())
    expected = [row for _, row in placed(path)]
    assert expected[0] == {"text": "a"}
    made = [row["messages"][-1]["tool_calls"][0]["function"]["arguments"] for row in expected[1:]]
    assert made == arguments
    for source in (tmp_path / "a.parquet", Path("org/name")):
        assert [row for _, row in placed(source)] == expected


def test_ids_are_not_searched_for_nulls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes as long as all checks of them."""
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    monkeypatch.setattr(sources, "drop_nulls", None)
    assert [row for _, row in placed(tmp_path / "a.parquet")] == rows


def test_nulls_that_a_row_of_json_says_are_kept() -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Bern", "unit": None}}}
    tools = [{"function": {"name": "weather", "parameters": {"unit": {"default": None}}}}]
    row = {"messages": [*TURNS, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": tools}
    made = read_row(row, True)
    assert made["messages"][-1]["tool_calls"] == [call]
    assert made["tools"] == tools


@pytest.mark.parametrize(
    ("template", "of_null"),
    [
        ("{% if ctx %}{{ ctx }}{% else %}-{% endif %}", "-"),
        ("{{ ctx or '-' }}", "-"),
        ("{{ ctx | default('-') }}", "-"),
        ("{{ ctx if ctx is defined else '-' }}", "-"),
        ("{{ ctx }}", None),
    ],
)
def test_columns_that_are_null(template: str, of_null: str | None) -> None:
    made = RowMap({"text": template})
    assert made({"ctx": "a"}) == {"text": "a"}
    if of_null is not None:
        assert made({"ctx": None}) == {"text": of_null}
    else:
        with pytest.raises(ValueError, match=r"columns: id; null, which counts as absent: ctx"):
            made({"ctx": None, "id": 1})


def test_a_hub_name_is_loaded_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        asked.append((args, kwargs))
        return [{"ctx": "The ball", "endings": ["rolls.", "sings."], "label": "0"}]

    monkeypatch.setattr(sources.datasets, "load_dataset", load_dataset)
    section = DataSection.model_validate({
        "train": {"path": "Rowan/hellaswag", "split": "validation", "subset": "en"},
        "map": {"prompt": "{{ ctx }}", "completion": " {{ endings[label | int] }}"},
    })  # fmt: skip
    found = list(read_rows(section.train[0], section, True, BadRows(), streaming=True))
    assert found == [("Rowan/hellaswag (validation): row 1", {"prompt": "The ball", "completion": " rolls."})]
    assert asked == [(("Rowan/hellaswag", "en"), {"split": "validation", "streaming": True})]

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(sources.datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"Rowan/hellaswag: no such file or folder here, and not .* hub: no network"):
        list(read_rows(section.train[0], section, True, BadRows()))


def test_map_makes_chats_and_is_sandboxed() -> None:
    row = {"q": "1 + 1?", "a": 2, "s": ""}
    mapped = RowMap({"system": "{{ s }}", "user": "{{ q }}", "assistant": "{{ a }}."})
    assert mapped(row) == {"messages": TURNS[1:]}
    with pytest.raises(ValueError, match=r"'q' is undefined \(columns: a, s; null, which counts as absent: q\)"):
        mapped({"q": None, "a": 2, "s": ""})
    with pytest.raises(ValueError, match=r"data\.map\.text: not a valid Jinja template"):
        RowMap({"text": "{{ q"})
    with pytest.raises(ValueError, match=r"data\.map\.text: .*unsafe"):
        RowMap({"text": "{{ ''.__class__.__mro__ }}"})(row)


def test_bad_rows_are_skipped_counted_and_listed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, "{", {"txt": "b"}, {"text": "c"}])
    bad = BadRows(skip=True)
    section = DataSection.model_validate({"train": str(path)})
    assert [row for _, row in read_rows(section.train[0], section, True, bad)] == [{"text": "a"}, {"text": "c"}]
    assert bad.count == 2
    assert [place for place, _ in bad.listed] == [f"{path}:2", f"{path}:3"]


def test_templates_that_cannot_be_told_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    """The check that guards the derived masks does refuse some of TRL's templates."""
    template = (TEMPLATES / "nemotron_3_nano_training.jinja").read_text()
    with pytest.raises(UnstableTemplateError):
        assistant_spans(CONVERSATIONS[0][1:], tokenizer, template)


def placed(path: Path) -> list[tuple[str, Any]]:
    section = DataSection.model_validate({"train": str(path)})
    return list(read_rows(section.train[0], section, True, BadRows()))
