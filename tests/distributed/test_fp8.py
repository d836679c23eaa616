"""FP8 under FSDP2: weights are gathered in 16 bits, and rounded by each rank."""

import pytest
import torch
import torch.distributed as dist

from slipstream import AutoModelForCausalLM, fp8
from tests.distributed.harness import run_ranks
from tests.tiny_models import sgd_losses, tiny_batch, tiny_config


def _train(reshard: bool | None) -> list[float]:
    fp8.obstacle = lambda device: None
    torch.manual_seed(0)
    setup = {"reshard_after_forward": reshard} if dist.is_initialized() else None
    model = AutoModelForCausalLM.from_config(
        tiny_config("qwen3_moe", num_hidden_layers=2), dtype=torch.bfloat16,
        backend={"experts": "fp8", "linear": "fp8"}, distributed_setup=setup,
    )  # fmt: skip
    return sgd_losses(model, [tiny_batch(seed=seed) for seed in (2, 2, 3)])


def test_ranks_train_as_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "obstacle", fp8.obstacle)  # restored after the run in this process
    expected = _train(None)
    for reshard in (True, False):
        for losses in run_ranks(_train, 2, reshard):
            assert losses == pytest.approx(expected, rel=5e-3)
