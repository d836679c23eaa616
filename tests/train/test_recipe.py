"""Recipes: what is read from YAML and the command line, and what is said about mistakes."""

from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import SchedulerType
from trl import SFTConfig

from slipstream.train.recipe import LoraSection, Scheduler, TrainSection
from slipstream.train.recipe_file import ALIASES, dump_recipe, load_recipe

GOOD = "model: {name_or_path: m}\ndata:\n  train: rows.jsonl\ntrain:\n  output_dir: out\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def mistakes(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ValueError, match=r"\S") as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(str(path), "recipe.yaml").splitlines()


def test_numbers_paths_and_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS", "/runs")
    text = GOOD.replace("output_dir: out", "output_dir: $RUNS/one\n  learning_rate: 1e-5") + "lora:\neval:\n"
    recipe, notes = load_recipe(write(tmp_path, text.replace("{name_or_path: m}", "{name_or_path: ~/m}")))
    assert recipe.train.learning_rate == 1e-5  # a string to PyYAML
    assert recipe.train.output_dir == "/runs/one"
    assert recipe.model.name_or_path == str(Path.home() / "m")
    assert recipe.data.train == ["rows.jsonl"]
    assert recipe.lora == LoraSection.model_validate({})
    assert notes == []


def test_overrides_win_and_are_yaml(tmp_path: Path) -> None:
    overrides = ["train.learning_rate=1e-5", "data.train=[a.jsonl, b.jsonl]", "lora.r=4", "train.eval_steps=null"]
    recipe, _ = load_recipe(write(tmp_path, GOOD), overrides)
    assert recipe.train.learning_rate == 1e-5
    assert recipe.data.train == ["a.jsonl", "b.jsonl"]
    assert recipe.lora is not None
    assert recipe.lora.r == 4
    assert recipe.train.eval_steps is None


def test_dumped_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe, _ = load_recipe(write(tmp_path, GOOD), ["train.learning_rate=3e-6", "lora.r=2"])
    again, _ = load_recipe(write(tmp_path, dump_recipe(recipe)))
    assert again == recipe


def test_names_of_other_tools(tmp_path: Path) -> None:
    text = "base_model: m\nmicro_batch_size: 3\ndata: {train: x, cutoff_len: 7}\ntrain: {output_dir: out}\n"
    path = write(tmp_path, text)
    recipe, notes = load_recipe(path, ["lora_r=4"])
    assert recipe.model.name_or_path == "m"
    assert recipe.train.per_device_train_batch_size == 3
    assert recipe.data.max_length == 7
    assert recipe.lora is not None
    assert recipe.lora.r == 4
    assert f"{path}:3: data.cutoff_len is read as data.max_length" in notes
    assert "command line: lora_r is read as lora.r" in notes
    twice = mistakes(write(tmp_path, text + "sequence_len: 3\n"))
    assert twice == ["recipe.yaml:3: cutoff_len: data.max_length is given as well; keep one"]


def test_every_alias_leads_to_a_key(tmp_path: Path) -> None:
    for alias in ALIASES:
        with pytest.raises(ValueError, match=r"\S") as caught:
            load_recipe(write(tmp_path, f"{alias}: [[]]\n"))
        assert "unknown key" not in str(caught.value)


def test_all_mistakes_at_once_each_with_its_line(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """model:
  name_or_path: m
  backend: {attn: best}
data:
  train: [a.jsonl, 3]
  evl: held.jsonl
train:
  learning_rte: 1e-5
  output_dir: $NOT_SET_ANYWHERE/x
  warmup_steps: soon
  max_steps: 1.5
learning_rate: 3
distributed: {ep_size: 0}
""",
    )
    found = mistakes(path, "train.sed=1", "train.seed=-1", "nonsense", "model.dtype.x=1")
    expected = [
        "command line: 'nonsense' is not of the form section.key=value",
        "command line: model.dtype: ",
        "recipe.yaml:3: model.backend: BackendConfig(attn='best'): use one of 'auto', ",
        "recipe.yaml:5: data.train.1: input should be a valid string (given 3)",
        "recipe.yaml:6: data.evl: unknown key; did you mean 'eval'?",
        "recipe.yaml:8: train.learning_rte: unknown key; did you mean 'learning_rate'?",
        "recipe.yaml:9: train.output_dir: '$NOT_SET_ANYWHERE/x' names an environment variable that is not set",
        "recipe.yaml:10: train.warmup_steps: input should be a valid number",
        "recipe.yaml:11: train.max_steps: input should be a valid integer",
        "recipe.yaml:12: learning_rate: unknown key; did you mean 'train.learning_rate'?",
        "recipe.yaml:13: distributed: ep_size=0: give a whole number of ranks",
        "command line: train.sed: unknown key; did you mean 'seed'?",
        "command line: train.seed: input should be greater than or equal to 0 (given -1)",
    ]
    for start in expected:
        assert any(line.startswith(start) for line in found), (start, found)
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "  seed: 1\n  seed: 2\n", "recipe.yaml:7: train.seed: given twice, first in line 6; keep one"),
        (GOOD + "data: {}\n", "recipe.yaml:6: data: given twice, first in line 2; keep one"),
        (GOOD + "  seed: [1\n", "recipe.yaml:7: not valid YAML: "),
        (GOOD.replace("  output_dir: out\n", ""), "recipe.yaml:4: train.output_dir: missing; "),
        ("- 1\n", "recipe.yaml: a recipe is a mapping with the sections model, data, train, "),
        ("", "recipe.yaml: a recipe is a mapping"),
    ],
)
def test_one_mistake(tmp_path: Path, text: str, message: str) -> None:
    assert any(line.startswith(message) for line in mistakes(write(tmp_path, text)))


def test_missing_file(tmp_path: Path) -> None:
    assert mistakes(tmp_path / "recipe.yaml") == ["recipe.yaml: no such recipe file"]


def test_names_are_those_of_transformers_and_peft() -> None:
    assert set(TrainSection.model_fields) - set(SFTConfig.__dataclass_fields__) == {"z_loss"}
    assert set(LoraSection.model_fields) <= set(LoraConfig.__dataclass_fields__)
    # Those two need a metric, and a closed loop, of their own.
    assert set(Scheduler.__args__) == {kind.value for kind in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}
