"""`slipstream finetune` on bad input: one clear error, exit code 1, no traceback, nothing written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig
from transformers import AutoConfig
from transformers.integrations import integration_utils

from slipstream.cli import main
from slipstream.coverage.architectures import moe_architectures
from slipstream.planning.flops import meta_model
from slipstream.train.lora_names import check_names
from tests.tiny_models import tiny_config
from tests.train.tiny_chat import (
    CONVERSATIONS,
    MAX_POSITIONS,
    make_checkpoint,
    make_tokenizer,
    write_jsonl,
    write_recipe,
)

Refusal = Callable[..., str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", make_tokenizer())


@pytest.fixture
def copy(tmp_path: Path, checkpoint: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Run `finetune` on a recipe; the error it ends with, after checking that it refused cleanly."""

    def run(recipe: Path, *arguments: str) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        with pytest.raises(SystemExit) as caught:
            main(["finetune", str(recipe), *arguments])
        assert caught.value.code == 1
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        return errors[0].removeprefix("error: ")

    return run


def test_unknown_key(tmp_path: Path, checkpoint: Path, refused: Refusal) -> None:
    recipe = write_recipe(tmp_path, checkpoint, train={"learning_rte": 1e-5})
    line = 1 + recipe.read_text().splitlines().index("  learning_rte: 1.0e-05")
    assert refused(recipe) == f"{recipe}:{line}: train.learning_rte: unknown key; did you mean 'learning_rate'?"
    assert "no such recipe file" in refused(tmp_path / "none.yaml")


def test_malformed_line(tmp_path: Path, checkpoint: Path, refused: Refusal) -> None:
    recipe = write_recipe(tmp_path, checkpoint)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "fine"}, '{"text": '])
    assert refused(recipe).startswith(f"{rows}:2: not valid JSON: ")


def test_all_labels_masked(tmp_path: Path, checkpoint: Path, refused: Refusal) -> None:
    recipe = write_recipe(tmp_path, checkpoint)
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": CONVERSATIONS[0][:2]}])
    assert "every label is masked" in refused(recipe)


def test_longer_than_the_model_allows(tmp_path: Path, checkpoint: Path, refused: Refusal) -> None:
    error = refused(write_recipe(tmp_path, checkpoint), "data.max_length=1000")
    assert error.startswith("data.max_length=1000 is longer than the model allows: ")
    assert f"max_position_embeddings={MAX_POSITIONS}; set data.max_length to {MAX_POSITIONS} or less" in error


def test_output_folder_that_holds_a_model(tmp_path: Path, checkpoint: Path, copy: Path, refused: Refusal) -> None:
    recipe = write_recipe(tmp_path, checkpoint, train={"output_dir": str(copy)})
    assert "already holds a model; name another folder or pass --overwrite" in refused(recipe)
    assert "is where the model comes from" in refused(recipe, f"model.name_or_path={copy}", "--overwrite")
    assert "is a file" in refused(recipe, f"train.output_dir={recipe}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("folder", "no such folder: "),
        ("config.json", "holds no config.json"),
        ("model.safetensors", "holds a config.json but no weights"),
        ("tokenizer.json", "tokenizer"),
    ],
)
def test_missing_checkpoint_file(tmp_path: Path, copy: Path, refused: Refusal, damage: str, message: str) -> None:
    recipe = write_recipe(tmp_path, copy)
    if damage == "folder":
        shutil.rmtree(copy)
    else:
        (copy / damage).unlink()
    assert message in refused(recipe)


