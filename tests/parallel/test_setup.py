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
        ({"strategy": "ddp2"}, "strategy='ddp2': use one of 'fsdp2', 'ddp'"),
        ({"ep": 2}, "no field 'ep'; it has strategy, ep_size"),
        ({"strategy": "ddp", "ep_size": 2}, "keeps the model whole on every rank; ep_size needs 'fsdp2'"),
        ({"dp_replicate": 2}, "dp_replicate=2 does not divide the 1 rank of this job; use one of 1"),
        ({"tp_size": 2, "ep_size": 2}, "use one of the two"),
        ({"activation_checkpointing": True}, "activation_checkpointing=True: use one of 'none', 'selective', 'full'"),
        ({"param_dtype": "bf16"}, "param_dtype='bf16': use one of None, 'float32', 'bfloat16', 'float16'"),
        ({"timeout_minutes": 0}, "timeout_minutes=0: give minutes"),
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
    with pytest.raises(ValueError, match="lies whole on each"):
        accelerate(tiny_model("qwen3_moe", None), distributed_setup={"ep_size": 2})


def test_from_plain_data() -> None:
    setup = create_distributed_setup_from_config({"strategy": "fsdp2", "ep_size": 4})
    assert setup == DistributedSetup(strategy="fsdp2", ep_size=4)
    with pytest.raises(TypeError, match="not str"):
        create_distributed_setup_from_config("fsdp2")


def test_one_rank_needs_no_setup() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), distributed_setup={"strategy": "fsdp2"})
    assert model(torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 4, 256)


@pytest.mark.parametrize(
    ("ranks", "setup", "sizes"),
    [
        (8, {"ep_size": 8}, (1, 8, 8, 1)),
        (8, {"ep_size": 4}, (1, 8, 8, 2)),
        (8, {"ep_size": 2, "dp_replicate": 2}, (2, 4, 8, 2)),
        (8, {"tp_size": 2}, (1, 4, 4, 8)),
        (8, {"strategy": "ddp"}, (8, 1, 8, 1)),
    ],
)
def test_sizes(monkeypatch, ranks, setup, sizes) -> None:
    """Replicas, ranks that share a dense parameter, ranks with data of their own, ranks that hold the same experts."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    made = DistributedSetup(**setup)
    made.check(8 if made.ep_size > 1 else None)
    assert (made.replicas, made.fsdp_size, made.dp_size, made.efsdp_size) == sizes


def test_each_replica_needs_whole_expert_groups(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        ValueError, match="ep_size=4 does not divide the 2 ranks of each of the 2 replicas; use one of 1, 2"
    ):
        DistributedSetup(ep_size=4, dp_replicate=2).check(8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_offload_without_a_gpu_is_refused(monkeypatch, tmp_path) -> None:
    tiny_model("qwen3_moe", None).save_pretrained(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="everything is in host memory already"):
        AutoModelForCausalLM.from_pretrained(tmp_path, distributed_setup={"cpu_offload": True})
