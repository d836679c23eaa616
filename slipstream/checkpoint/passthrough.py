"""Tensors of a checkpoint that the model has no place for, kept for the checkpoint that is saved from it.

Transformers leaves the modules for multi-token prediction out (`mtp.…`, or the layers behind the last), and a model
that it saved has lost them. Here they stay in the files that they were read from, and are copied when the model is
saved: no memory is spent on them, and their values and names do not change.
"""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

KEPT = "_slipstream_kept"
MODULE = "mtp"  # the submodule of a model that trains them, see slipstream/mtp.py
_MTP = re.compile(r"(^|\.)mtp(_layers)?(\.|$)")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def find(name_or_path: str, config: Any, **hub: Any) -> dict[str, Path]:
    """Tensors for multi-token prediction in a checkpoint -> the file of each; empty where it is in another format.

    Args:
        config: the model's.
        hub: what `cached_file` takes: `revision`, `token`, `cache_dir`, `subfolder`, …

    Raises: OSError for a file that the checkpoint's index names and that is not there.
    """
    index = _file_if_there(name_or_path, SAFE_WEIGHTS_INDEX_NAME, hub)
    if index is not None:
        places = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        names = [name for name in places if _is_extra(name, config)]
        files = {file: Path(str(cached_file(name_or_path, file, **hub))) for file in {places[name] for name in names}}
        return {name: files[places[name]] for name in names}
    file = _file_if_there(name_or_path, SAFE_WEIGHTS_NAME, hub)
    if file is None:
        return {}
    with safe_open(file, framework="pt") as tensors:
        return {name: Path(file) for name in tensors.keys() if _is_extra(name, config)}  # noqa: SIM118


def _file_if_there(name_or_path: str, name: str, hub: dict[str, Any]) -> str | None:
    try:
        return cached_file(name_or_path, name, **hub)
    except OSError:
        return None


def _is_extra(name: str, config: Any) -> bool:
    if _MTP.search(name):
        return True
    text = config.get_text_config()
    layers, more = getattr(text, "num_hidden_layers", None), _predicted(text)
    layer = _LAYER.search(name)
    return layer is not None and layers is not None and layers <= int(layer[1]) < layers + more


def _predicted(config: Any) -> int:
    """How many modules for multi-token prediction the architecture's checkpoints have behind the last layer."""
    for name in ("num_mtp_layers", "num_nextn_predict_layers"):
        if (count := getattr(config, name, None)) is not None:
            return int(count)
    return 0


def sizes(kept: dict[str, Path]) -> dict[str, int]:
    """Bytes of each of the kept tensors that is still there; warns of files that are gone."""
    found: dict[str, int] = {}
    for path in sorted(set(kept.values())):
        if not path.is_file():
            lost = [name for name, place in kept.items() if place == path]
            warnings.warn(
                f"{path} is gone, and with it {len(lost)} tensors that this model does not train ({lost[0]}, …): "
                "what is saved lacks them",
                stacklevel=2,
            )
            continue
        with safe_open(path, framework="pt") as tensors:
            for name in (name for name, place in kept.items() if place == path):
                part = tensors.get_slice(name)
                found[name] = _NBYTES[part.get_dtype()] * torch.Size(part.get_shape()).numel()
    return found


def read(kept: dict[str, Path], name: str) -> torch.Tensor:
    """One of the kept tensors."""
    with safe_open(kept[name], framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor


def under_source_names(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` of a model to be saved, with modules for multi-token prediction that it trains where they came from."""
    module: Any = getattr(model, MODULE, None)
    named: dict[str, torch.Tensor] = tensors
    if hasattr(module, "under_source_names"):
        named = module.under_source_names(model, tensors)
    return named


def follow(model: Any, folder: Path, files: dict[str, str]) -> None:
    """Remember that the kept tensors of `model` are elsewhere, once it was saved over the checkpoint they came from.

    Args:
        files: of each tensor saved, its file in `folder`.
    """
    kept: dict[str, Path] = vars(model).get(KEPT, {})
    if any(path.resolve().parent == folder.resolve() for path in kept.values()):
        setattr(model, KEPT, {name: folder / files.get(name, path.name) for name, path in kept.items()})


# By safetensors' names.
_NBYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
           "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}  # fmt: skip
