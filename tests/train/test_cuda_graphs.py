"""A recipe with CUDA graphs, with a stand-in for the graph; the real ones are in test_gpu.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.train import trainer
from tests.test_cuda_graphs import Graphed
from tests.train.tiny_chat import fine_tune

TRAIN = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "num_train_epochs": 3, "z_loss": 1e-4}
DATA = {"packing": True, "max_length": 128}


def losses(folder: Path, checkpoint: Path, graphs: bool) -> list[float]:
    changes: dict[str, dict[str, Any]] = {"data": DATA, "eval": {"eval_steps": 4}}
    fine_tune(folder, checkpoint, train={**TRAIN, "cuda_graphs": graphs}, **changes)
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("eval_loss")) for line in lines if {"loss", "eval_loss"} & set(line)]


def test_a_recipe_trains_as_without(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(Graphed):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(trainer, "GraphedStep", Counted)
    plain = losses(tmp_path / "plain", checkpoint, graphs=False)
    assert not made
    graphed = losses(tmp_path / "graphs", checkpoint, graphs=True)
    assert len(plain) > 10
    assert graphed == pytest.approx(plain, rel=1e-5)
    assert made[0].replays() > 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_trains(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.warns(UserWarning, match="without CUDA graphs: there is no GPU"):
        assert losses(tmp_path, checkpoint, graphs=True)
