"""Sizes are refused before anything is loaded, with those that would work."""

import pytest
import torch

from slipstream import AutoModelForCausalLM, DistributedSetup, accelerate, create_distributed_setup_from_config
from tests.tiny_models import tiny_config, tiny_model


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ({"ep_size": 3}, "ep_size=3 does not divide 8 experts; use one of 1, 2, 4, 8"),
        ({"ep_size": 2}, r"ep_size=2 does not divide the 1 rank of this job; use one of 1, or .*--nproc-per-node=2"),
        ({"ep_size": 0}, "ep_size=0: give a whole number"),
        ({"strategy": "ddp2"}, "strategy='ddp2': use one of 'fsdp2'"),
        ({"ep": 2}, "no field 'ep'; it has strategy, ep_size"),
    ],
)
def test_refused(setup, message, tmp_path) -> None:
    tiny_model("qwen3_moe", None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, distributed_setup=setup)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), distributed_setup=setup)


def test_refused_for_a_dense_model() -> None:
    with pytest.raises(ValueError, match="no routed experts"):
        AutoModelForCausalLM.from_config(tiny_config("llama"), distributed_setup={"ep_size": 2})


def test_refused_for_a_model_that_lies_whole_on_this_rank(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="lies whole on this one"):
        accelerate(tiny_model("qwen3_moe", None), distributed_setup={"ep_size": 2})


def test_from_plain_data() -> None:
    setup = create_distributed_setup_from_config({"strategy": "fsdp2", "ep_size": 4})
    assert setup == DistributedSetup(strategy="fsdp2", ep_size=4)
    with pytest.raises(TypeError, match="not str"):
        create_distributed_setup_from_config("fsdp2")


def test_one_rank_needs_no_setup() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), distributed_setup={"strategy": "fsdp2"})
    assert model(torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 4, 256)
