"""A saved GPT-OSS with its experts in MXFP4 again, as it is published and served.

MXFP4: 32 neighbours share a power of two and keep 4 bits each (OCP Microscaling Formats 1.0, 2023). The exponent that
the standard proposes cuts off a block's largest value where it lies above 6 steps. The next one is tried as well, and
the nearer of both results taken: so a published checkpoint's exponents are found again after training has moved its
weights a little, where always rounding the exponent down, or up, would change many of them.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slipstream.checkpoint.dequantize import BLOCKS, SCALES, files_of
from slipstream.checkpoint.export import INDEX, Writer
from slipstream.checkpoint.output import TOKENIZER_FILES, check_output_folder, check_room, write_model
from slipstream.checkpoint.passthrough import NBYTES

BLOCK = 32  # values with one exponent
MAX_SHARD = "5GB"
ROWS = 64  # at once, few enough for a cache
_PROJECTIONS = ("gate_up_proj", "down_proj")
# What the published checkpoints say.
_CONFIG = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}


@dataclass(frozen=True)
class Quantized:
    """`tensors` of experts in 4 bits; bytes of all weights; the root mean square that rounding moved the experts by, as
    a part of theirs."""

    output: Path
    tensors: int
    bytes_before: int
    bytes_after: int
    error: float


def quantize(source: Path, output: Path, *, overwrite: bool = False) -> Quantized:
    """Write the GPT-OSS checkpoint at `source` to `output` with its experts in MXFP4 and all else as it is.

    The host holds one of the new files, of at most 5 GB, and one expert.

    Args:
        source: a Hugging Face folder with safetensors in 16 or 32 bits.
        output: the folder to write: weights, config, generation config, tokenizer.
        overwrite: replace a model that `output` holds.

    Raises:
        ValueError: another architecture or layout, weights that are quantised or not finite, an output folder that must
            not be replaced. Nothing has been written then.
        OSError: a file is missing or damaged, or the disk is too small.
    """
    check_output_folder(output, [source], overwrite, "--output")
    config = _config(source)
    files = files_of(str(source), {})
    experts = {
        f"model.layers.{layer}.mlp.experts.{projection}"
        for layer in range(config["num_hidden_layers"])
        for projection in _PROJECTIONS
    }
    if missing := sorted(experts - files.keys()):
        raise ValueError(
            f"SOURCE {source}: no {missing[0]} in its safetensors; name a folder that save_pretrained wrote"
        )
    try:
        with ExitStack() as stack:
            opened = {path: stack.enter_context(safe_open(path, "pt")) for path in sorted(set(files.values()))}
            tensors = {name: opened[path].get_slice(name) for name, path in files.items()}
            return _write(source, output, config, tensors, experts)
    except SafetensorError as error:
        raise OSError(f"SOURCE {source}: a safetensors file is damaged or cut short ({error})") from error


def _config(source: Path) -> dict[str, Any]:
    if not (source / "config.json").is_file():
        raise ValueError(
            f"SOURCE {source}: no config.json there; name a Hugging Face checkpoint (merge an adapter first)"
        )
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "gpt_oss":
        raise ValueError(
            f"SOURCE {source}: its model type is {config.get('model_type')}; MXFP4 checkpoints are defined for gpt_oss "
            "only"
        )
    if "quantization_config" in config:
        raise ValueError(f"SOURCE {source}: its weights are quantised; a checkpoint in 16 or 32 bits is needed")
    return config


def _write(source: Path, output: Path, config: dict[str, Any], tensors: dict[str, Any], experts: set[str]) -> Quantized:
    sizes: dict[str, int] = {}
    before = 0
    for name, tensor in tensors.items():
        shape = tensor.get_shape()
        nbytes = prod(shape) * NBYTES[tensor.get_dtype()]
        before += nbytes
        if name not in experts:
            sizes[name] = nbytes
            continue
        if len(shape) != 3 or shape[1] % BLOCK:
            raise ValueError(
                f"SOURCE {source}: {name} is {shape}; it must be [experts, in, out], in divisible by {BLOCK}"
            )
        sizes |= {name + BLOCKS: prod(shape) // 2, name + SCALES: prod(shape) // BLOCK}
    after = sum(sizes.values())
    check_room(output, after, "--output")
    shards = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda nbytes: nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD,
    )
    moved = _Moved()
    with write_model(output) as folder:
        writer = Writer(folder, [(name, set(keys)) for name, keys in shards.filename_to_tensors.items()])
        writer.write(_converted(tensors, experts, moved))
        assert writer.is_done, "some tensors were not written"
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        text = json.dumps({**config, "quantization_config": _CONFIG}, indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        for pattern in ("generation_config.json", *TOKENIZER_FILES):
            for path in source.glob(pattern):
                shutil.copyfile(path, folder / path.name)
    return Quantized(output, len(experts), before, after, moved.relative)


@dataclass
class _Moved:
    """Sums of squares: of what rounding changed, and of what there was."""

    change: float = 0.0
    total: float = 0.0

    @property
    def relative(self) -> float:
        return sqrt(self.change / self.total) if self.total else 0.0


def _converted(tensors: dict[str, Any], experts: set[str], moved: _Moved) -> Iterator[tuple[str, Tensor]]:
    """The new checkpoint's tensors, in the order of the old one's.

    Raises: ValueError for experts that are not finite.
    """
    for name, tensor in tensors.items():
        if name not in experts:
            yield name, tensor[...]
            continue
        count, into, out = tensor.get_shape()
        blocks = torch.empty(count, out, into // BLOCK, BLOCK // 2, dtype=torch.uint8)
        scales = torch.empty(count, out, into // BLOCK, dtype=torch.uint8)
        for expert in range(count):
            weight = tensor[expert : expert + 1][0].t()
            for start in range(0, out, ROWS):
                rows = weight[start : start + ROWS].float().contiguous()
                total = rows.square().sum(dtype=torch.float64).item()
                if not isfinite(total):
                    raise ValueError(f"{name}: expert {expert} is not finite; training diverged, take an earlier save")
                packed, exponents, change = to_mxfp4(rows)
                blocks[expert, start : start + ROWS], scales[expert, start : start + ROWS] = packed, exponents
                moved.change += change
                moved.total += total
        yield name + BLOCKS, blocks
        yield name + SCALES, scales


def to_mxfp4(values: Tensor) -> tuple[Tensor, Tensor, float]:
    """Round to the nearest values of MXFP4, to even bits half way.

    `0.1, 1, 3.1, 6.3` and 28 zeros have the exponent 0: bits `0, 2, 5, 7` for `0, 1, 3, 6`, the byte 127 for `2**0`.
    Values that MXFP4 has, with 4 or 6 steps as the largest of each block, come back with the bits that they had.

    Args:
        values: `[..., 32 n]`, finite.

    Returns: two values a byte, the lower bits first `[..., n, 16]`; biased exponents `[..., n]`; the sum of squares of
        what rounding changed.
    """
    blocks = values.float().reshape(-1, BLOCK)
    largest = blocks.abs().amax(-1)
    # Such that the largest has from 4 to 8 steps, but for blocks at the end of the range.
    exponent = torch.where(largest > 0, (torch.frexp(largest).exponent - 3).clamp(min=-127), -127)
    steps = blocks.abs().mul_(torch.ldexp(torch.ones_like(largest), -exponent)[:, None])
    bits = _bits(steps)
    change = _change(bits, steps)
    # Up to 6 steps the next exponent has no value that this one lacks.
    beyond = (steps.amax(-1) > 6).nonzero().squeeze(-1)
    half = steps[beyond] / 2
    coarse = _bits(half)
    coarse_change = 4 * _change(coarse, half)
    is_nearer = coarse_change < change[beyond]
    up = beyond[is_nearer]
    bits[up], change[up] = coarse[is_nearer], coarse_change[is_nearer]
    moved = torch.ldexp(change.double(), 2 * exponent).sum().item()
    exponent[up] += 1
    nibbles = bits.to(torch.uint8) | blocks.signbit().to(torch.uint8) << 3
    packed = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    shape = (*values.shape[:-1], values.shape[-1] // BLOCK)
    return packed.view(*shape, BLOCK // 2), (exponent + 127).to(torch.uint8).view(shape), moved


def _bits(steps: Tensor) -> Tensor:
    """Which of 0, 0.5, 1, 1.5, 2, 3, 4, 6 is nearest; half way, the one with an even number.

    The number grows with the value along three lines, the lowest of which counts.
    """
    lines = (2 * steps).round_(), steps.round().add_(2), (steps / 2).round_().add_(4)
    return torch.minimum(torch.minimum(*lines[:2]), lines[2]).clamp_(max=7)


def _change(bits: Tensor, steps: Tensor) -> Tensor:
    """The sum of squares of each block between the values that `bits` stand for and `steps`."""
    values = torch.maximum(torch.maximum(bits / 2, bits - 2), 2 * bits - 8)
    return values.sub_(steps).square_().sum(-1)
