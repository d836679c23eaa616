"""A script written for NeMo AutoModel runs with its import line changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM as Transformers

from slipstream import BackendConfig as Ours
from slipstream import DistributedSetup
from slipstream.compat import BackendConfig, NeMoAutoModelForCausalLM, create_distributed_setup_from_config
from tests.tiny_models import tiny_config

EXAMPLE = Path(__file__).parents[1] / "examples" / "compat.py"


def test_backend_values_of_the_other_library() -> None:
    with pytest.warns(UserWarning, match="needs no DeepEP"):
        config = BackendConfig(attn="te", linear="te", experts="torch_mm", dispatcher="deepep", rope_fusion=True)
    assert isinstance(config, Ours)
    assert (config.attn, config.linear, config.experts, config.dispatcher) == ("auto", "auto", "slipstream", "auto")
    assert BackendConfig(fake_balanced_gate=True).gate == "balanced"
    with pytest.raises(ValueError, match="no field 'warp_speed'"):
        BackendConfig(warp_speed=9)
    with pytest.raises(ValueError, match="attn='magic'"):
        BackendConfig(attn="magic")


def test_setup_keys_of_the_other_library(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.warns(UserWarning, match="ignore_router_for_ac"):
        setup = create_distributed_setup_from_config(
            {"strategy": "fsdp2", "ep_size": 8, "dp_size": 8, "pp_size": 1, "activation_checkpointing": True,
             "moe": {"ignore_router_for_ac": True, "reshard_after_forward": False}}
        )  # fmt: skip
    assert setup == DistributedSetup(ep_size=8, activation_checkpointing="full", reshard_after_forward=False)
    assert create_distributed_setup_from_config(strategy="fsdp2", dp_replicate_size=2).dp_replicate == 2
    with pytest.raises(ValueError, match="pp_size=2: Slipstream has no such parallelism"):
        create_distributed_setup_from_config({"pp_size": 2})
    with pytest.raises(ValueError, match="dp_size=4: 8 ranks"):
        create_distributed_setup_from_config({"dp_size": 4})


def test_model_keywords_of_the_other_library() -> None:
    with pytest.warns(UserWarning, match="use_liger_kernel has no effect"):
        model = NeMoAutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), use_liger_kernel=False)
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    with pytest.raises(ValueError, match="peft_config: not taken here"):
        NeMoAutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), peft_config={})


@pytest.mark.slow
def test_example_on_two_ranks(tmp_path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(EXAMPLE)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert Transformers.from_pretrained(tmp_path).config.model_type == "qwen3_moe"
