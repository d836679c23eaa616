"""Checkpoints of several ranks: the same layout continues bit for bit, another one within rounding, and a run that
loses a rank goes on by itself."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast

import slipstream
from slipstream.checkpoint.resume import Checkpointer, latest, load
from slipstream.train.recipe_file import load_recipe
from slipstream.train.run import run
from tests.distributed.harness import run_ranks
from tests.tiny_models import tiny_batch, tiny_model
from tests.train.ranks import finetune_on_ranks
from tests.train.tiny_chat import make_checkpoint, make_tokenizer, write_recipe

pytestmark = pytest.mark.long

STEPS = 6
SAVED_AT = 3


def _train(
    path: Path, setup: dict[str, Any], folder: Path, resume: bool
) -> tuple[list[float], dict[str, Any], dict[str, torch.Tensor]]:
    """Losses of a plain loop over the same four rows, however many ranks share them, and its final weights."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    kwargs = {"distributed_setup": setup} if ranks > 1 else {}
    model = slipstream.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kwargs).train()
    model.model.norm.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    checkpointer = Checkpointer(folder)
    first = 0
    found = None
    if resume:
        newest = latest(folder)
        assert newest is not None
        found = load(newest, model, optimizer, scheduler)
        found.restore_rng()
        first = found.step
    losses, noise = [], []
    for step in range(first, STEPS):
        rows = tiny_batch(4, 24, seed=step)[rank * 4 // ranks : (rank + 1) * 4 // ranks]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        slipstream.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        mean = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / ranks)
        noise.append(torch.rand(()).item() + rank)
        if step + 1 == SAVED_AT and not resume:
            checkpointer.save(step + 1, model, optimizer, scheduler, info={"a": [1]}, rank_info={"rank": rank})
    checkpointer.close()
    if found is not None:
        assert found.info == {"a": [1]}
        assert [info["rank"] for info in found.rank_infos] == ([rank] if found.same_ranks else [0, 1, 2, 3])
    weights = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    extra = {"noise": noise, "meshes": len({p.device_mesh for p in model.parameters() if isinstance(p, DTensor)})}
    return losses, extra, {name: weight.detach() for name, weight in weights.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, the checkpoints of four ranks with `ep_size` 4, and what they came to without a stop."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_model("qwen3_moe").save_pretrained(folder / "model")
    whole = run_ranks(_train, 4, folder / "model", {"ep_size": 4}, folder / "checkpoints", False)
    return folder, whole


def test_same_layout_continues_bit_for_bit(trained: Any) -> None:
    folder, whole = trained
    parts = run_ranks(_train, 4, folder / "model", {"ep_size": 4}, folder / "checkpoints", True)
    for (losses, extra, weights), (expected, expected_extra, expected_weights) in zip(parts, whole, strict=True):
        assert losses == expected[SAVED_AT:]
        assert extra["noise"] == expected_extra["noise"][SAVED_AT:]
        assert all(torch.equal(weight, expected_weights[name]) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("ranks", "setup"),
    [(4, {"ep_size": 2}), (4, {"ep_size": 2, "dp_replicate": 2}), (2, {"ep_size": 2}), (1, {})],
)
def test_another_layout_continues(trained: Any, ranks: int, setup: dict[str, Any]) -> None:
    folder, whole = trained
    if ranks == 1:
        parts = [_train(folder / "model", setup, folder / "checkpoints", True)]
    else:
        parts = run_ranks(_train, ranks, folder / "model", setup, folder / "checkpoints", True)
    for losses, _, weights in parts:
        assert losses == pytest.approx(whole[0][0][SAVED_AT:], rel=1e-5)
        for name, weight in weights.items():
            assert torch.allclose(weight, whole[0][2][name], atol=2e-4), name


def test_mixed_meshes_are_covered(tmp_path: Path) -> None:
    """Experts on their own (efsdp, ep) mesh: saved there, continued there."""
    tiny_model("gpt_oss").save_pretrained(tmp_path / "model")
    arguments = (tmp_path / "model", {"ep_size": 2}, tmp_path / "checkpoints")
    whole = run_ranks(_train, 4, *arguments, False)
    parts = run_ranks(_train, 4, *arguments, True)
    assert whole[0][1]["meshes"] == 2
    assert parts[0][0] == whole[0][0][SAVED_AT:]
    assert all(torch.equal(weight, whole[0][2][name]) for name, weight in parts[0][2].items())


def _refusals(path: Path, folder: Path) -> list[str]:
    """What each rank hears when one rank finds a checkpoint damaged, and when it is of another model."""
    model = slipstream.AutoModelForCausalLM.from_pretrained(path, distributed_setup={"ep_size": 2})
    optimizer = torch.optim.AdamW(model.parameters())
    elsewhere = folder if dist.get_rank() == 0 else folder / "not-shared"
    messages = []
    for place in (elsewhere / "step-000003", folder / "step-000003"):
        with pytest.raises(ValueError, match="start anew") as refused:
            load(place, model, optimizer)
        assert not optimizer.state
        messages.append(str(refused.value))
    return messages


def test_ranks_refuse_together(trained: Any, tmp_path: Path) -> None:
    folder, _ = trained
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    first, second = run_ranks(_refusals, 2, tmp_path / "model", folder / "checkpoints")
    assert first == second
    assert "not-shared/step-000003 is no complete checkpoint" in first[0]
    assert "is of another model or optimizer" in first[1]


# The command under torchrun, with a rank to which something happens in the middle of a step, at the first start only.
SCRIPT = """
import os, signal
from slipstream.cli import main
from slipstream.train.trainer import SlipstreamTrainer

original = SlipstreamTrainer.training_step

def training_step(self, *args, **kwargs):
    loss = original(self, *args, **kwargs)
    rank, step, what = os.environ["FAULT"].split()
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if first and self.args.process_index == int(rank) and self.state.global_step == int(step) - 1:
        if what == "raise":
            raise MemoryError("no memory left on this rank")
        os.kill(os.getpid(), int(what))
    return loss

SlipstreamTrainer.training_step = training_step
main()
"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", tokenizer)


def recipe_of_two(folder: Path, checkpoint: Path) -> Path:
    """8 steps of 4 rows on two ranks that share the experts."""
    train = {"num_train_epochs": 2, "per_device_train_batch_size": 2}
    return write_recipe(folder, checkpoint, train=train, distributed={"ep_size": 2})


def torchrun(
    folder: Path, checkpoint: Path, *overrides: str, fault: str, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """`fault` is "rank step signal"."""
    recipe = recipe_of_two(folder, checkpoint)
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
               f"--max-restarts={restarts}", "--monitor-interval=0.1"]  # fmt: skip
    command += [str(folder / "script.py"), "finetune", str(recipe), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": fault, "HF_HUB_OFFLINE": "1"}
    # Without it a restarted rank may read the addresses of the ranks before it (pytorch#135712), and hang.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends its ranks; killed, it would leave them behind
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def curve(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "tokens", "eval_loss")
    return [{key: line[key] for key in kept if key in line} for line in lines if "train_runtime" not in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert all(outcome.error is None for outcome in finetune_on_ranks(recipe_of_two(folder, checkpoint)))
    assert len(curve(folder)) == 10
    return folder


def test_killed_rank_and_restart(whole: Path, tmp_path: Path, checkpoint: Path) -> None:
    fault = f"1 6 {signal.SIGKILL.value}"
    done = torchrun(tmp_path, checkpoint, "checkpoint.save_steps=2", fault=fault, restarts=1)
    assert done.returncode == 0, done.stderr
    assert "continues from: " in done.stdout
    assert curve(tmp_path) == curve(whole)


def test_signal_to_one_rank(whole: Path, tmp_path: Path, checkpoint: Path) -> None:
    """Both stop at the same step; two ranks continue exactly, one within rounding."""
    done = torchrun(tmp_path, checkpoint, fault=f"1 5 {signal.SIGTERM.value}")
    assert done.returncode != 0
    assert "stopped by SIGTERM after step 5" in done.stdout
    assert "exitcode  : 75" in done.stderr
    folder = tmp_path / "out" / "checkpoints"
    assert latest(folder) == folder / "step-000005"
    shutil.copytree(tmp_path / "out", tmp_path / "one" / "out")
    assert all(outcome.error is None for outcome in finetune_on_ranks(tmp_path / "recipe.yaml"))
    assert curve(tmp_path) == curve(whole)
    assert not folder.exists()
    recipe, _ = load_recipe(
        tmp_path / "recipe.yaml", [f"train.output_dir={tmp_path / 'one' / 'out'}", "distributed={}"]
    )
    screen = io.StringIO()
    assert run(recipe, file=screen) is not None
    assert "gradient_accumulation_steps is 2 instead of 1, so that a step keeps its 4 rows" in screen.getvalue()
    for got, expected in zip(curve(tmp_path / "one"), curve(whole), strict=True):
        assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_first_error_is_told(tmp_path: Path, checkpoint: Path) -> None:
    done = torchrun(tmp_path, checkpoint, fault="1 3 raise")
    assert done.returncode != 0
    assert "Root Cause" in done.stderr, done.stderr
    assert "MemoryError: no memory left on this rank" in done.stderr[done.stderr.index("Root Cause") :]
