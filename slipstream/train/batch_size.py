"""How many rows a micro-batch has: the largest power of two that fits, found by steps on real rows.

Running out of memory on one rank would leave the others waiting in a collective. So nothing is tried that is not
expected to fit on every rank: memory grows with the tokens of a micro-batch along a straight line, which smaller
trials give.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from transformers import TrainingArguments

from slipstream import hf, hf_trainer
from slipstream.checkpoint.training_state import rng_state, set_rng_state
from slipstream.parallel.setup import DistributedSetup
from slipstream.train.checks import micro_batches
from slipstream.train.packing import count_tokens
from slipstream.train.recipe import Recipe

# What a trial may use of the memory that training can have: rows of other lengths leave gaps between each other.
USABLE = 0.9
ON_CPU = 8


@dataclass(frozen=True)
class Memory:
    """The most bytes that a trial step had in use: in forward and backward, and in the optimizer's update."""

    backward: int
    update: int


def set_rows_per_step(recipe: Recipe, args: TrainingArguments) -> None:
    """Set `args.gradient_accumulation_steps` so that a step has the rows that the recipe asks for.

    With `per_device_train_batch_size: auto` the micro-batch has one row until `find_batch_size` has found more.

    Raises: ValueError when no whole number of micro-batches makes `global_batch_size` rows.
    """
    streams = args.world_size // DistributedSetup.of(recipe.distributed).tp_size
    args.gradient_accumulation_steps = micro_batches(recipe.train, streams)


def find_batch_size(trainer: Any, max_length: int, known: int | None = None) -> str:
    """Give `trainer`, which has not trained yet, the largest micro-batch that fits, and say so in a sentence.

    Its micro-batch has one row before. The rows of a step stay as many: it accumulates less. Weights, optimizer and
    random numbers are as before. Call it on all ranks.

    Args:
        trainer: a `SlipstreamTrainer`.
        max_length: tokens of the longest row there can be.
        known: what an earlier part of the run has found; taken again, if it divides the rows.

    Raises: torch.OutOfMemoryError when not even one row fits.
    """
    rows = trainer.args.gradient_accumulation_steps  # micro-batches of one row
    device = trainer.args.device
    if known is not None and rows % known == 0:
        size, why = known, "as before"
    elif device.type != "cuda":
        size, why = largest_power(rows, ON_CPU), "there is no limit to find on a CPU"
    else:
        trial = TrialStep(trainer, max_length)
        limit = agreed(int(USABLE * memory_limit(device)), dist.ReduceOp.MIN, device)
        size, peak = search(trial, rows, trial.length, limit, lambda value: agreed(value, dist.ReduceOp.MAX, device))
        trial.finish()
        why = f"{size} x {trial.length} tokens need {peak / 2**30:.1f} of {limit / 2**30:.1f} GiB"
    hf_trainer.set_batch_size(trainer, size)
    trainer.args.gradient_accumulation_steps = rows // size
    return f"micro-batch: {size} rows a device, {rows // size} for each step ({why})"


def largest_power(rows: int, limit: int) -> int:
    """The largest power of two up to `limit` that divides `rows`."""
    size = 1
    while size * 2 <= limit and rows % (size * 2) == 0:
        size *= 2
    return size


