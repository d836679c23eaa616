"""Broken recipes and data files, each with its one clear message; docs/errors.md lists them.

`UPDATE_DOCS=1 python -m pytest tests/train/test_errors.py` writes that page anew.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from slipstream.cli import main
from tests.train.tiny_chat import CONVERSATIONS, write_jsonl

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
INTRO = """# What is refused, and how

Before weights are loaded or a file is written, `slipstream finetune` checks the recipe, the checkpoint and every row.
It ends with exit code 1 and these lines; a test runs each case and compares.

"""
RECIPE = """model: {name_or_path: model}
data: {train: rows.jsonl, eval_fraction: 0.2}
train:
  output_dir: out
"""


@dataclass(frozen=True)
class Broken:
    """`recipe` replaces `RECIPE`; `more` is added below its `train:`; `files` replace or join rows.jsonl."""

    what: str
    more: str = ""
    recipe: str = RECIPE
    overrides: Sequence[str] = ()
    files: dict[str, str | bytes] = field(default_factory=dict)


ROWS = "rows.jsonl"
GOOD = '{"prompt": "1 + 1 =", "completion": " 2"}\n'
RECIPES = [
    Broken("a misspelt key", "  learning_rte: 1e-5\n"),
    Broken("a misspelt section", "evl: {eval_steps: 5}\n"),
    Broken("a word where a number belongs", "  max_steps: many\n"),
    Broken("a number out of range", overrides=["data.eval_fraction=1.5"]),
    Broken("nothing to train on", recipe="model: {name_or_path: model}\ntrain: {output_dir: out}\ndata: {}\n"),
    Broken("neither checkpoint nor config", recipe=RECIPE.replace("{name_or_path: model}", "{dtype: bfloat16}")),
    Broken("an environment variable that is not set", overrides=["train.output_dir=$SCRATCH_OF_NOBODY/run"]),
    Broken("YAML that is not YAML", "  seed: [1, 2\n"),
    Broken("a key given twice", "  seed: 1\n  seed: 2\n"),
    Broken("two names for one key", "base_model: other\n"),
    Broken("a section of another tool's", "optimizer: {_target_: torch.optim.AdamW, lr: 1e-5}\n"),
    Broken("a switch that has no key here", "load_in_8bit: true\n"),
    Broken("an unknown key of `distributed`", "distributed: {expert_size: 2}\n"),
    Broken("experts that cannot be shared out", "distributed: {ep_size: 3}\n"),
    Broken("an implementation that does not exist", overrides=["model.backend.experts=magic"]),
    Broken("an unknown optimizer", overrides=["train.optim=sdg"]),
    Broken("rows longer than the model allows", overrides=["data.max_length=1000"]),
    Broken("a stream without an end", overrides=["data.streaming=true", "data.eval_fraction=0"]),
    Broken("weights for some sources only", overrides=["data.train=[{path: rows.jsonl, weight: 1}, b.jsonl]"]),
    Broken("half a map", overrides=["data.map={prompt: '{{ question }}'}"]),
    Broken("an override without a value", overrides=["train.max_steps"]),
    Broken("a checkpoint that is not there", overrides=["model.name_or_path=./nowhere"]),
    Broken("an output folder that holds a model", overrides=["train.output_dir=other"]),
    Broken("packing, with layers that carry a state", recipe=RECIPE.replace("name_or_path: model",
           "config: jamba.json"), overrides=["data.packing=true"], files={"jamba.json": '{"model_type": "jamba"}'}),
]  # fmt: skip
DATA = [
    Broken("no such file", overrides=["data.train=nowhere.jsonl"]),
    Broken("a file of unknown kind", overrides=["data.train=rows.xlsx"], files={"rows.xlsx": "x"}),
    Broken("a folder without data", overrides=["data.train=other"]),
    Broken("a line that is not JSON", files={ROWS: GOOD + '{"prompt": "2 + 2 =",\n'}),
    Broken("a line that is not text", files={ROWS: GOOD.encode() + b'{"text": "\xff"}\n'}),
    Broken("a list where a row belongs", files={ROWS: GOOD + "[1, 2]\n"}),
    Broken("keys of no known form", files={ROWS: GOOD + '{"question": "?", "answer": "!"}\n'}),
    Broken("a prompt without a completion", files={ROWS: GOOD + '{"prompt": "2 + 2 ="}\n'}),
    Broken("an unknown role", files={ROWS: '{"messages": [{"role": "gpt", "content": "Hi."}]}\n'}),
    Broken("a turn that says nothing", files={ROWS: '{"conversations": [{"from": "human", "value": ""}]}\n'}),
    Broken("content that is not text", files={ROWS: '{"messages": [{"role": "user", "content": 7}]}\n'}),
    Broken("labels that are not the ids", files={ROWS: '{"input_ids": [5, 6], "labels": [-100, 7]}\n'}),
    Broken("a token that the model lacks", files={ROWS: '{"input_ids": [5, 6000]}\n'}),
    Broken("nobody answers", files={ROWS: '{"messages": [{"role": "user", "content": "Hello?"}]}\n'}),
    Broken("max_length cuts every answer off", overrides=["data.max_length=8"], files={}),
    Broken("a row with a cell too many", overrides=["data.train=rows.csv"],
           files={"rows.csv": "prompt,completion\n1 + 1 =, 2\n2 + 2 =, 4, 5\n"}),
    Broken("a damaged Parquet file", overrides=["data.train=rows.parquet"], files={"rows.parquet": b"PAR1 no more"}),
    Broken("a map over a column that is not there", overrides=["data.map={text: '{{ body }}'}"]),
    Broken("a chat template that is not there", overrides=["data.chat_template=nowhere.jinja"]),
    Broken("text cut inside a character", files={ROWS: '{"text": "a \\ud83d"}\n'}),
    Broken("one row, and one to hold out", files={ROWS: GOOD}),
]  # fmt: skip


@pytest.fixture(scope="module")
def messages(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, tokenizer: PreTrainedTokenizerFast
) -> dict[str, str]:
    """The message that each case ends with, once it has refused cleanly."""
    return {case.what: refusal(case, tmp_path_factory.mktemp("case"), checkpoint) for case in RECIPES + DATA}


def refusal(case: Broken, folder: Path, checkpoint: Path) -> str:
    (folder / "model").symlink_to(checkpoint, target_is_directory=True)
    (folder / "other").mkdir()
    if "output_dir" in " ".join(case.overrides):
        (folder / "other" / "config.json").write_text("{}")
    write_jsonl(folder / ROWS, [{"messages": turns} for turns in CONVERSATIONS])
    (folder / "recipe.yaml").write_text(case.recipe + case.more)
    for name, content in case.files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(folder.rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, file=None: lines.append(" ".join(map(str, words))))
        with pytest.raises(SystemExit) as caught:
            main(["finetune", "recipe.yaml", *case.overrides])
    assert caught.value.code == 1, case.what
    assert sorted(folder.rglob("*")) == before, case.what
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert "\n" not in error, case.what
    return error.removeprefix("error: ")


def test_the_page_shows_what_is_said(messages: dict[str, str]) -> None:
    page = INTRO
    for title, cases in (("Recipes", RECIPES), ("Data", DATA)):
        page += f"## {title}\n\n| | message |\n|---|---|\n"
        page += "".join(f"| {case.what} | `` {messages[case.what]} `` |\n" for case in cases) + "\n"
    page = page.rstrip() + "\n"
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(page, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page


def test_each_message_says_where(messages: dict[str, str]) -> None:
    """A file and a line where there is one, or the key."""
    for case in RECIPES + DATA:
        places = (
            "recipe.yaml:",
            "rows.",
            "command line:",
            "data.",
            "model.",
            "train.",
            "distributed:",
            "other:",
            "nowhere.",
        )
        assert messages[case.what].startswith(places), messages[case.what]
    assert len(messages) == len(RECIPES) + len(DATA) >= 20
