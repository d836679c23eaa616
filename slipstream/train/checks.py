"""What can be refused before weights are loaded: the checkpoint, and numbers that cannot fit."""

import difflib
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.training_args import OptimizerNames

from slipstream import adapters
from slipstream.bench.presets import PRESETS, build_config
from slipstream.checkpoint.files import indexed_files, open_tensors, read_json
from slipstream.hf import num_routed_experts
from slipstream.parallel.setup import DistributedSetup
from slipstream.shared_adapters import share_experts
from slipstream.train.byte_tokenizer import NAME as BYTES
from slipstream.train.byte_tokenizer import byte_tokenizer
from slipstream.train.lora_names import check_names
from slipstream.train.recipe import (
    ALL_EXPERTS,
    AUTO,
    DEFAULT_BATCH_SIZE,
    DEFAULT_MAX_LENGTH,
    LoraSection,
    ModelSection,
    Recipe,
    TrainSection,
)

OWN_OPTIMIZERS = ("slipstream_adamw", "slipstream_adamw_master")
INDEX_NAME = "model.safetensors.index.json"


def load_config_and_tokenizer(
    recipe: Recipe, stand_in: bool = False
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase, list[str]]:
    """The model's config and its tokenizer, once a local checkpoint has been found whole; and notes on both.

    The tokenizer has the recipe's chat template, if there is one.

    Args:
        stand_in: for a name on the hub that cannot be had, take the preset of the same shapes, if there is one.

    Raises: ValueError when a local checkpoint is missing, incomplete or damaged, or a config field does not exist;
        OSError when a hub name cannot be had.
    """
    section = recipe.model
    notes = []
    try:
        config = build_from_config(section) if section.name_or_path is None else load_config(section)
        tokenizer = section.tokenizer or section.name_or_path
    except OSError:
        preset = Path(section.name_or_path or "").name.lower()
        if not stand_in or preset not in PRESETS:
            raise
        config, tokenizer = build_config(preset, 0, experts=0), section.tokenizer
        config.dtype = torch.bfloat16  # as they were published
        notes.append(f"{section.name_or_path} cannot be had here; its shapes are those of the preset {preset}")
    if tokenizer is None:
        notes.append(
            "model.tokenizer is not given; text is read as bytes"
            if section.name_or_path is None
            else "no tokenizer here; text is read as bytes, so rows count more tokens than they will have"
        )
    if tokenizer in (None, BYTES):
        loaded: PreTrainedTokenizerBase = byte_tokenizer()
    else:
        loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=section.trust_remote_code)
    if section.name_or_path is None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config.get_text_config(), name, getattr(loaded, name))
    if recipe.data.chat_template is not None:
        loaded.chat_template = Path(recipe.data.chat_template).read_text(encoding="utf-8")
    return config, loaded, notes


def load_config(section: ModelSection) -> PreTrainedConfig:
    """The config of a checkpoint; a name on the hub is left to Transformers."""
    assert section.name_or_path is not None
    folder = Path(section.name_or_path)
    if folder.exists():
        check_checkpoint(folder)
    elif folder.is_absolute() or section.name_or_path.startswith(".") or len(folder.parts) > 2:
        raise ValueError(f"model.name_or_path: no such folder: {folder}")
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
    return config


def build_from_config(section: ModelSection) -> PreTrainedConfig:
    """The config that `model.config` and `model.config_overrides` describe, of a preset or a file."""
    assert section.config is not None
    changes = dict(section.config_overrides)
    path = Path(section.config)
    if section.config in PRESETS and not path.exists():
        config = build_config(section.config, 0, experts=0)
    elif path.exists():
        config = AutoConfig.from_pretrained(path, trust_remote_code=section.trust_remote_code)
    else:
        raise ValueError(f"model.config: no such file: {path}; or use a preset: {', '.join(PRESETS)}")
    known = {*config.to_dict(), *vars(config), *config.attribute_map}
    if unknown := [key for key in changes if key not in known]:
        raise ValueError(f"model.config_overrides.{unknown[0]}: {type(config).__name__} has no such field")
    if section.config in PRESETS and not path.exists():
        # It cuts the pattern of layers to their number.
        return build_config(section.config, changes.pop("num_hidden_layers", 0), experts=0, changes=changes)
    values = {**config.to_dict(), **changes}
    return AutoConfig.for_model(**values)


def check_experts(setup: DistributedSetup, config: PreTrainedConfig) -> None:
    """Raises: ValueError when `ep_size` does not divide the model's experts, whatever the number of ranks."""
    experts = num_routed_experts(config)
    if setup.ep_size > 1 and (experts is None or experts % setup.ep_size):
        check_setup(setup, config)