def test_damaged_checkpoint_file(tmp_path: Path, copy: Path, refused: Refusal) -> None:
    recipe = write_recipe(tmp_path, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert f"{weights} is damaged" in refused(recipe)
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert "lacks model-00001-of-00002.safetensors" in refused(recipe)
    (copy / "model.safetensors.index.json").write_text("{}")
    assert "index.json is damaged (it has no weight_map)" in refused(recipe)
    (copy / "config.json").write_text("{")
    assert str(copy) in refused(recipe)


def test_an_adapter_is_no_model(tmp_path: Path, copy: Path, refused: Refusal) -> None:
    (copy / "config.json").unlink()
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    merging = f"slipstream merge {copy} --into org/base --output MERGED"
    assert f"holds an adapter; put it into its base first ({merging})" in refused(write_recipe(tmp_path, copy))


def test_settings_that_do_not_fit(tmp_path: Path, checkpoint: Path, refused: Refusal) -> None:
    recipe = write_recipe(tmp_path, checkpoint)
    assert "ep_size=3 does not divide 4 experts" in refused(recipe, "distributed.ep_size=3")
    assert "BackendConfig(experts='magic'): use one of" in refused(recipe, "model.backend.experts=magic")
    assert "train.optim: no optimizer 'sdg'; did you mean 'sgd'?" in refused(recipe, "train.optim=sdg")
    assert "no such data file" in refused(recipe, "data.train=nowhere.jsonl")
    assert "NOWHERE" in refused(recipe, "lora.target_modules=[NOWHERE]")
    experts = "lora.target_parameters=all-experts"
    assert "lora.lora_dropout=0.1: PEFT has it for linear layers only" in refused(
        recipe, experts, "lora.lora_dropout=0.1"
    )
    dense = ["model.name_or_path=null", "model.config=llama-3.2-1b", "model.tokenizer=bytes"]
    assert "LlamaConfig describes a dense model; leave it out" in refused(recipe, experts, *dense)


@pytest.mark.parametrize(
    ("setting", "beside", "message"),
    [
        ("target_parameters=[experts.gate_up_prj]", "target_modules=[q_proj]", "no parameter of Qwen3MoeForCausalLM "
         "has a name that ends with 'experts.gate_up_prj'; did you mean 'experts.gate_up_proj'?"),
        ("target_modules=[q_proj, k_prj]", "r=2", "no module of Qwen3MoeForCausalLM has a name that ends with 'k_prj'; "
         "did you mean 'k_proj'?"),
        ("target_modules=.*k_prj", "target_parameters=all-experts", "'.*k_prj', a regular expression, matches no "
         "module of Qwen3MoeForCausalLM"),
        ("modules_to_save=[nope]", "r=2", "no module of Qwen3MoeForCausalLM has a name that ends with 'nope'"),
    ],
)  # fmt: skip
def test_misspelt_targets(
    tmp_path: Path, checkpoint: Path, refused: Refusal, setting: str, beside: str, message: str
) -> None:
    key = setting.partition("=")[0]
    assert refused(write_recipe(tmp_path, checkpoint), f"lora.{setting}", f"lora.{beside}") == f"lora.{key}: {message}"


def test_names_that_experts_had_are_known(checkpoint: Path) -> None:
    """PEFT takes the names of a checkpoint's experts for those that Transformers has fused them under."""
    config = AutoConfig.from_pretrained(checkpoint)
    for lora in (
        LoraConfig(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"]),
        LoraConfig(target_modules="All-Linear", target_parameters=["all-experts"]),
        LoraConfig(target_modules=r".*\.(q|v)_proj", modules_to_save=["lm_head"]),
    ):
        assert check_names(lora, config) is None


@pytest.mark.parametrize("architecture", moe_architectures())
def test_names_that_recipes_give_for_any_model(architecture: str) -> None:
    """PEFT trains those that there are; a model that has none of them needs others."""
    config = tiny_config(architecture)
    check_names(LoraConfig(target_modules="all-linear"), config)
    usual = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    names = {name.split(".")[-1] for name, _ in meta_model(config).named_modules()}
    if not names & set(usual):
        with pytest.raises(ValueError, match="has a name that ends with"):
            check_names(LoraConfig(target_modules=usual), config)
        return
    note = check_names(LoraConfig(target_modules=usual), config)
    assert all(f" {name}" in (note or "") for name in ("q_proj", "o_proj") if name not in names)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lr_scheduler_kwargs={foo: 1}"], "cosine has no 'foo'; it takes num_cycles"),
        (["lr_scheduler_kwargs={num_cycles: x}"], "cosine refuses {'num_cycles': 'x'}: could not convert"),
        (["lr_scheduler_kwargs={a: 1}", "lr_scheduler_type=constant"], "constant has no 'a'; it takes none"),
        (["lr_scheduler_type=warmup_stable_decay"], "warmup_stable_decay needs num_decay_steps"),
        (["lr_scheduler_type=cosine_with_min_lr"], "cosine_with_min_lr refuses {}: One of min_lr or min_lr_rate"),
    ],
)
def test_schedules(tmp_path: Path, checkpoint: Path, refused: Refusal, overrides: list[str], message: str) -> None:
    error = refused(write_recipe(tmp_path, checkpoint), *(f"train.{override}" for override in overrides))
    assert error.startswith(f"train.lr_scheduler_kwargs: {message}")


def test_what_this_machine_lacks(
    tmp_path: Path, checkpoint: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before rows are read."""
    monkeypatch.setattr("slipstream.train.run.load_data", None)
    recipe = write_recipe(tmp_path, checkpoint)
    assert refused(recipe, "log.report_to=magic").startswith("log.report_to: magic: magic is not supported, only ")
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    assert "log.report_to: wandb: WandbCallback requires wandb" in refused(recipe, "log.report_to=[wandb]")
    below = f"train.output_dir={recipe}/out"
    assert refused(recipe, below) == f"train.output_dir: nothing can be written to {recipe}/out (Not a directory)"
    assert "nothing can be written to /proc/foo" in refused(recipe, "train.output_dir=/proc/foo")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    error = refused(recipe, "distributed.tp_size=2")
    assert error.startswith("distributed: tp_size=2 needs GPUs, as Accelerate has no tensor parallelism on a CPU")


def test_dry_run_shows_everything_and_writes_nothing(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, checkpoint)
    with pytest.raises(SystemExit) as caught:
        main(["finetune", str(recipe), "lr=1e-3", "train.max_steps=3", "--dry-run"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "note: command line: lr is read as train.learning_rate" in printed
    shown = yaml.safe_load(printed[printed.index("model:\n") : printed.index("\nmodel: ")])
    assert (shown["train"]["learning_rate"], shown["data"]["max_length"]) == (1e-3, MAX_POSITIONS)
    assert "times.<|im_end|>\n⟧" in printed
    assert not (tmp_path / "out").exists()
