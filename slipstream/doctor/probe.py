"""What a rank of `slipstream doctor` does: python -m slipstream.doctor.probe NAME DEVICE STORE SECONDS."""

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

MIB = 2**20


def symmetric_memory(device: torch.device) -> dict[str, Any]:
    """Sums a number over ranks by reading the others' memory.

    Raises:
        RuntimeError: PyTorch cannot set it up, or the sum is wrong.
    """
    from torch.distributed import _symmetric_memory as symmetric

    world = dist.group.WORLD
    assert world is not None
    name, rank, ranks = world.group_name, dist.get_rank(), dist.get_world_size()
    mine = symmetric.empty(4096, dtype=torch.float32, device=device)
    symmetric.rendezvous(mine, name)
    mine.fill_(rank + 1)
    summed = torch.ops.symm_mem.one_shot_all_reduce(mine, "sum", name)
    right = ranks * (ranks + 1) / 2
    if not bool((summed == right).all()):
        raise RuntimeError(f"symmetric memory gave {summed[0].item()} where {right} is right")
    return {"ranks": ranks}


def bandwidth(device: torch.device, mib: int = 256, repeats: int = 20) -> dict[str, Any]:
    """GB/s of a rank in one direction: what NCCL's own tests call bus bandwidth, which a link's data sheet bounds."""
    ranks = dist.get_world_size()
    sent = torch.zeros(mib * MIB // 4 // ranks * ranks, dtype=torch.float32, device=device)
    received = torch.empty_like(sent)
    moved = sent.numel() * 4 * (ranks - 1) / ranks / 1e9
    return {
        "ranks": ranks,
        "mib": mib,
        "all_reduce": 2 * moved / _seconds(lambda: dist.all_reduce(sent), device, repeats),
        "all_to_all": moved / _seconds(lambda: dist.all_to_all_single(received, sent), device, repeats),
    }


def small_bandwidth(device: torch.device) -> dict[str, Any]:
    """The same in a moment, for tests without GPUs."""
    return bandwidth(device, mib=1, repeats=2)


PROBES: dict[str, Callable[[torch.device], dict[str, Any]]] = {
    probe.__name__: probe for probe in (symmetric_memory, bandwidth, small_bandwidth)
}


def _seconds(operation: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of one call, on the slowest rank."""
    for _ in range(3):
        operation()
    _wait(device)
    started = time.perf_counter()
    for _ in range(repeats):
        operation()
    _wait(device)
    taken = torch.tensor((time.perf_counter() - started) / repeats, dtype=torch.float64, device=device)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken.item()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    name, kind, store, seconds = sys.argv[1:]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=store,
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=float(seconds)),
        device_id=device if kind == "cuda" else None,
    )
    answer = PROBES[name](device)
    if rank == 0:
        print(json.dumps(answer))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