def lora_config(
    section: LoraSection | None, config: PreTrainedConfig, setup: DistributedSetup, notes: list[str]
) -> LoraConfig | None:
    """PEFT's config of the recipe's `lora`; its "all-experts" is spelled out once there is a model. `notes` gets what
    the user should know.

    Raises: ValueError when the model has no experts or nothing of a name that is given, or PEFT not that setting for
        experts or for a model that is spread over ranks.
    """
    if section is None:
        return None
    values = section.model_dump(exclude={"share_experts", "load_in_4bit"})
    if section.target_parameters == ALL_EXPERTS:
        if num_routed_experts(config) is None:
            raise ValueError(
                f"lora.target_parameters={ALL_EXPERTS!r}: {type(config).__name__} describes a dense model; leave it out"
            )
        values["target_parameters"] = [ALL_EXPERTS]
    made = LoraConfig(task_type="CAUSAL_LM", **values)
    adapters.check(made)
    if max(setup.ranks, setup.ep_size, setup.dp_replicate, setup.tp_size) > 1:
        adapters.check_spread(made)
    if note := check_names(made, config):
        notes.append(note)
    return share_experts(made) if section.share_experts else made


def check_setup(setup: DistributedSetup, config: PreTrainedConfig) -> None:
    """Raises: ValueError when the recipe's `distributed` does not fit the model and the ranks of this job."""
    try:
        setup.check(num_routed_experts(config))
    except ValueError as error:
        raise ValueError(f"distributed: {error}") from error
    if setup.tp_size > 1 and not torch.accelerator.is_available():
        raise ValueError(
            f"distributed: tp_size={setup.tp_size} needs GPUs, as Accelerate has no tensor parallelism on a CPU; leave "
            "it out here"
        )


def micro_batches(train: TrainSection, streams: int) -> int:
    """How many micro-batches a step has on each of `streams` ranks that train on rows of their own; with
    `per_device_train_batch_size: auto` of one row each.

    Raises: ValueError when no whole number of micro-batches makes `global_batch_size` rows.
    """
    unknown = train.per_device_train_batch_size == AUTO
    if train.global_batch_size is None:
        return (DEFAULT_BATCH_SIZE if unknown else 1) * train.gradient_accumulation_steps
    one = streams if unknown else streams * int(train.per_device_train_batch_size)
    if train.global_batch_size % one:
        each = "" if unknown else f" x {train.per_device_train_batch_size} rows each"
        raise ValueError(
            f"train.global_batch_size={train.global_batch_size} is no multiple of {one} ({streams} ranks{each}); "
            f"use {max(1, train.global_batch_size // one) * one} or {(train.global_batch_size // one + 1) * one}"
        )
    return train.global_batch_size // one


def check_optimizer(name: str) -> None:
    """Raises: ValueError when neither Transformers nor we have an optimizer of that name."""
    known = [*OWN_OPTIMIZERS, *(optimizer.value for optimizer in OptimizerNames)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"use 'auto' or one of {', '.join(known)}"
        raise ValueError(f"train.optim: no optimizer {name!r}; {fix}")


def check_checkpoint(folder: Path) -> None:
    """Read the headers of a local checkpoint's files, not its weights.

    Raises: ValueError naming the file that is missing or damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"model.name_or_path: {folder} is a file; name the folder that holds config.json")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = read_json(folder / "adapter_config.json", "model.name_or_path").get("base_model_name_or_path") or "BASE"
        raise ValueError(
            f"model.name_or_path: {folder} holds an adapter; put it into its base first (slipstream merge {folder} "
            f"--into {base} --output MERGED) and name MERGED"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.name_or_path: {folder} holds no config.json, so it is no Hugging Face checkpoint")
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if (folder / INDEX_NAME).is_file():
        names = indexed_files(folder / INDEX_NAME, "model.name_or_path")
    if not names and not any(folder.glob("pytorch_model*.bin")):
        raise ValueError(f"model.name_or_path: {folder} holds a config.json but no weights (*.safetensors)")
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"model.name_or_path: {folder} lacks {name}, which {INDEX_NAME} names; fetch it again")
        with open_tensors(folder / name, "model.name_or_path"):
            pass


def resolve(recipe: Recipe, config: PreTrainedConfig) -> Recipe:
    """A copy of the recipe in which every default that depends on the model is written out.

    Raises: ValueError when `data.max_length` exceeds the positions the model has.
    """
    recipe = recipe.model_copy(deep=True)
    data, train = recipe.data, recipe.train
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if data.max_length is None:
        data.max_length = min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
    elif limit is not None and data.max_length > limit:
        name = recipe.model.name_or_path or recipe.model.config
        raise ValueError(
            f"data.max_length={data.max_length} is longer than the model allows: {name} has "
            f"max_position_embeddings={limit}; set data.max_length to {limit} or less"
        )
    if train.learning_rate is None:
        train.learning_rate = 2e-4 if recipe.lora else 2e-5
    cuda = torch.cuda.is_available()
    if recipe.model.dtype == "auto" and recipe.model.config is not None:
        recipe.model.dtype = "bfloat16" if cuda else "float32"  # a config alone has no weights to take it from
    dtype = str(config.dtype or "float32") if recipe.model.dtype == "auto" else recipe.model.dtype
    short = dtype.removeprefix("torch.") in ("bfloat16", "float16")
    if train.bf16 is None:
        train.bf16 = cuda and not short
    if train.optim == "auto":
        # Nearest rounding loses what is below 1/256 of a bfloat16 weight. LoRA's own weights are float32.
        train.optim = "slipstream_adamw" if cuda and short and recipe.lora is None else "adamw_torch_fused"
    check_optimizer(train.optim)
    return recipe
