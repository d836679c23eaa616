"""Expert parallelism over two gloo ranks, every architecture in the same pair of processes."""

import multiprocessing
import os
import tempfile
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from slipstream.coverage.compare import (
    Attempt,
    Cell,
    compared,
    limit_of,
    loss_and_gradients,
    saved_tensors,
    worst_gradient,
)
from slipstream.coverage.tiny import tiny_batch

RANKS = 2
SECONDS = 120.0  # an architecture's time; the first has the imports of both processes in it
_EXPECTED = "expected.pt"
_LENGTHS = (32, 24)


def prepare(reference: PreTrainedModel, folder: Path) -> None:
    """Leave in `folder` the checkpoint of a model, and what one process gets for the mean over the ranks' batches."""
    reference.save_pretrained(folder)
    losses, total = [], dict[str, torch.Tensor]()
    for rank in range(RANKS):
        reference.zero_grad()
        loss, grads = loss_and_gradients(reference, _batch(rank))
        losses.append(loss)
        for name, grad in grads.items():
            total[name] = total[name] + grad / RANKS if name in total else grad / RANKS
    torch.save({"loss": torch.stack(losses).mean(), "grads": total, "limit": limit_of(reference)}, folder / _EXPECTED)


def check_expert_parallelism(folders: dict[str, Path]) -> dict[str, Cell]:
    """`ep_size=2` on what `prepare` left, by model type: loss, every gradient, and the checkpoint saved again.

    A pair of processes that fails at one architecture is replaced for the rest.
    """
    left, cells = dict(folders), dict[str, Cell]()
    context = multiprocessing.get_context("spawn")
    while left:
        with tempfile.TemporaryDirectory() as scratch:
            pipes, processes = [], []
            for rank in range(RANKS):
                ours, theirs = context.Pipe(duplex=False)
                job = (theirs, scratch, rank, {name: str(path) for name, path in left.items()})
                process = context.Process(target=_rank, args=job, daemon=True)
                process.start()
                theirs.close()
                pipes.append(ours)
                processes.append(process)
            try:
                for name in list(left):
                    del left[name]
                    heard = [_heard(pipe) for pipe in pipes]
                    failed = [text for kind, text in heard if kind == "failed"]
                    cells[name] = Cell("failed", failed[0]) if failed else Cell(*heard[0])
                    if failed:
                        break
            finally:
                for process in processes:
                    process.kill()
                    process.join()
    return cells


def _heard(pipe: Connection) -> tuple[str, str]:
    if not pipe.poll(SECONDS):
        return "failed", f"no result within {SECONDS:g} s"
    try:
        status, text = pipe.recv()
    except EOFError:
        return "failed", "the process died"
    return status, text


def _batch(rank: int) -> torch.Tensor:
    return tiny_batch(1, _LENGTHS[rank], seed=10 + rank)


def _rank(pipe: Connection, scratch: str, rank: int, folders: dict[str, str]) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=SECONDS)
    )
    for name, folder in folders.items():
        attempt = Attempt()
        with attempt:
            cell = _step(Path(folder), Path(scratch, name))
            pipe.send((cell.status, cell.text))
        if attempt.error:
            pipe.send(("failed", attempt.error))


def _step(folder: Path, again: Path) -> Cell:
    import slipstream

    model = slipstream.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_setup={"ep_size": RANKS}
    )
    loss, grads = loss_and_gradients(model.train(), _batch(dist.get_rank()))
    mean = loss.clone()
    dist.all_reduce(mean)
    whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
    expected: dict[str, Any] = torch.load(folder / _EXPECTED)
    error = abs(mean / RANKS / expected["loss"] - 1).item()
    cell = compared(error, worst_gradient(whole, expected["grads"]), expected["limit"] * 10)
    model.save_pretrained(again)
    before, after = saved_tensors(folder), saved_tensors(again)
    if list(before) != list(after) or not all(torch.equal(before[name], after[name]) for name in before):
        return Cell("failed", "saves other tensors than were loaded")
    return cell
