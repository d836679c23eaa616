"""Which keys a recipe may have, what other tools call them, and what the writer of an unknown one may have meant."""

import difflib
from typing import Any, get_args

from pydantic import BaseModel

from slipstream.train.recipe import BACKEND_KEYS, DISTRIBUTED_KEYS, Recipe

KeyPath = tuple[str | int, ...]
# What Axolotl, LLaMA-Factory, torchtune and NeMo AutoModel call our keys; read at the top level or in any section.
ALIASES = {
    "base_model": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "pretrained_model_name_or_path": "model.name_or_path",
    "torch_dtype": "model.dtype",
    "tokenizer_name_or_path": "model.tokenizer",
    "datasets": "data.train",
    "path_or_dataset": "data.train",
    "path_or_dataset_id": "data.train",
    "test_datasets": "data.eval",
    "sequence_len": "data.max_length",
    "seq_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "val_set_size": "data.eval_fraction",
    "val_size": "data.eval_fraction",
    "sample_packing": "data.packing",
    "neat_packing": "data.packing",
    "excess_length_strategy": "data.excess_length",
    "checkpoint_dir": "train.output_dir",
    "micro_batch_size": "train.per_device_train_batch_size",
    "local_batch_size": "train.per_device_train_batch_size",
    "num_epochs": "train.num_train_epochs",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type",
    "warmup_ratio": "train.warmup_steps",
    "optimizer": "train.optim",
    "gradient_checkpointing": "train.activation_checkpointing",
    "expert_parallel_size": "distributed.ep_size",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_target_modules": "lora.target_modules",
    "lora_target": "lora.target_modules",
    "lora_modules_to_save": "lora.modules_to_save",
    "additional_target": "lora.modules_to_save",
    "ckpt_every_steps": "checkpoint.save_steps",
    "val_every_steps": "eval.eval_steps",
    "eval_batch_size": "eval.per_device_eval_batch_size",
    "wandb_name": "log.run_name",
}
# At the top level, as those tools have them: names that two of our sections have.
ALIASES_AT_TOP = {"seed": "train.seed"}
# What has no key of ours, and what to do instead.
HINTS = {
    "_target_": "a recipe names no Python classes; leave it out",
    "adapter": "a section `lora:`, empty or not, turns LoRA on; with load_in_4bit it is QLoRA",
    "finetuning_type": "a section `lora:`, empty or not, turns LoRA on",
    "peft": "a section `lora:`, empty or not, turns LoRA on",
    "deepspeed": "the section `distributed` says how the model is spread over ranks",
    "fsdp": "the section `distributed` says how the model is spread over ranks",
    "template": "the tokenizer's own chat template is used; data.chat_template names a file that replaces it",
    "load_in_8bit": "experts are stored in 4 bits or whole: lora.load_in_4bit, or leave it out",
}  # fmt: skip


def keys_of(location: KeyPath) -> dict[str, Any]:
    """The keys allowed at a place of a recipe, with their pydantic fields; None for those another class validates."""
    if not location:
        return dict(Recipe.model_fields)
    if location == ("distributed",):
        return dict.fromkeys(DISTRIBUTED_KEYS)
    if location == ("model", "backend"):
        return dict.fromkeys(BACKEND_KEYS)
    field = Recipe.model_fields.get(str(location[0]))
    for part in location[1:]:
        if field is not None and not isinstance(part, int):
            field = _model_fields(field.annotation).get(part)
    return _model_fields(field.annotation) if field is not None else {}


def _model_fields(annotation: Any) -> dict[str, Any]:
    """The fields of the pydantic model within an annotation: itself, or inside `Model | None` or `list[Model]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return dict(annotation.model_fields)
    return next((fields for inner in get_args(annotation) if (fields := _model_fields(inner))), {})


def homes() -> dict[str, list[str]]:
    """Each key of a section, and the sections that have it."""
    found: dict[str, list[str]] = {}
    for section in Recipe.model_fields:
        for key in keys_of((section,)):
            found.setdefault(key, []).append(section)
    return found


def meant(home: str | None, key: str) -> str | None:
    """`section.key` that a key found in section `home` (None: at the top level) is read as, or None: as it is.

    Another tool's name for it, or our own name in the wrong place, where exactly one section has it.
    """
    if key in ALIASES:
        return ALIASES[key]
    if home is None and key in ALIASES_AT_TOP:
        return ALIASES_AT_TOP[key]
    sections = homes().get(key, [])
    if home in sections or len(sections) != 1 or (home is None and key in Recipe.model_fields):
        return None
    return f"{sections[0]}.{key}"


def suggest(location: KeyPath) -> str:
    """What to do about an unknown key: a hint, the nearest key of its section or of another one, or the list."""
    key, siblings = str(location[-1]), list(keys_of(location[:-1]))
    if key in HINTS:
        return HINTS[key]
    elsewhere = {name: f"{sections[0]}.{name}" for name, sections in homes().items()}
    for candidates in ({name: name for name in siblings}, elsewhere):
        match = difflib.get_close_matches(key, candidates, n=1)
        if match:
            return f"did you mean {candidates[match[0]]!r}?"
    return f"allowed here: {', '.join(siblings)}" if siblings else "leave it out"


def dotted(key_path: KeyPath) -> str:
    return ".".join(map(str, key_path))
