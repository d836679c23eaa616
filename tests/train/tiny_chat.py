"""A chat tokenizer, a Mixture-of-Experts checkpoint, conversations and a recipe, all tiny and made on the spot."""

import io
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

from slipstream.train.recipe_file import load_recipe
from slipstream.train.run import RunResult, run

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same text, with the assistant's part marked the way Transformers asks for.
CHATML_MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTIONS = [
    (f"What comes after {word}?", f"After {word} comes the end.") for word in ["one", "two", "three", "four", "five"]
]
CONVERSATIONS = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": f"Sure? {index}"},
        {"role": "assistant", "content": f"Yes, {index} times."},
    ]
    for index, (question, answer) in enumerate(QUESTIONS * 4)
]
MAX_POSITIONS = 128


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with some merges, ChatML's special tokens and its template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([turn["content"] for turns in CONVERSATIONS for turn in turns], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    return fast


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Each row as a line of JSON; a string is written as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def make_checkpoint(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Qwen3-MoE (2 layers, 4 experts) in fp32 with its tokenizer."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_recipe(folder: Path, checkpoint: Path, **changes: dict[str, Any]) -> Path:
    """`folder/recipe.yaml`, which trains the checkpoint on `CONVERSATIONS` into `folder/out`, `changes` made to it.

    `write_recipe(folder, checkpoint, train={"seed": 1})` changes one value and keeps the others.
    """
    rows = write_jsonl(folder / "rows.jsonl", [{"messages": turns} for turns in CONVERSATIONS])
    recipe: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": str(checkpoint)},
        "data": {"train": str(rows), "eval_fraction": 0.2},
        "train": {"output_dir": str(folder / "out"), "learning_rate": 0.01, "per_device_train_batch_size": 4},
    }
    for section, values in changes.items():
        recipe.setdefault(section, {}).update(values)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def fine_tune(folder: Path, checkpoint: Path, **changes: dict[str, Any]) -> tuple[RunResult, str]:
    """The run's result and what it printed."""
    folder.mkdir(exist_ok=True)
    screen = io.StringIO()
    recipe, _ = load_recipe(write_recipe(folder, checkpoint, **changes))
    result = run(recipe, file=screen)
    assert result is not None
    return result, screen.getvalue()
