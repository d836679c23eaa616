"""Transformers' Trainer and TRL's SFTTrainer on a model spread over two ranks: the curve of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM as Transformers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from slipstream import AutoModelForCausalLM
from tests.distributed.harness import run_ranks
from tests.tiny_models import tiny_batch, tiny_model

ROWS = tiny_batch(batch=16, length=24).tolist()


def curve(model: Any, kind: str, output: str, ranks: int) -> list[float]:
    """Losses and gradient norms of four steps of four rows, clipped."""
    options = {
        "output_dir": output,
        "per_device_train_batch_size": 4 // ranks,
        "learning_rate": 1e-2,
        "num_train_epochs": 1,
        "max_grad_norm": 0.5,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
    }
    if kind == "trainer":
        data = Dataset.from_dict({"input_ids": ROWS, "labels": ROWS})
        trainer = Trainer(model, TrainingArguments(**options), train_dataset=data)
    else:
        words = {f"w{index}": index for index in range(256)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words)), pad_token="w0", eos_token="w1"
        )
        config = SFTConfig(**options, max_length=24, router_aux_loss_coef=0.0, activation_checkpointing=False)
        data = Dataset.from_dict({"input_ids": ROWS})
        trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 4
    return [value for entry in logs for value in (entry["loss"], entry["grad_norm"])]


def spread(folder: str, kind: str, output: str, setup: dict[str, Any]) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup)
    return curve(model, kind, output, dist.get_world_size())


@pytest.mark.parametrize("kind", ["trainer", "sft"])
@pytest.mark.parametrize(("ranks", "ep_size"), [(2, 2), (4, 2)])
def test_the_curve_of_one_process(tmp_path: Path, kind: str, ranks: int, ep_size: int) -> None:
    tiny_model("qwen3_moe", None).save_pretrained(tmp_path / "model")
    plain = Transformers.from_pretrained(tmp_path / "model", experts_implementation="eager")
    expected = curve(plain, kind, str(tmp_path / "one"), 1)
    setup = {"ep_size": ep_size}
    got = run_ranks(spread, ranks, str(tmp_path / "model"), kind, str(tmp_path / "many"), setup, timeout=120)[0]
    assert got == pytest.approx(expected, rel=1e-3)
