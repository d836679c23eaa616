"""Tensors of a checkpoint that the model has no place for, kept for the checkpoint that is saved from it.

Transformers leaves the modules for multi-token prediction out (`mtp.…`, or the layers behind the last), and a model
that it saved has lost them. Here they stay in the files that they were read from, and are copied when the model is
saved: no memory is spent on them, and their values and names do not change.
"""

import re
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from slipstream.checkpoint import dequantize

KEPT = "_slipstream_kept"
BLOCK = "_slipstream_kept_block"  # of FP8 weights that are saved dequantised, else None
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
    return {name: path for name, path in dequantize.files_of(name_or_path, hub).items() if _is_extra(name, config)}


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


def open_kept(model: Any, stack: ExitStack) -> dict[str, Any]:
    """The kept tensors of `model` as slices to read from, dequantised where its checkpoint is quantised and it is not.

    Warns of files that are gone.
    """
    kept: dict[str, Path] = vars(model).get(KEPT, {})
    opened = {}
    for path in sorted(set(kept.values())):
        if path.is_file():
            opened[path] = stack.enter_context(safe_open(path, framework="pt"))
            continue
        lost = [name for name, place in kept.items() if place == path]
        warnings.warn(
            f"{path} is gone, and with it {len(lost)} tensors that this model does not train ({lost[0]}, …): "
            "what is saved lacks them",
            stacklevel=2,
        )
    slices = {name: opened[path].get_slice(name) for name, path in kept.items() if path in opened}
    block = vars(model).get(BLOCK)
    return slices if block is None else dequantize.plain_slices(slices, block, model.dtype)


def sizes(model: Any) -> dict[str, int]:
    """Bytes of each of the kept tensors of `model`, as they will be saved."""
    with ExitStack() as stack:
        return {
            name: NBYTES[found.get_dtype()] * torch.Size(found.get_shape()).numel()
            for name, found in open_kept(model, stack).items()
        }


def read(model: Any, name: str) -> torch.Tensor:
    """One of the kept tensors of `model`."""
    with ExitStack() as stack:
        tensor: torch.Tensor = open_kept(model, stack)[name][...]
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
        setattr(model, KEPT, {name: folder / files[name] for name in kept if name in files})
        setattr(model, BLOCK, None)  # they were saved dequantised


# By safetensors' names.
NBYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
           "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}  # fmt: skip
