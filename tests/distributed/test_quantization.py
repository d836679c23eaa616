"""Experts in 4 bits on two ranks that share them: each packs its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from slipstream import AutoModelForCausalLM, hf
from slipstream.moe.experts import projection_names
from slipstream.moe.packed import Placeholder, unpacked
from tests.distributed.harness import run_ranks
from tests.distributed.test_adapters import adapt, trained
from tests.distributed.test_training import compare
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function: a tiny checkpoint, and an adapter beside it."""
    root = tmp_path_factory.mktemp("models")

    def make(model_type: str) -> tuple[Path, Path]:
        base, adapter = root / model_type, root / f"{model_type}-adapter"
        model = tiny_model(model_type, None)
        model.save_pretrained(base)
        torch.manual_seed(3)
        adapt(model).save_pretrained(adapter)
        return base, adapter

    return make


def load(base: Path, adapter: Path, setup: dict[str, Any] | None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, distributed_setup=setup, load_in_4bit=True).train()
    return PeftModel.from_pretrained(model, adapter, is_trainable=True)


def worker(base: Path, adapter: Path, setup: dict[str, Any], out: Path) -> Any:
    model = load(base, adapter, setup)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for (_, experts), (_, known) in zip(
        hf.experts_modules(model), hf.experts_modules(AutoModelForCausalLM.from_pretrained(base, load_in_4bit=True)),
        strict=True,
    ):  # fmt: skip
        for name in projection_names(experts):
            assert isinstance(getattr(experts, name), Placeholder)
            assert getattr(experts, name).shape == getattr(known, name).shape
            assert torch.equal(unpacked(experts, name), unpacked(known, name).chunk(ranks)[rank])
    factors = [p for name, p in model.named_parameters() if p.requires_grad and ".experts." in name]
    assert factors
    assert all(isinstance(factor, DTensor) for factor in factors)
    result = trained(model, rank, ranks)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    model.save_pretrained(out)
    return result


@pytest.mark.parametrize(
    ("model_type", "setup"),
    [("qwen3_moe", {"ep_size": 2}), ("gpt_oss", {"ep_size": 2, "activation_checkpointing": "full"})],
)
def test_three_clipped_steps_and_the_saved_adapter(
    folders: Any, model_type: str, setup: dict[str, Any], tmp_path: Path
) -> None:
    base, adapter = folders(model_type)
    expected = trained(load(base, adapter, None))
    for result in run_ranks(worker, 2, base, adapter, setup, tmp_path / "saved"):
        compare(result, expected)
    plain = PeftModel.from_pretrained(tiny_model(model_type, "grouped_mm"), tmp_path / "saved")
    weights = {key: parameter for key, parameter in plain.named_parameters() if key in expected[3]}
    assert weights
    for key, parameter in weights.items():
        torch.testing.assert_close(parameter, expected[3][key], rtol=1e-4, atol=1e-5)


def random_weights() -> list[torch.Tensor]:
    config = tiny_model("qwen3_moe", None).config
    with pytest.raises(ValueError, match="stored in 4 bits"):  # which DDP would broadcast
        DistributedDataParallel(adapt(AutoModelForCausalLM.from_config(config, load_in_4bit=True)))
    model = AutoModelForCausalLM.from_config(config, distributed_setup={"ep_size": 2}, load_in_4bit=True)
    return [unpacked(experts, "down_proj") for _, experts in hf.experts_modules(model)]


def test_random_weights() -> None:
    first, second = run_ranks(random_weights, 2)
    assert len(first) == len(second) == 4
    assert all(one.shape == other.shape == (4, 64, 32) for one, other in zip(first, second, strict=True))
    assert not torch.equal(first[0], second[0])