def search(
    trial: Callable[[int], Memory], rows: int, length: int, limit: int, agree: Callable[[int], int]
) -> tuple[int, int]:
    """The largest power of two that divides `rows` and whose memory stays below `limit`, and that memory.

    Args:
        trial: measures a step on so many tokens, at most `length` a row.
        rows: of a step, on this device.
        length: tokens of the longest row.
        limit: bytes, the same on all ranks.
        agree: the largest of what the ranks have.
    """
    half, one = trial(max(1, length // 2)), trial(length)
    last, before, tokens_before = one, half, max(1, length // 2)
    size, peak = 1, agree(max(one.backward, one.update))
    while rows % (size * 2) == 0:
        slope = max(0, last.backward - before.backward) / (size * length - tokens_before)
        expected = max(last.update, last.backward + slope * size * length)
        if agree(int(expected)) > limit:
            break
        before, tokens_before = last, size * length
        size *= 2
        try:
            last = trial(size * length)
        except torch.OutOfMemoryError:
            # Alone, one can go back. With others waiting in a collective, only ending helps.
            if dist.is_initialized() and dist.get_world_size() > 1:
                raise
            return size // 2, peak
        peak = agree(max(last.backward, last.update))
        if peak > limit:
            return size // 2, agree(max(before.backward, before.update))
    return size, peak


class TrialStep:
    """A training step whose update changes nothing: gradients are set to zero before it, and so is the rate.

    Takes different rows of the data, each repeated up to the length of the longest, so that experts get a usual load.
    """

    def __init__(self, trainer: Any, max_length: int) -> None:
        self._trainer, self._device = trainer, trainer.args.device
        self._rng = rng_state()
        data = trainer.train_dataset
        self._rows = list(islice(iter(data), 64))
        longest = max(map(len, data["input_ids"])) if isinstance(data, Dataset) else max_length
        self.length = min(longest, max_length) if "seq_lengths" not in self._rows[0] else max_length
        if trainer.args.activation_checkpointing:  # as `train` will
            trainer.model.activation_checkpointing_enable(
                activation_checkpointing_kwargs=dict(trainer.args.activation_checkpointing_kwargs or {}) or None
            )
        for module in trainer.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        trainer.create_optimizer()
        for group in trainer.optimizer.param_groups:
            group["lr"] = 0.0

    def __call__(self, tokens: int) -> Memory:
        """A step on so many tokens, whole rows or a part of one, as training makes them.

        The first step of a size may compile, which tries kernels out in memory of its own; the very first makes the
        optimizer's state. So it is the second that counts.
        """
        self._step(tokens)
        return self._step(tokens)

    def _step(self, tokens: int) -> Memory:
        trainer, model, optimizer = self._trainer, self._trainer.model, self._trainer.optimizer
        self._empty_cache()
        self._reset_peak()
        model.train()
        rows = self._batch(tokens)
        collate = replace(trainer.data_collator, max_length=len(rows[0]["input_ids"]))  # it fills packed rows up
        inputs = trainer._prepare_inputs(collate(rows))
        count_tokens(inputs)  # takes out what the model does not take
        trained = torch.tensor(float(tokens), device=self._device)
        trainer.current_gradient_accumulation_steps = 1
        with trainer.accelerator.autocast(), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs, num_items_in_batch=trained)
        trainer.accelerator.backward(loss)
        del loss, inputs
        backward = self._peak() + self._buckets(model)
        self._reset_peak()
        torch._foreach_zero_([_local(p.grad) for p in model.parameters() if p.grad is not None])
        optimizer.step()
        update = self._peak() + self._buckets(model)
        optimizer.zero_grad()
        return Memory(backward, update)

    def finish(self) -> None:
        """Leave the trainer as if nothing had happened."""
        trainer = self._trainer
        trainer.optimizer = None
        trainer.model.zero_grad()
        trainer.routers.forget()
        set_rng_state(self._rng)
        self._empty_cache()

    def _batch(self, tokens: int) -> list[dict[str, Any]]:
        lengths = [self.length] * (tokens // self.length) or [tokens]
        return [_stretched(self._rows[number % len(self._rows)], length) for number, length in enumerate(lengths)]

    def _buckets(self, model: torch.nn.Module) -> int:
        """Bytes that DDP adds when training begins: its buckets hold a copy of the gradients."""
        if not dist.is_initialized() or dist.get_world_size() == 1 or hf.is_distributed(model):  # type: ignore[arg-type]
            return 0
        return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0

    def _reset_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def _empty_cache(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _stretched(row: dict[str, Any], length: int) -> dict[str, Any]:
    """A row of exactly `length` tokens: the row again and again. Packed, its documents with it."""
    times = -(-length // len(row["input_ids"]))
    new = {key: (list(row[key]) * times)[:length] for key in ("input_ids", "labels")}
    if "seq_lengths" in row:
        lengths: list[int] = []
        for document in list(row["seq_lengths"]) * times:
            if (left := length - sum(lengths)) > 0:
                lengths.append(min(document, left))
        new["seq_lengths"] = lengths
    return new


def _local(grad: Any) -> torch.Tensor:
    return grad.to_local() if hasattr(grad, "to_local") else grad  # type: ignore[no-any-return]


def memory_limit(device: torch.device) -> int:
    """Bytes that this process can have on its GPU: what is free, and what it holds already."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def agreed(value: int, how: Any, device: torch.device) -> int:
    """`value` reduced over all ranks, so that they decide alike."""
    tensor = torch.tensor(value, dtype=torch.int64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, how)
    return int(tensor)
