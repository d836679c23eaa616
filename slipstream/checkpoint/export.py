"""Saving a distributed model in its original Hugging Face layout, every rank writing its own part.

No rank holds more than one file's tensors beyond its own weights. The folder changes at the very end, when all files
are complete: an interrupted save leaves what was there before.
"""

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import accumulate, product, zip_longest
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from slipstream import hf
from slipstream.checkpoint import passthrough
from slipstream.checkpoint.export_plan import (
    Holding,
    Part,
    Plan,
    Reversal,
    Span,
    Spans,
    avoid_names_in_use,
    extents,
    file_names,
    make_plan,
)
from slipstream.checkpoint.output import INCOMPLETE, WEIGHTS
from slipstream.checkpoint.team import Team
from slipstream.parallel.setup import rank_and_ranks
from slipstream.parallel.units import class_of

ONE_FILE_BYTES = 2**30  # up to here rank 0 writes alone: parallel writing gains less than a second
INDEX = "model.safetensors.index.json"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def install_save(model: PreTrainedModel) -> None:
    """Make `model.save_pretrained(folder)` use `export`."""
    # A bound method of this name, because copy.deepcopy binds it anew to the copy and pickle stores it by name.
    model.save_pretrained = MethodType(save_pretrained, model)  # type: ignore[method-assign]


