"""Runs that train adapters on experts that two ranks share: continued, through the recipe, through TRL."""

import io
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import slipstream
from slipstream.adapters import all_experts
from slipstream.checkpoint.resume import Checkpointer, latest, load
from slipstream.train.recipe_file import load_recipe
from slipstream.train.run import run
from tests.distributed.harness import run_ranks
from tests.distributed.test_adapters import adapt
from tests.distributed.test_trainer import curve as trainer_curve
from tests.tiny_models import tiny_batch, tiny_model
from tests.train.tiny_chat import make_checkpoint, make_tokenizer, write_recipe

STEPS, SAVED_AT = 4, 2


def loop(base: Path, folder: Path, resume: bool) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Losses of a plain loop over the same rows, however many ranks share them, its adapters, and how many entries a
    checkpoint has."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    kwargs = {"distributed_setup": {"ep_size": 2}} if ranks > 1 else {}
    torch.manual_seed(0)
    model = adapt(slipstream.AutoModelForCausalLM.from_pretrained(base, **kwargs).train())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    checkpointer = Checkpointer(folder)
    first = 0
    if resume:
        newest = latest(folder)
        assert newest is not None
        first = load(newest, model, optimizer).step
    losses = []
    for step in range(first, STEPS):
        rows = tiny_batch(4, 16, seed=step)[rank * 4 // ranks : (rank + 1) * 4 // ranks]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        slipstream.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / ranks)
        if step + 1 == SAVED_AT and not resume:
            checkpointer.save(step + 1, model, optimizer)
    checkpointer.close()
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in trained.items()}
    return losses, {name: tensor.detach() for name, tensor in whole.items()}, len(trained)


def test_continued_on_as_many_ranks_and_on_others(tmp_path: Path) -> None:
    """On 2 ranks factors lie with their experts; on 4, where two hold each expert, all have a part of every factor."""
    tiny_model("qwen3_moe", None).save_pretrained(tmp_path / "model")
    arguments = (tmp_path / "model", tmp_path / "checkpoints")
    losses, weights, _ = run_ranks(loop, 2, *arguments, False)[0]
    again, same, _ = run_ranks(loop, 2, *arguments, True)[0]
    assert again == losses[SAVED_AT:]
    assert all(torch.equal(same[name], weight) for name, weight in weights.items())
    for others, close, _ in (loop(*arguments, True), run_ranks(loop, 4, *arguments, True)[0]):
        assert others == pytest.approx(again, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(close[name], weight, rtol=1e-3, atol=2e-4)


def spread(folder: str, output: str) -> list[float]:
    model = slipstream.AutoModelForCausalLM.from_pretrained(folder, distributed_setup={"ep_size": 2})
    torch.manual_seed(0)
    return trainer_curve(adapt(model), "sft", output, dist.get_world_size())


def test_trl_gives_the_curve_of_plain_peft(tmp_path: Path) -> None:
    tiny_model("qwen3_moe", None).save_pretrained(tmp_path / "model")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    expected = trainer_curve(adapt(plain), "sft", str(tmp_path / "one"), 1)
    got = run_ranks(spread, 2, str(tmp_path / "model"), str(tmp_path / "many"), timeout=120)[0]
    assert got == pytest.approx(expected, rel=1e-3)


def recipe_run(path: Path, overrides: list[str]) -> None:
    recipe, _ = load_recipe(path, overrides)
    assert run(recipe, file=io.StringIO()) is not None


def metrics(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines for key in ("loss", "grad_norm", "eval_loss") if key in line]


@pytest.mark.parametrize("shared", [False, True])
def test_the_recipe_on_two_ranks_writes_one_adapter(tmp_path: Path, shared: bool) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny", make_tokenizer())
    lora = {"r": 4, "target_modules": ["q_proj"], "target_parameters": "all-experts", "use_rslora": True}
    lora["share_experts"] = shared
    path = write_recipe(tmp_path, checkpoint, lora=lora, train={"max_steps": 3, "learning_rate": 0.02})
    recipe_run(path, [])
    two = ["distributed.ep_size=2", "train.per_device_train_batch_size=2", f"train.output_dir={tmp_path / 'two'}"]
    run_ranks(recipe_run, 2, path, two, timeout=120)
    assert metrics(tmp_path / "two") == pytest.approx(metrics(tmp_path / "out"), rel=1e-3)
    logits, ids = [], tiny_batch(2, 12)
    for folder in ("out", "two"):
        base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
        assert sorted(LoraConfig.from_pretrained(tmp_path / folder).target_parameters) == all_experts(base)
        with torch.no_grad():
            before = base(ids).logits
            logits.append(PeftModel.from_pretrained(base, tmp_path / folder)(ids).logits)
        assert (logits[-1] - before).abs().max() > 1e-2
        tensors = load_file(tmp_path / folder / "adapter_model.safetensors")
        (factors,) = (tensor for name, tensor in tensors.items() if "layers.0.mlp.experts.lora_A" in name)
        of_experts = factors.view(-1, 4, factors.shape[1])
        assert torch.equal(of_experts, of_experts[:1].expand_as(of_experts)) == shared
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in (tmp_path / "two").iterdir()}
