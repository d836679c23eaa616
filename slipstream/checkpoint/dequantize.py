"""Quantised checkpoints read as plain ones: FP8 (DeepSeek-V3) and MXFP4 experts (GPT-OSS).

A tensor is dequantised when it is read, and only the part that a rank keeps: whatever splits a plain model over ranks
while loading splits these too, nothing is ever whole in memory, and the model is an ordinary one that trains and saves.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

METHODS = ("fp8", "mxfp4")
SCALE, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"
NO_BLOCKS = (1, 1)  # a scale for the whole tensor, for each row or for each column
# The values of 4 bits: sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0).
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}  # safetensors'
Spans = list[tuple[int, int]]


def method_of(config: Any) -> str | None:
    """How the checkpoint of `config` is quantised, where it can be dequantised here; else None."""
    found = getattr(config, "quantization_config", None)
    fields = found if isinstance(found, dict) or found is None else found.to_dict()
    method = (fields or {}).get("quant_method")
    return method if method in METHODS else None


def block_of(config: Any) -> tuple[int, int]:
    """The rows and columns of an FP8 block of the checkpoint; (1, 1) where it has none (`weight_block_size: null`)."""
    found = config.quantization_config
    fields = found if isinstance(found, dict) else found.to_dict()
    rows, columns = fields.get("weight_block_size", (128, 128)) or NO_BLOCKS
    return rows, columns


def files_of(name_or_path: str, hub: dict[str, Any]) -> dict[str, Path]:
    """The tensors of a checkpoint -> the file of each; empty where it is not in safetensors.

    Raises: OSError for a file that the index names and that is not there.
    """
    index = file_if_there(name_or_path, SAFE_WEIGHTS_INDEX_NAME, hub)
    if index is not None:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {file: Path(str(cached_file(name_or_path, file, **hub))) for file in set(places.values())}
        return {name: files[file] for name, file in places.items()}
    file = file_if_there(name_or_path, SAFE_WEIGHTS_NAME, hub)
    if file is None:
        return {}
    with safe_open(file, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), file)


def file_if_there(name_or_path: str, name: str, hub: dict[str, Any]) -> Path | None:
    """A file of a checkpoint, if it has one of this name."""
    try:
        return Path(str(cached_file(name_or_path, name, **hub)))
    except OSError:
        return None


def open_plain(
    name_or_path: str, hub: dict[str, Any], block: tuple[int, int], dtype: torch.dtype, stack: ExitStack
) -> dict[str, Any]:
    """The tensors of a quantised checkpoint as slices to read from, under the names they have in a plain one.

    Args:
        dtype: of what was quantised.
        stack: keeps the files open.

    Raises: ValueError for a checkpoint that is not in safetensors, or whose scales do not fit its weights.
    """
    files = files_of(name_or_path, hub)
    if not files:
        raise ValueError(f"{name_or_path}: a quantised checkpoint has to be in safetensors to be dequantised")
    opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in set(files.values())}
    return plain_slices({name: opened[path].get_slice(name) for name, path in files.items()}, block, dtype)


def plain_slices(slices: dict[str, Any], block: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    """`slices` of a quantised checkpoint as those of a plain one; raises as `Fp8Slice`."""
    plain: dict[str, Any] = {}
    for name, found in slices.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in slices:
            continue
        if name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in slices:
            continue
        if name.endswith(BLOCKS) and (base := name.removesuffix(BLOCKS)) + SCALES in slices:
            plain[base] = Mxfp4Slice(found, slices[base + SCALES], dtype)
        elif name + SCALE in slices:
            plain[name] = Fp8Slice(name, found, slices[name + SCALE], block, dtype)
        else:
            plain[name] = found
    return plain


class _Slice:
    """A tensor that is read part by part, as safetensors' slices are."""

    shape: list[int]

    dtype: torch.dtype

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return _NAMES[self.dtype]

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Of `…` or slices without steps, one a dim or fewer."""
        index = () if index is ... else index if isinstance(index, tuple) else (index,)
        given = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=False)]
        spans = [*given, *((0, size) for size in self.shape[len(given) :])]
        return self.read([(start, max(start, stop)) for start, stop in spans])

    def read(self, spans: Spans) -> torch.Tensor:
        raise NotImplementedError


class Fp8Slice(_Slice):
    """`weight[i, j] * scale[i // rows, j // columns]`; a block at an edge may be cut, and one scale is for everything.

    Raises: ValueError for a scale that has not one value for each block of the tensor `name`.
    """

    def __init__(self, name: str, weight: Any, scale: Any, block: tuple[int, int], dtype: torch.dtype) -> None:
        self.weight, self.scale, self.dtype = weight, scale, dtype
        self.shape = weight.get_shape()
        self.block = [1] * (len(self.shape) - 2) + [*block]
        found = scale.get_shape()
        wanted = [-(-size // of) for size, of in zip(self.shape, self.block, strict=True)]
        needed = f"blocks of {[*block]} need {wanted}"
        fits = found == wanted
        if block == NO_BLOCKS:
            needed = "without blocks each of its dims is 1 or the weight's"
            fits = len(found) == len(wanted) and all(size in (1, of) for size, of in zip(found, wanted, strict=True))
        if not fits and torch.Size(found).numel() != 1:
            raise ValueError(
                f"{name}{SCALE} is {found} for a weight of {self.shape}, and {needed}; correct weight_block_size in "
                "the checkpoint's config.json"
            )

    def read(self, spans: Spans) -> torch.Tensor:
        weight = self.weight[tuple(slice(*span) for span in spans)].float()
        scale = self.scale[...].float()
        if scale.numel() == 1:
            return (weight * scale.reshape(())).to(self.dtype)
        for dim, (span, size) in enumerate(zip(spans, self.block, strict=True)):
            if scale.shape[dim] > 1:
                scale = scale.index_select(dim, torch.arange(*span) // size)
        return (weight * scale).to(self.dtype)


class Mxfp4Slice(_Slice):
    """Experts `[E, in, out]`, from blocks `[E, out, in / 32, 16]` of two values a byte, and an exponent for each."""

    def __init__(self, blocks: Any, scales: Any, dtype: torch.dtype) -> None:
        self.blocks, self.scales, self.dtype = blocks, scales, dtype
        experts, out, groups, width = blocks.get_shape()
        self.shape = [experts, groups * width * 2, out]

    def read(self, spans: Spans) -> torch.Tensor:
        experts, into, out = spans
        packed = self.blocks[slice(*experts), slice(*out)]
        exponents = self.scales[slice(*experts), slice(*out)].int() - 127
        values = torch.tensor(_FP4)
        pairs = torch.stack([values[(packed & 15).int()], values[(packed >> 4).int()]], -1)
        dense = torch.ldexp(pairs.flatten(-2), exponents[..., None]).flatten(-2)
        return dense[..., slice(*into)].to(self.dtype).transpose(1, 2).contiguous()