def save_pretrained(self: PreTrainedModel, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """`export`; Transformers' own method where it is asked for something that `export` does not do.

    Raises: as `export`.
    """
    given = {name: value for name, value in kwargs.items() if name not in _DEFAULTS or value != _DEFAULTS[name]}
    theirs = given.keys() - {"save_dtype", "max_shard_size", "is_main_process", "save_peft_format"}
    if not theirs and not hf.holds_adapters_or_quantised(self):
        export(self, save_directory, **given)
        return
    if "save_dtype" in given:
        raise ValueError(
            f"save_dtype does not go together with {', '.join(sorted(theirs)) or 'adapters or quantised weights'}"
        )
    type(self).save_pretrained(self, save_directory, **kwargs)


_DEFAULTS = {"state_dict": None, "push_to_hub": False, "variant": None, "token": None, "save_original_format": True,
             "distributed_checkpoint": False, "save_dtype": None}  # fmt: skip


@torch.no_grad()
def export(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    save_dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    **save_pretrained_kwargs: Any,
) -> None:
    """Write `model` as plain Transformers' `save_pretrained` on one process would. Call it on all ranks.

    Tensors for multi-token prediction that the model was loaded without are copied from the checkpoint it came from.

    Args:
        model: distributed or not; it stays as it is.
        directory: on a file system that all ranks share; rank 0's counts. Its other files stay.
        save_dtype: what floating-point weights are cast to on the way, but for those that the model keeps in fp32.
        max_shard_size: of a file, in bytes or like "5GB"; a tensor that is larger gets its own.
        save_pretrained_kwargs: `is_main_process` and `save_peft_format`, which change nothing here.

    Raises:
        ValueError: an argument that is out of range or not supported, a model with adapters or quantised weights.
        RuntimeError: a rank failed; raised on all ranks with its message. The folder is as it was.
    """
    unknown = save_pretrained_kwargs.keys() - {"is_main_process", "save_peft_format"}
    if unknown:
        raise ValueError(f"export does not support {', '.join(sorted(unknown))}; use Transformers' save_pretrained")
    if hf.holds_adapters_or_quantised(model):
        raise ValueError("export writes plain weights; save adapters or quantised weights with Transformers")
    max_shard_bytes, dtype = _bytes(max_shard_size), _dtype(save_dtype)
    rank, team = rank_and_ranks()[0], Team()

    tensors: dict[str, torch.Tensor] = {}
    held: dict[str, Holding] = {}
    with team:
        tensors = passthrough.under_source_names(model, hf.saved_tensors(model))
        held = {name: Holding.of(tensor) for name, tensor in tensors.items()}
    shared = team.share((os.path.abspath(directory), held))
    folder, incomplete = Path(shared[0][0]), Path(shared[0][0]) / INCOMPLETE

    reversal, saved_dtype = hf.Reversal(model), _saved_dtype(model, dtype)
    plan = Plan([], [])
    totals: set[int] = set()
    try:
        with team:
            plan = make_plan([held for _, held in shared], reversal, saved_dtype, max_shard_bytes, ONE_FILE_BYTES,
                             passthrough.sizes(model))  # fmt: skip
            if rank == 0:
                shutil.rmtree(incomplete, ignore_errors=True)
                incomplete.mkdir(parents=True)
                totals = _totals_in_use(folder)
        avoid_names_in_use(plan, team.share(totals)[0])
        names = file_names(plan)
        writer = Writer(incomplete, [(name, set(keys)) for name, (of, keys) in zip(names, plan.shards, strict=True)
                                      if of == rank])  # fmt: skip
        with team:
            if not incomplete.is_dir():
                raise FileNotFoundError(f"{incomplete}, made by rank 0, is not there: save to a file system all share")
        for part, gathered in _gathered(plan, tensors, held, [held for _, held in shared], team):
            with team:
                if team.error is None:
                    if part.names:
                        writer.write(_converted(part, gathered, reversal, saved_dtype))
                    else:
                        writer.write((name, passthrough.read(model, name)) for name in part.outputs)
        with team:
            assert team.error or writer.is_done, "some tensors were not written"
        team.share(None)
        with team:
            if rank == 0:
                _write_rest(model, incomplete, dtype, plan, names)
                _publish(incomplete, folder)
        team.share(None)
        passthrough.follow(model, folder, {key: names[at] for at, (_, keys) in enumerate(plan.shards) for key in keys})
    finally:
        if rank == 0:
            shutil.rmtree(incomplete, ignore_errors=True)


class Writer:
    """Collects this rank's tensors and writes each file once it has all of its own."""

    def __init__(self, folder: Path, files: list[tuple[str, set[str]]]) -> None:
        self._folder, self._files = folder, files
        self._waiting: dict[str, torch.Tensor] = {}

    @property
    def is_done(self) -> bool:
        return not self._files

    def write(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        for key, tensor in tensors:
            self._waiting[key] = tensor.to("cpu").contiguous()
            del tensor
            while self._files and self._files[0][1] <= self._waiting.keys():
                name, keys = self._files.pop(0)
                write_shard(self._folder / name, {key: self._waiting.pop(key) for key in sorted(keys)})


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write one file and bring it to the disk."""
    save_file(tensors, path, metadata={"format": "pt"})
    _sync(path)


def _converted(
    part: Part, tensors: dict[str, torch.Tensor], reversal: Reversal, saved_dtype: Callable[..., torch.dtype]
) -> Iterator[tuple[str, torch.Tensor]]:
    cast = {name: tensor.to(saved_dtype(name, tensor.dtype)) for name, tensor in tensors.items()}
    converted = reversal.convert(cast)
    for name in list(converted):
        yield part.renamed.get(name, name), converted.pop(name)


def _gathered(
    plan: Plan,
    tensors: dict[str, torch.Tensor],
    held: dict[str, Holding],
    holdings: list[dict[str, Holding]],
    team: Team,
) -> Iterator[tuple[Part, dict[str, torch.Tensor]]]:
    """This rank's parts with their tensors. Takes part in the other ranks' gathers meanwhile."""
    rank, _ = rank_and_ranks()
    # All writers gather at the same time, a tensor of each per step.
    queues = [[(part, name) for part in parts if not part.is_local for name in part.names] for parts in plan.parts]
    whole: dict[str, torch.Tensor] = {}
    for step in zip_longest(*queues):
        gathered = _gather_step(step, tensors, held, holdings, team)
        if (wanted := step[rank]) is None:
            continue
        part, name = wanted
        if gathered is not None:
            whole[name] = gathered
        if name == part.names[-1]:
            yield part, whole
            whole = {}
    for part in plan.parts[rank]:
        if part.is_local:
            yield part, {name: _local_rows(tensors[name], held[name], part.rows) for name in part.names}


def _gather_step(
    step: tuple[tuple[Part, str] | None, ...],
    tensors: dict[str, torch.Tensor],
    held: dict[str, Holding],
    holdings: list[dict[str, Holding]],
    team: Team,
) -> torch.Tensor | None:
    """Send the pieces that the others want in this step, and return the tensor this rank wants, on the CPU.

    One piece is sent and one received at a time, so little memory is needed beyond the result.
    """
    rank, world = rank_and_ranks()
    wanted, whole = step[rank], None
    if wanted is not None:
        part, name = wanted
        known = holdings[part.sources[name][0]][name]
        shape = known.shape if part.rows is None else (part.rows[1] - part.rows[0], *known.shape[1:])
        with team:
            whole = torch.empty(shape, dtype=known.dtype)
            if rank in part.sources[name]:
                _place(whole, _local_rows(tensors[name], held[name], part.rows), held[name].within(part.rows))
    for distance in range(1, world):
        receiver, sender = (rank + distance) % world, (rank - distance) % world
        operations: list[dist.P2POp] = []
        incoming: tuple[torch.Tensor, Spans] | None = None
        if (request := step[receiver]) is not None and rank in request[0].sources[request[1]]:
            piece = _local_rows(tensors[request[1]], held[request[1]], request[0].rows).to(_exchange_device())
            operations.append(dist.P2POp(dist.isend, _as_bytes(piece.contiguous()), receiver))
        if wanted is not None and sender in wanted[0].sources[wanted[1]]:
            spans = holdings[sender][wanted[1]].within(wanted[0].rows)
            theirs = torch.empty(extents(spans), dtype=holdings[sender][wanted[1]].dtype, device=_exchange_device())
            operations.append(dist.P2POp(dist.irecv, _as_bytes(theirs), sender))
            incoming = theirs, spans
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        if incoming is not None and whole is not None:
            with team:
                _place(whole, *incoming)
    return whole


def _local_rows(tensor: torch.Tensor, held: Holding, rows: Span | None) -> torch.Tensor:
    """What this rank has of `rows`, a view."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
    if rows is None:
        return local
    before = sum(min(stop, rows[0]) - start for start, stop in held.spans[0] if start < rows[0])
    return local.narrow(0, before, extents(held.within(rows))[0])


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, because not every backend takes every dtype."""
    return tensor.view(-1).view(torch.uint8)


def _place(whole: torch.Tensor, piece: torch.Tensor, spans: Spans) -> None:
    """Copy `piece` to where in `whole` its indices are `spans`."""
    runs = []
    for dim in spans:
        ends = accumulate(stop - start for start, stop in dim)
        runs.append([(slice(*span), slice(end - span[1] + span[0], end)) for span, end in zip(dim, ends, strict=True)])
    for run in product(*runs):
        whole[tuple(to for to, _ in run)] = piece[tuple(of for _, of in run)].to(whole.device)


def _write_rest(model: PreTrainedModel, folder: Path, dtype: torch.dtype | None, plan: Plan, names: list[str]) -> None:
    """The files beside the weights, which rank 0 writes."""
    config = copy.deepcopy(model.config)
    config.dtype = str(dtype or model.dtype).removeprefix("torch.")
    config.architectures = [class_of(model).__name__]
    hf.save_modelling_code(model, config, folder)
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if len(names) > 1:
        sizes = {name: size for parts in plan.parts for part in parts for name, size in part.outputs.items()}
        weight_map = {key: name for name, (_, keys) in zip(names, plan.shards, strict=True) for key in keys}
        metadata = {"total_parameters": model.num_parameters(), "total_size": sum(sizes.values())}
        index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
        (folder / INDEX).write_text(index + "\n", encoding="utf-8")
    for path in folder.iterdir():
        if path.is_file():
            _sync(path)


def _publish(incomplete: Path, folder: Path) -> None:
    """Move the new model's files into the folder. The index, or the only weights file, is what makes them valid."""
    new = sorted(path.relative_to(incomplete) for path in incomplete.rglob("*") if path.is_file())
    weights = [path for path in new if path.suffix == ".safetensors"]
    if len(weights) > 1 and any((folder / path).exists() for path in weights):
        (folder / INDEX).unlink(missing_ok=True)  # rather no model for a moment than parts of two
    last = [Path(INDEX)] if len(weights) > 1 else weights
    last += [Path("generation_config.json"), Path("config.json")]
    for path in sorted(new, key=lambda path: last.index(path) if path in last else -1):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (incomplete / path).replace(folder / path)
        if path in last:
            _sync(folder)
    for old in folder.iterdir():
        # Transformers would load it instead of the new model, or beside it.
        obsolete = WEIGHTS.fullmatch(old.name) or old.name == "generation_config.json"
        if obsolete and Path(old.name) not in new and old.is_file():
            old.unlink()
    _sync(folder)


def _totals_in_use(folder: Path) -> set[int]:
    """NN of the files `model-…-of-NN` in the folder."""
    return {int(match[1]) for path in folder.iterdir() if (match := re.search(r"-of-(\d{5})\.safetensors$", path.name))}


def _saved_dtype(model: PreTrainedModel, dtype: torch.dtype | None) -> Callable[[str, torch.dtype], torch.dtype]:
    if dtype is None:
        return lambda name, own: own
    in_float32 = hf.kept_in_float32(model, dtype)

    def saved(name: str, own: torch.dtype) -> torch.dtype:
        if not own.is_floating_point:
            return own
        return torch.float32 if in_float32 is not None and in_float32.search(name) else dtype

    return saved


def _bytes(size: int | str) -> int:
    number: float = 0 if isinstance(size, str) else size
    if isinstance(size, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", size)):
        number = float(match[1]) * _UNITS.get(match[2].upper(), 0)
    if number < 1:
        raise ValueError(f"max_shard_size={size!r} is not a size; use a number of bytes or a string like '5GB'")
    return int(number)


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if given is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"save_dtype={given!r} is not a floating-point dtype; use torch.bfloat16 or 'bfloat16'")
    return dtype


def _exchange_device() -> torch.device:
    """Where the process group wants its tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
