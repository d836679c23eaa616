"""Times one operation at a time: CUDA events on a GPU, with a cold L2 cache, or the wall clock on a CPU."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

_FLUSH_BYTES = 256 * 2**20  # more than any L2 cache


def time_ms(
    operation: Callable[[], Any], device: torch.device, *, iterations: int = 20, warmup: int = 5, flush: bool = True
) -> dict[str, float]:
    """`median`, `min` and `max` milliseconds of `operation`.

    Nothing synchronises between the iterations, so that the host runs ahead where it can, as it does in training.

    Args:
        flush: overwrite the L2 cache before each iteration, outside the timed part. Not needed for an operation that
            reads more than it holds.
    """
    for _ in range(warmup):
        operation()
    if device.type != "cuda":
        times = []
        for _ in range(iterations):
            start = time.perf_counter()
            operation()
            times.append((time.perf_counter() - start) * 1e3)
        return _spread(times)
    scratch = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if flush else None
    marks = []
    for _ in range(iterations):
        if scratch is not None:
            scratch.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        operation()
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    return _spread([begin.elapsed_time(end) for begin, end in marks])


def peak_above_gib(operation: Callable[[], Any], device: torch.device) -> float:
    """GiB that `operation` takes beyond what is allocated before it; 0 on a CPU."""
    if device.type != "cuda":
        operation()
        return 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    operation()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def copy_bandwidth(device: torch.device, size: int = 2**31) -> float:
    """GB/s of a copy within device memory, bytes read and bytes written, measured here and now."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = time_ms(lambda: target.copy_(source), device, iterations=10, flush=False)["median"]
    return 2 * size / ms / 1e6


def parse_device(name: str) -> torch.device:
    """The device `name` ("cuda" or "cpu") of this process.

    Raises:
        ValueError: there is none, or another name.
    """
    check_device(name)
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def check_device(name: str) -> str:
    """`name`, if this machine has it. Does not touch the GPU: a process that only starts others must hold none of it.

    Raises:
        ValueError: there is no such device here.
    """
    if name not in ("cuda", "cpu"):
        raise ValueError(f"--device {name}: use cuda or cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; use --device cpu --tiny")
    return name


def _spread(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}
