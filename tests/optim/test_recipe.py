"""`train.optim` of a recipe, and a run with our optimizer that is stopped and started again."""

import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slipstream.optim import AdamW
from slipstream.train.recipe_file import load_recipe
from slipstream.train.resume import StoppedBySignal
from slipstream.train.run import run
from slipstream.train.trainer import SlipstreamTrainer
from tests.train.tiny_chat import make_checkpoint, make_tokenizer, write_recipe

TRAIN = {"max_steps": 6, "per_device_train_batch_size": 4, "weight_decay": 0.1, "seed": 3, "learning_rate": 1e-3}


def fine_tune(folder: Path, checkpoint: Path, optim: str) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    model = {"name_or_path": str(checkpoint), "dtype": "bfloat16"}
    recipe, _ = load_recipe(write_recipe(folder, checkpoint, model=model, train={**TRAIN, "optim": optim}), ())
    run(recipe, file=io.StringIO())
    return load_file(folder / "out" / "model.safetensors")


@pytest.mark.parametrize(
    ("optim", "rounding"),
    [("slipstream_adamw", "stochastic"), pytest.param("slipstream_adamw_master", "master", marks=pytest.mark.slow)],
)
def test_a_stopped_run_continues_bit_for_bit(
    optim: str, rounding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", make_tokenizer())
    whole = fine_tune(tmp_path / "whole", checkpoint, optim)
    seen = []
    original = SlipstreamTrainer.training_step

    def training_step(trainer: SlipstreamTrainer, *args: Any, **kwargs: Any) -> Any:
        seen.append(trainer._bare_optimizer())
        if trainer.state.global_step == 2 and len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(SlipstreamTrainer, "training_step", training_step)
    with pytest.raises(StoppedBySignal):
        fine_tune(tmp_path / "parts", checkpoint, optim)
    parts = fine_tune(tmp_path / "parts", checkpoint, optim)
    assert len(seen) == TRAIN["max_steps"]
    for optimizer in seen:
        assert type(optimizer) is AdamW
        group = optimizer.param_groups[0]
        assert (group["rounding"], group["seed"], group["weight_decay"]) == (rounding, 3, 0.1)
    assert parts.keys() == whole.keys()
    before = load_file(checkpoint / "model.safetensors")
    for name, tensor in whole.items():
        assert torch.equal(parts[name], tensor), name
    assert any(not torch.equal(tensor, before[name].to(tensor.dtype)) for name, tensor in whole.items())
