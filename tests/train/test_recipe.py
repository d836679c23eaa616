"""Recipes: what is read from YAML and the command line, and what is said about mistakes."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import SchedulerType
from trl import SFTConfig

from slipstream.train.arguments import OURS
from slipstream.train.recipe import LoraSection, Recipe, Scheduler, Source, TrainSection
from slipstream.train.recipe_file import dump_recipe, load_recipe
from slipstream.train.recipe_names import ALIASES


def _script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe_docs = _script("recipe_docs")
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
    assert recipe.data.train == [Source(path="rows.jsonl")]  # type: ignore[call-arg]
    assert recipe.lora == LoraSection.model_validate({})
    assert notes == []


def test_overrides_win_and_are_yaml(tmp_path: Path) -> None:
    overrides = ["train.learning_rate=1e-5", "data.train=[a.jsonl, b.jsonl]", "lora.r=4", "train.eval_steps=null"]
    recipe, _ = load_recipe(write(tmp_path, GOOD), overrides)
    assert recipe.train.learning_rate == 1e-5
    assert [source.path for source in recipe.data.train] == ["a.jsonl", "b.jsonl"]
    assert recipe.lora is not None
    assert recipe.lora.r == 4
    assert recipe.eval.eval_steps is None


def test_what_cuda_graphs_cannot_go_with(tmp_path: Path) -> None:
    path, packed = write(tmp_path, GOOD), "data.packing=true"
    load_recipe(path, ["train.cuda_graphs=true", packed])
    for overrides, told in (
        ([], "set data.packing: true"),
        ([packed, "train.activation_checkpointing=true"], "activation checkpointing"),
        ([packed, "distributed.activation_checkpointing=selective"], "activation checkpointing"),
        ([packed, "distributed.strategy=ddp"], "use fsdp2"),
    ):
        (line,) = [line for line in mistakes(path, "train.cuda_graphs=true", *overrides) if "cuda_graphs" in line]
        assert told in line


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
learning_rates: 3
distributed: {ep_size: 0}
""",
    )
    found = mistakes(path, "train.sed=1", "train.seed=-1", "nonsense", "model.dtype.x=1")
    expected = [
        "command line: 'nonsense' is not of the form section.key=value",
        "command line: model.dtype: ",
        "recipe.yaml:3: model.backend: BackendConfig(attn='best'): use one of 'auto', ",
        "recipe.yaml:5: data.train.1: give a path, or a mapping with `path` and `weight` (given 3)",
        "recipe.yaml:6: data.evl: unknown key; did you mean 'eval'?",
        "recipe.yaml:8: train.learning_rte: unknown key; did you mean 'learning_rate'?",
        "recipe.yaml:9: train.output_dir: '$NOT_SET_ANYWHERE/x' names an environment variable that is not set",
        "recipe.yaml:10: train.warmup_steps: input should be a valid number",
        "recipe.yaml:11: train.max_steps: input should be a valid integer",
        "recipe.yaml:12: learning_rates: unknown key; did you mean 'train.learning_rate'?",
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


@pytest.mark.parametrize(
    "override",
    ["train.learning_rate=.inf", "train.num_train_epochs=.inf", "train.weight_decay=.nan", "lora.lora_alpha=.inf"],
)
def test_numbers_are_finite(tmp_path: Path, override: str) -> None:
    key, _, value = override.partition("=")
    said = f"command line: {key}: input should be a finite number (given {value[1:]})"
    assert mistakes(write(tmp_path, GOOD), override) == [said]


def test_no_steps_at_all(tmp_path: Path) -> None:
    assert mistakes(write(tmp_path, GOOD + "  max_steps: 0\n")) == [
        "recipe.yaml:6: train.max_steps: 0 steps train nothing; give 1 or more, or -1 for num_train_epochs"
    ]
    assert "timeout_minutes=inf" in mistakes(write(tmp_path, GOOD), "distributed.timeout_minutes=.inf")[0]


def test_missing_file(tmp_path: Path) -> None:
    assert mistakes(tmp_path / "recipe.yaml") == ["recipe.yaml: no such recipe file"]


def test_names_are_those_of_transformers_and_peft() -> None:
    assert set(TrainSection.model_fields) - set(SFTConfig.__dataclass_fields__) == set(OURS)
    ours = {"share_experts", "load_in_4bit"}
    assert set(LoraSection.model_fields) - set(LoraConfig.__dataclass_fields__) == ours
    # Those two need a metric, and a closed loop, of their own.
    assert set(Scheduler.__args__) == {kind.value for kind in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}


def test_keys_in_another_section_are_read_where_they_belong(tmp_path: Path) -> None:
    """A flat file as Axolotl and LLaMA-Factory have it, and the sections of NeMo AutoModel."""
    path = write(
        tmp_path,
        """base_model: m
datasets: [{path: a.jsonl, weight: 3}, {path: b, weight: 1}]
sequence_len: 512
sample_packing: true
seed: 7
learning_rate: 2e-5
output_dir: out
logging_steps: 5
lora_r: 8
lora_alpha: 16
step_scheduler: {local_batch_size: 2, ckpt_every_steps: 100, val_every_steps: 50}
ep_size: 4
""",
    )
    recipe, notes = load_recipe(path, ["train.report_to=tensorboard"])
    assert (recipe.model.name_or_path, recipe.data.max_length, recipe.data.packing) == ("m", 512, True)
    assert [(source.path, source.weight) for source in recipe.data.train] == [("a.jsonl", 3), ("b", 1)]
    assert (recipe.train.seed, recipe.train.learning_rate, recipe.train.output_dir) == (7, 2e-5, "out")
    assert recipe.lora is not None
    assert (recipe.lora.r, recipe.lora.lora_alpha) == (8, 16)
    assert recipe.train.per_device_train_batch_size == 2
    assert (recipe.checkpoint.save_steps, recipe.eval.eval_steps) == (100, 50)
    assert (recipe.log.logging_steps, recipe.log.report_to) == (5, ["tensorboard"])
    assert recipe.distributed == {"ep_size": 4}
    assert f"{path}:11: step_scheduler.ckpt_every_steps is read as checkpoint.save_steps" in notes
    assert "command line: train.report_to is read as log.report_to" in notes
    assert len(notes) == 15


def test_mistakes_are_found_where_keys_were_moved_from(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "datasets: [{path: a, wieght: 1}]\nper_device_eval_batch_size: 0\n")
    path.write_text(path.read_text().replace("  train: rows.jsonl\n", "  seed: 1\n"))
    assert mistakes(path) == [
        "recipe.yaml:6: data.train.0.wieght: unknown key; did you mean 'weight'?",
        "recipe.yaml:7: eval.per_device_eval_batch_size: input should be greater than 0 (given 0)",
    ]


def test_numbers_in_free_mappings_are_numbers(tmp_path: Path) -> None:
    text = GOOD + "  lr_scheduler_kwargs: {min_lr: 1e-6, other: 2E5}\n  run_name: '1e-5'\n"
    recipe, _ = load_recipe(write(tmp_path, text), ["model.config_overrides={a: 3e+2}", "model.name_or_path=null",
                                                    "model.config=c"])  # fmt: skip
    assert recipe.train.lr_scheduler_kwargs == {"min_lr": 1e-6, "other": 2e5}
    assert recipe.model.config_overrides == {"a": 300.0}
    again, _ = load_recipe(write(tmp_path, dump_recipe(recipe)))
    assert again == recipe
    assert again.log.run_name == "1e-5"


def test_a_checkpoint_or_a_config(tmp_path: Path) -> None:
    assert mistakes(write(tmp_path, GOOD), "model.config=qwen3-30b-a3b") == [
        "recipe.yaml:1: model: name_or_path and config: a checkpoint brings its own config; leave one out "
        "(name_or_path=null for random weights)"
    ]


def test_schema_and_page_are_up_to_date() -> None:
    """`python scripts/recipe_docs.py` writes both."""
    assert recipe_docs.SCHEMA.read_text(encoding="utf-8") == recipe_docs.schema()
    page = recipe_docs.PAGE.read_text(encoding="utf-8")
    assert page == recipe_docs.page(page)


def test_schema_names_every_key_and_choice() -> None:
    schema = json.loads(recipe_docs.schema())
    assert list(schema["properties"]) == list(Recipe.model_fields)
    keys = schema["properties"]["distributed"]["properties"]
    assert keys["strategy"] == {"enum": ["fsdp2", "ddp"], "default": "fsdp2"}
    assert keys["ep_size"]["type"] == "integer"
    backend = schema["$defs"]["ModelSection"]["properties"]["backend"]["properties"]
    assert backend["experts"] == {"enum": ["auto", "slipstream", "fp8", "transformers"]}
    assert {"$ref": "#/$defs/LoraSection"} in schema["properties"]["lora"]["anyOf"]


def test_examples_point_at_the_schema() -> None:
    for path in (recipe_docs.DOCS.parent / "examples").glob("*.yaml"):
        first = path.read_text().splitlines()[0]
        assert first.startswith("# yaml-language-server: $schema=")
        assert (path.parent / first.partition("=")[2]).resolve() == recipe_docs.SCHEMA
