"""Trainer, TRL and PEFT work on our models as on Transformers' own."""

import copy

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import slipstream
from slipstream.deferred_logits import DeferredLogits
from tests.tiny_models import tiny_batch, tiny_model

ROWS = tiny_batch(batch=12, length=24)


@pytest.fixture
def pair():
    plain = tiny_model("qwen3_moe", None)
    return plain, slipstream.accelerate(copy.deepcopy(plain))


@pytest.fixture
def touched(monkeypatch) -> list[DeferredLogits]:
    """The deferred logits that something made real."""
    seen = []
    materialize = DeferredLogits.materialize
    monkeypatch.setattr(DeferredLogits, "materialize", lambda self: seen.append(self) or materialize(self))
    return seen


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def options(folder) -> dict:
    return {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def test_trainer(pair, touched, tmp_path) -> None:
    data = Dataset.from_dict({"input_ids": ROWS.tolist(), "labels": ROWS.tolist()})
    curves = []
    for model in pair:
        trainer = Trainer(model, TrainingArguments(**options(tmp_path)), train_dataset=data, eval_dataset=data)
        curves.append([*losses(trainer), trainer.evaluate()["eval_loss"]])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[1][-1] < curves[1][0]
    assert not touched
    trainer.save_model(tmp_path / "saved")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(reloaded(ROWS).logits, pair[1](ROWS).logits, rtol=1e-4, atol=1e-4)


def test_trainer_metrics_see_the_logits(pair, tmp_path) -> None:
    data = Dataset.from_dict({"input_ids": ROWS.tolist(), "labels": ROWS.tolist()})
    shapes = []
    for model in pair:
        arguments = TrainingArguments(**options(tmp_path))
        seen = []
        trainer = Trainer(
            model,
            arguments,
            eval_dataset=data,
            compute_metrics=lambda prediction, seen=seen: {"mean": float(seen.append(prediction.predictions) or 0)},
        )
        trainer.evaluate()
        shapes.append(torch.as_tensor(seen[0] if not isinstance(seen[0], tuple) else seen[0][0]))
    torch.testing.assert_close(*shapes, rtol=1e-4, atol=1e-4)


def test_trl_sft_trainer(pair, tmp_path) -> None:
    words = {f"w{index}": index for index in range(256)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)), pad_token="w0", eos_token="w1")
    data = Dataset.from_dict({"input_ids": ROWS.tolist()})
    curves = []
    for model in pair:
        config = SFTConfig(**options(tmp_path), max_length=24, bf16=False, router_aux_loss_coef=0.0)
        trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)
        curves.append(losses(trainer))
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_peft(pair, touched, tmp_path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    grads = []
    for model in pair:
        torch.manual_seed(0)
        adapted = get_peft_model(model, config)
        adapted(input_ids=ROWS, labels=ROWS).loss.backward()
        grads.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    assert not touched
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in pair[1].parameters() if not p.requires_grad)
    assert slipstream.accelerate(adapted) is adapted
    assert slipstream.describe(adapted).model_class == "Qwen3MoeForCausalLM"
    adapted.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(tiny_model("qwen3_moe", None), tmp_path)
    torch.testing.assert_close(reloaded(ROWS).logits, adapted(ROWS).logits, rtol=1e-4, atol=1e-4)


def test_peft_on_the_head_trains_through_ordinary_logits(pair) -> None:
    config = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    results = []
    for model in pair:
        torch.manual_seed(0)
        adapted = get_peft_model(model, config)
        loss = adapted(input_ids=ROWS, labels=ROWS).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, rtol=1e-4, atol=1e-6)


def test_accelerate_after_peft() -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_model("qwen3_moe", None), LoraConfig(r=4, target_modules=["q_proj"]))
    assert slipstream.accelerate(adapted) is adapted
    assert isinstance(adapted(input_ids=ROWS, labels=ROWS).logits, DeferredLogits)
