"""Parameters with two names, such as a head that is the embedding: one tensor in the checkpoint, two once they differ.

Transformers reads `tie_word_embeddings` in the config to know which of both it has.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from slipstream import hf
from slipstream.checkpoint.export import INDEX
from slipstream.checkpoint.passthrough import NBYTES

TIED = "tie_word_embeddings"
Files = dict[str, dict[str, list[int]]]  # of a checkpoint, with the names and shapes of their tensors


def shared_parameters(model: nn.Module) -> dict[str, str]:
    """The further names of the parameters that have several -> the first one."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    return {name: of for name, of in names.items() if name != of}


def key_of(model: Any, name: str) -> str:
    """What the checkpoint calls the parameter `name`, which converts alone."""
    return next(iter(hf.Reversal(model).convert({name: torch.empty(0, device="meta")})))


def untie(model: Any, names: dict[str, str], files: Files) -> dict[str, str]:
    """Give each of `names` a parameter of its own in `model`, which is on the meta device, and a tensor in `files`.

    Args:
        names: of parameters -> the other name that each has (`shared_parameters`).

    Returns: the tensors that are new in `files` -> those that they start as.
    """
    starts = {}
    for name, of in names.items():
        module, _, own = name.rpartition(".")
        parameter = model.get_parameter(of)
        setattr(model.get_submodule(module), own, nn.Parameter(torch.empty_like(parameter, device="meta")))
        keys = key_of(model, name), key_of(model, of)
        for new, old in (keys, keys[::-1]):
            file = next((shapes for shapes in files.values() if old in shapes), None)
            if file is not None and not any(new in shapes for shapes in files.values()):
                file[new] = file[old]
                starts[new] = old
    return starts


def nbytes(file: Path, key: str) -> int:
    """Of a tensor in a safetensors file."""
    with safe_open(file, "pt") as tensors:
        found = tensors.get_slice(key)
        return NBYTES[found.get_dtype()] * torch.Size(found.get_shape()).numel()


def record(folder: Path, starts: dict[str, str], files: Files) -> None:
    """Bring config and index of the checkpoint in `folder`, copies of those before, up to what `untie` returned."""
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, config.get("text_config", {})):
        part[TIED] = False
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    path = folder / INDEX
    if not path.is_file():
        return
    index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    places = {key: file for file, shapes in files.items() for key in shapes if key in starts}
    index["weight_map"] |= places
    for key, file in places.items():
        for total, more in (
            ("total_size", nbytes(folder / file, key)),
            ("total_parameters", torch.Size(files[file][key]).numel()),
        ):
            if total in index.get("metadata", {}):
                index["metadata"][total] += more
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
