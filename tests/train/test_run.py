"""Whole runs on a tiny Mixture-of-Experts: what is learned, what is written, and that it is right."""

import io
import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from slipstream.checkpoint.merge import merge
from slipstream.checkpoint.output import publish
from slipstream.deferred_logits import DeferredLogits
from slipstream.train.arguments import Arguments
from slipstream.train.formats import IGNORE
from slipstream.train.recipe_file import load_recipe
from slipstream.train.run import RunResult, prepare, run
from slipstream.train.trainer import SlipstreamTrainer
from tests.train.ranks import finetune_on_ranks
from tests.train.tiny_chat import write_recipe


def fine_tune(folder: Path, checkpoint: Path, overwrite: bool = False, **changes: dict[str, Any]) -> RunResult:
    folder.mkdir(exist_ok=True)
    recipe, _ = load_recipe(write_recipe(folder, checkpoint, **changes))
    result = run(recipe, overwrite=overwrite, file=io.StringIO())
    assert result is not None
    return result


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


def plain_loss(checkpoint: Path, rows: Any, aux: float = 0.0) -> float:
    """Cross-entropy a trained token, with plain Transformers, row by row; plus `aux` × the load-balancing loss."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    total = count = 0.0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(ids).logits[0]
        total += F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE, reduction="sum").item()
        count += (labels[1:] != IGNORE).sum().item()
    if aux:
        ids = torch.tensor([row["input_ids"] for row in rows])
        with torch.no_grad():
            total += aux * model(ids, output_router_logits=True).aux_loss.item() * count
    return total / count


@pytest.fixture(scope="module")
def epoch(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> tuple[Path, RunResult]:
    """One epoch, with a held-out loss every other step and a sample prompt; the logits must not be touched."""
    folder = tmp_path_factory.mktemp("epoch")
    changes = {"train": {"eval_steps": 2}, "eval": {"sample_prompt": "What comes after one?", "max_new_tokens": 4}}
    recipe, _ = load_recipe(write_recipe(folder, checkpoint, **changes))
    with (folder / "screen").open("w") as screen:
        result = run(recipe, file=screen)
    assert result is not None
    return folder, result


def test_an_epoch_learns_and_says_so(epoch: tuple[Path, RunResult]) -> None:
    folder, result = epoch
    assert result.steps == 4
    assert result.eval_loss_before is not None
    assert result.eval_loss_after is not None
    assert result.eval_loss_after < result.eval_loss_before - 0.3
    assert result.tokens_per_second > 0
    assert result.answer_before is not None
    logged = metrics(folder)
    steps = [line for line in logged if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    for line in steps:
        assert {"learning_rate", "grad_norm", "tokens_per_second", "elapsed"} <= set(line)
    assert [line["step"] for line in logged if "eval_loss" in line] == [0, 2, 4]
    rows = prepare(load_recipe(folder / "recipe.yaml")[0], overwrite=True).data.train
    assert steps[-1]["tokens"] == sum(len(row["input_ids"]) for row in rows)  # no padding
    screen = (folder / "screen").read_text()
    assert "step 3/4  loss " in screen
    assert f"step 4/4  held-out loss {result.eval_loss_after:.4f}" in screen
    assert screen.count("answer: ") == 3  # at each evaluation


def test_saved_model_is_transformers_own(epoch: tuple[Path, RunResult], checkpoint: Path) -> None:
    folder, result = epoch
    out = result.output_dir
    assert (out / "config.json").read_text() == (checkpoint / "config.json").read_text()
    before, after = load_file(checkpoint / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
    assert all(not torch.equal(before[name], after[name]) for name in before)  # every weight, each expert too
    held_out = prepare(load_recipe(folder / "recipe.yaml")[0], overwrite=True).data.eval
    # Batches of unequal length were averaged by token, not by batch.
    assert plain_loss(checkpoint, held_out) == pytest.approx(result.eval_loss_before, rel=1e-5)
    assert plain_loss(out, held_out) == pytest.approx(result.eval_loss_after, rel=1e-5)
    text = AutoTokenizer.from_pretrained(out).apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert text == "<|im_start|>user\na<|im_end|>\n"
    assert not {".incomplete", "training_args.bin"} & {path.name for path in out.iterdir()}


def test_resolved_recipe_repeats_the_run_exactly(
    epoch: tuple[Path, RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = epoch
    monkeypatch.setattr(DeferredLogits, "materialize", lambda self: pytest.fail("the logits were built"))
    overrides = [f"train.output_dir={tmp_path / 'out'}", "eval.sample_prompt=null"]
    recipe, _ = load_recipe(result.output_dir / "recipe.resolved.yaml", overrides)
    again = run(recipe, file=io.StringIO())
    assert again is not None
    assert losses(tmp_path) == losses(folder)
    assert again.eval_loss_after == result.eval_loss_after


def test_accumulation_changes_nothing(epoch: tuple[Path, RunResult], tmp_path: Path, checkpoint: Path) -> None:
    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 3}
    fine_tune(tmp_path, checkpoint, train={**changes, "lr_scheduler_type": "constant"})
    whole = tmp_path / "whole"
    fine_tune(whole, checkpoint, train={"max_steps": 3, "lr_scheduler_type": "constant"})
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize("warmup", [0.03, 1])
def test_an_epoch_of_one_step_learns(warmup: float, tmp_path: Path, checkpoint: Path) -> None:
    train = {"per_device_train_batch_size": 16, "warmup_steps": warmup}
    result = fine_tune(tmp_path, checkpoint, train=train)
    assert result.steps == 1
    assert [line["learning_rate"] for line in metrics(tmp_path) if "loss" in line] == [0.01]
    assert (result.eval_loss_after or 9) < (result.eval_loss_before or 0)


def test_warm_up_in_steps(tmp_path: Path) -> None:
    steps = [(0.03, 33), (0.03, 34), (0.03, 100), (0.03, 101), (10.0, 5), (10.0, 1), (0.0, 100)]
    made = [Arguments(tmp_path, warmup_steps=warmup, use_cpu=True).get_warmup_steps(n) for warmup, n in steps]
    assert made == [0, 2, 3, 4, 10, 0, 0]


def test_load_balancing_loss_is_trained_on_but_not_held_out(tmp_path: Path, checkpoint: Path) -> None:
    train = {"router_aux_loss_coef": 0.5, "per_device_train_batch_size": 16, "max_steps": 1}
    result = fine_tune(tmp_path, checkpoint, data={"eval": str(tmp_path / "rows.jsonl")}, train=train)
    recipe, _ = load_recipe(tmp_path / "recipe.yaml")
    data = prepare(recipe, overwrite=True).data
    assert plain_loss(checkpoint, data.eval) == pytest.approx(result.eval_loss_before, rel=1e-5)
    assert losses(tmp_path)[0] > result.eval_loss_before + 0.5  # top-2 of 4 experts: the term is 2 when balanced
    config = json.loads((result.output_dir / "config.json").read_text())
    assert config == json.loads((checkpoint / "config.json").read_text())


def test_z_loss_is_trained_on_but_not_held_out(tmp_path: Path, checkpoint: Path) -> None:
    train = {"z_loss": 0.1, "per_device_train_batch_size": 16, "max_steps": 1}
    result = fine_tune(tmp_path, checkpoint, data={"eval": str(tmp_path / "rows.jsonl")}, train=train)
    data = prepare(load_recipe(tmp_path / "recipe.yaml")[0], overwrite=True).data
    assert result.eval_loss_before == pytest.approx(plain_loss(checkpoint, data.eval), rel=1e-5)
    # A new model's logits are close to 0, so their logsumexp is that of the vocabulary's size.
    size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    added = losses(tmp_path)[0] - plain_loss(checkpoint, data.train)
    assert added == pytest.approx(0.1 * math.log(size) ** 2, rel=0.05)


def test_z_loss_needs_the_fused_loss(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.z_loss=0\.1: only the fused loss"):
        fine_tune(tmp_path, checkpoint, model={"backend": {"loss": "transformers"}}, train={"z_loss": 0.1})
    assert not (tmp_path / "out").exists()


def test_two_ranks_train_like_one(epoch: tuple[Path, RunResult], tmp_path: Path, checkpoint: Path) -> None:
    """Half the rows on each rank, sharded by FSDP2: the same curve. Held-out loss first must not freeze a weight."""
    path = write_recipe(tmp_path, checkpoint, train={"eval_steps": 2, "per_device_train_batch_size": 2})
    first, second = finetune_on_ranks(path)
    assert first.error is second.error is None
    assert losses(tmp_path) == pytest.approx(losses(epoch[0]), rel=1e-4)
    assert (first.screen + second.screen).count("saved: ") == 1


def test_lora_trains_an_adapter_only(tmp_path: Path, checkpoint: Path) -> None:
    result = fine_tune(tmp_path, checkpoint, lora={"r": 2}, train={"max_steps": 2, "activation_checkpointing": True})
    names = {path.name for path in result.output_dir.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not {"config.json", "model.safetensors"} & names
    recipe, _ = load_recipe(tmp_path / "recipe.yaml")
    assert prepare(recipe, overwrite=True).recipe.train.learning_rate == 0.01
    with pytest.raises(ValueError, match="already holds a model"):
        prepare(recipe, overwrite=False)


def test_qlora_from_recipe_to_merged_model(tmp_path: Path, checkpoint: Path) -> None:
    """The adapter is one for the whole base, into which `slipstream merge` puts it."""
    lora = {"r": 4, "target_modules": ["q_proj"], "target_parameters": "all-experts"}
    changes = {"train": {"learning_rate": 0.02}}
    (tmp_path / "4bit").mkdir()
    path = write_recipe(tmp_path / "4bit", checkpoint, lora=lora | {"load_in_4bit": True}, **changes)
    screen = io.StringIO()
    result = run(load_recipe(path)[0], file=screen)
    assert result is not None
    assert "experts in 4 bits)" in screen.getvalue()
    assert "experts included, whose own weights are stored in 4 bits" in screen.getvalue()
    curve = losses(tmp_path / "4bit")
    assert curve[-1] < curve[0]
    fine_tune(tmp_path / "whole", checkpoint, lora=lora, **changes)
    whole = losses(tmp_path / "whole")
    assert curve != whole
    assert curve == pytest.approx(whole, rel=0.1)
    names = [{file.name for file in (tmp_path / folder / "out").iterdir()} for folder in ("4bit", "whole")]
    assert names[0] == names[1]
    merged = merge(str(tmp_path / "4bit" / "out"), str(checkpoint), tmp_path / "merged", verify=True)
    assert merged is not None
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "merged"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before if ".experts." in name)


def test_qlora_is_refused_before_anything_is_written(tmp_path: Path, checkpoint: Path) -> None:
    changes: dict[str, Any] = {"lora": {"load_in_4bit": True}, "model": {"backend": {"experts": "transformers"}}}
    with pytest.raises(ValueError, match="load_in_4bit: experts='transformers' reads whole weights"):
        fine_tune(tmp_path, checkpoint, **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("distributed", "refused"), [({"ep_size": 2}, True), ({}, False)])
def test_modules_that_cannot_be_copied_are_refused(
    distributed: dict[str, Any], refused: bool, tmp_path: Path, checkpoint: Path
) -> None:
    lora = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    recipe, _ = load_recipe(write_recipe(tmp_path, checkpoint, lora=lora, distributed=distributed))
    message = r"lora\.modules_to_save=\['lm_head'\]: .* spread over ranks cannot be copied; give linear layers"
    with pytest.raises(ValueError, match=message) if refused else nullcontext():
        prepare(recipe, overwrite=False, dry_run=True)


def disk_full() -> None:
    raise OSError("disk full")


def test_overwrite_keeps_the_old_model_until_the_new_one_is_complete(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "metrics.jsonl"):
        (out / name).write_text("old")
    (out / "notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(SlipstreamTrainer, "save_model", lambda self, path: disk_full())
        with pytest.raises(OSError, match="disk full"):
            fine_tune(tmp_path, checkpoint, overwrite=True, train={"max_steps": 1})
    assert {path.read_text() for path in out.iterdir() if path.is_file()} == {"old", "mine"}
    fine_tune(tmp_path, checkpoint, overwrite=True, train={"max_steps": 1})
    assert (out / "notes.txt").read_text() == "mine"
    assert {path.name for path in out.glob("*.safetensors*")} == {"model.safetensors"}
    assert len(metrics(tmp_path)) > 1


def test_publish_moves_the_config_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".incomplete").mkdir()
    for name in ("a.txt", "config.json", "model.safetensors"):
        (tmp_path / ".incomplete" / name).write_text("new")
    moved: list[str] = []
    original = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: (moved.append(self.name), original(self, to))[1])
    publish(tmp_path)
    assert moved == ["a.txt", "model.safetensors", "config.json"]


@pytest.fixture
def damaged(tmp_path: Path, checkpoint: Path) -> Callable[[dict[str, torch.Tensor | None]], Path]:
    """A copy of the checkpoint in which some tensors are others, or missing."""

    def make(changes: dict[str, torch.Tensor | None]) -> Path:
        copy = Path(shutil.copytree(checkpoint, tmp_path / "damaged"))
        weights = load_file(copy / "model.safetensors") | changes
        kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
        save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return make


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("self_attn.q_proj.weight", None, r"lacks 1 of the model's weights \(model\.layers\.1\.self_attn\.q_proj"),
        ("mlp.experts.1.up_proj.weight", None, "lacks weights of some layers, or has them in other shapes"),
        ("self_attn.q_proj.weight", torch.zeros(3, 2), r"layers\.1\.self_attn\.q_proj\.weight is \[3, 2\] there"),
    ],
)
def test_incomplete_weights_are_refused(
    name: str, tensor: torch.Tensor | None, message: str, tmp_path: Path, damaged: Callable[[Any], Path]
) -> None:
    with pytest.raises(ValueError, match=message):
        fine_tune(tmp_path, damaged({f"model.layers.1.{name}": tensor}))
    assert not (tmp_path / "out").exists()
