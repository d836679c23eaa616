"""What can be refused before weights are loaded: the checkpoint, and numbers that cannot fit."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from slipstream.train.recipe import DEFAULT_MAX_LENGTH, ModelSection, Recipe

INDEX_NAME = "model.safetensors.index.json"


def load_config(section: ModelSection) -> PreTrainedConfig:
    """The model's config, once its folder has been found whole; a name on the hub is left to Transformers.

    Raises: ValueError when a local checkpoint is missing, incomplete or damaged; OSError when a hub name cannot be had.
    """
    folder = Path(section.name_or_path)
    if folder.exists():
        check_checkpoint(folder)
    elif folder.is_absolute() or section.name_or_path.startswith(".") or len(folder.parts) > 2:
        raise ValueError(f"model.name_or_path: no such folder: {folder}")
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
    return config


def check_checkpoint(folder: Path) -> None:
    """Read the headers of a local checkpoint's files, not its weights.

    Raises: ValueError naming the file that is missing or damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"model.name_or_path: {folder} is a file; name the folder that holds config.json")
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.name_or_path: {folder} holds no config.json, so it is no Hugging Face checkpoint")
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if (folder / INDEX_NAME).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX_NAME).read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
            raise ValueError(f"model.name_or_path: {folder / INDEX_NAME} is damaged; fetch it again") from error
    if not names and not any(folder.glob("pytorch_model*.bin")):
        raise ValueError(f"model.name_or_path: {folder} holds a config.json but no weights (*.safetensors)")
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"model.name_or_path: {folder} lacks {name}, which {INDEX_NAME} names; fetch it again")
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"model.name_or_path: {folder / name} is damaged ({error}); fetch it again") from error


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
        raise ValueError(
            f"data.max_length={data.max_length} is longer than the model allows: {recipe.model.name_or_path} has "
            f"max_position_embeddings={limit}; set data.max_length to {limit} or less"
        )
    if train.max_steps > 0 and train.warmup_steps < 1 and train.warmup_steps * train.max_steps < 1:
        train.warmup_steps = 0  # Transformers rounds up to one step, and trains it at a rate of 0
    if train.learning_rate is None:
        train.learning_rate = 2e-4 if recipe.lora else 2e-5
    if train.bf16 is None:
        dtype = str(config.dtype or "float32") if recipe.model.dtype == "auto" else recipe.model.dtype
        train.bf16 = torch.cuda.is_available() and dtype.removeprefix("torch.") == "float32"
    return recipe
