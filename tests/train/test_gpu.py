"""What only a GPU shows: that counting and the batch size found hold there."""

import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import slipstream
from slipstream.compilation import compile_layers
from slipstream.cuda_graphs import GraphedStep
from slipstream.moe.load import ExpertLoad
from slipstream.train.late import Clock, Later
from slipstream.train.recipe_file import load_recipe
from slipstream.train.run import run
from tests.tiny_models import tiny_batch, tiny_model
from tests.train.tiny_chat import write_recipe

pytestmark = pytest.mark.gpu


def test_compiled_layers_count_what_uncompiled_ones_do() -> None:
    """Through Inductor and Triton, padding left out; the host waits for nothing."""
    device = torch.device("cuda")
    model = slipstream.accelerate(tiny_model("qwen3_moe", None).to(device), backend={"compile": "none"})
    model.config.use_cache = False
    load = ExpertLoad(model, device)
    ids = tiny_batch(4, 64).to(device)
    mask = torch.ones_like(ids)
    mask[:, 50:] = 0

    def count() -> torch.Tensor:
        load.see(mask)
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        return load.take()

    plain = count()
    compile_layers(model)
    count()
    torch.cuda.set_sync_debug_mode("error")
    try:
        load.see(mask)
        experts = next(module for module in model.modules() if hasattr(module, "has_gate"))
        for hook in experts._forward_pre_hooks.values():
            hook(experts, (None, torch.zeros(ids.numel(), 2, dtype=torch.int64, device=device), None))
        load.take()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    compiled = count()
    assert compiled.sum(dim=1).unique().tolist() == [4 * 50 * 2]
    # In another order of adding up, a token or two may go elsewhere.
    assert (compiled - plain).abs().sum() <= 0.02 * plain.sum()


def test_the_clock_tells_when_the_device_was_done() -> None:
    """Not when the host looked, which is later, nor when it asked, which is earlier."""
    device = torch.device("cuda")
    torch.cuda.synchronize()
    begun = time.perf_counter()
    clock = Clock(device)
    work = torch.randn(8192, 8192, device=device)
    later = []
    for _ in range(2):
        for _ in range(20):
            work = work @ work / 100
        later.append(Later(work[0, :2]))
    asked = time.perf_counter()
    torch.cuda.synchronize()
    done = time.perf_counter()
    time.sleep(0.3)
    assert all(len(numbers.read()) == 2 for numbers in later)
    first, second = (clock.time_of(numbers) for numbers in later)
    assert begun < first < second < done + 0.05
    assert second > asked


def test_batch_size_that_fits(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With memory for some rows only: fewer than asked for, and training stays below the limit."""
    from slipstream.train import batch_size

    limits: list[int] = []

    def small(device: torch.device) -> int:
        limits.append(torch.cuda.memory_allocated(device) + 40 * 2**20)
        return limits[-1]

    # cuBLAS's workspaces, one for each direction, come with the first GEMMs of a process; not out of the 40 MiB.
    warm = torch.ones(16, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    (warm @ warm).sum().backward()
    monkeypatch.setattr(batch_size, "memory_limit", small)
    train = {"per_device_train_batch_size": "auto", "global_batch_size": 256, "max_steps": 3}
    screen = io.StringIO()
    # Compilation tries kernels out in 60 MiB of its own.
    model = {"backend": {"compile": "none"}}
    recipe, _ = load_recipe(write_recipe(tmp_path, checkpoint, train=train, model=model))
    torch.cuda.reset_peak_memory_stats()
    run(recipe, file=screen)
    found = re.search(r"micro-batch: (\d+) rows a device, (\d+) for each step", screen.getvalue())
    assert found is not None
    rows, steps = map(int, found.groups())
    assert rows * steps == 256
    assert 2 <= rows < 256
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert len(trained) == 3
    assert all(line["memory_gib"] * 2**30 <= limits[0] for line in trained)


@pytest.mark.parametrize("lora", [None, {"r": 4, "target_parameters": "all-experts"}], ids=["full", "lora"])
def test_a_recipe_with_cuda_graphs_trains_as_without(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any] | None
) -> None:
    """Packed rows with two micro-batches a step, held-out loss in between, a last step of one micro-batch."""
    captured = []
    record = GraphedStep._recorded

    def recorded(self: GraphedStep, *args: Any) -> Any:
        captured.append(self)
        return record(self, *args)

    monkeypatch.setattr(GraphedStep, "_recorded", recorded)
    losses = []
    for graphs in (False, True):
        folder = tmp_path / str(graphs)
        folder.mkdir()
        train = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "num_train_epochs": 4,
                 "cuda_graphs": graphs, "learning_rate": 1e-3, "z_loss": 1e-4}  # fmt: skip
        sections = {"train": train, "data": {"packing": True, "max_length": 128}, "eval": {"eval_steps": 5}}
        recipe, _ = load_recipe(write_recipe(folder, checkpoint, **sections, **({"lora": lora} if lora else {})))
        run(recipe, file=io.StringIO())
        lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
        losses.append([line.get("loss", line.get("eval_loss")) for line in lines if {"loss", "eval_loss"} & set(line)])
    assert len(captured) == 2  # the first micro-batch of a step, and the second
    assert len(losses[0]) > 10
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
