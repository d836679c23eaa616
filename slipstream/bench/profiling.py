"""Where the time of a step goes: kernels by category, launches, host time, idle GPU, and what makes the host wait.

A profiler slows the host down and so stretches the gaps between kernels. Idle time is therefore reckoned twice: within
the profiled step, and as what the kernels' busy time leaves of the step as it was timed without a profiler.
"""

import json
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from slipstream.bench.measure import PARTS, Step
from slipstream.cuda_graphs import watch

# The first pattern that a kernel's name holds decides. Optimizer kernels are told by the part that launched them.
CATEGORIES: tuple[tuple[str, str], ...] = (
    ("collectives", r"nccl|symm_mem|multimem|all_gather|reduce_scatter|all_to_all|all_reduce"),
    ("attention", r"fmha|flash|attention|attn|sdpa"),
    ("expert GEMM", r"group(ed)?_?(gemm|mm|problem)|GroupProblemShape|moe.*gemm|fused_moe|(up|down)_proj.*kernel"),
    ("loss", r"cross_entropy|nll_loss|cunn_SoftMax|liger_ce"),
    ("other GEMM", r"gemm|nvjet|cublas|cutlass|splitk|wgmma|matmul|gemv"),
    ("quantisation", r"quantize"),
    ("copies", r"memcpy|memset|direct_copy|copy_kernel|CatArray|FillFunctor|fill_"),
    ("gather, scatter, sort", r"gather|scatter|index|sort|topk|radix|cumsum|scan|histogram|bincount|searchsorted|rout"),
    (
        "elementwise, norms, RoPE",
        r"elementwise|reduce|triton_|vectorized|norm|rope|rotary|silu|swiglu|softmax|act|sum_",
    ),
)
OPTIMIZER, OTHER = "optimizer", "other"
_REGEXES = tuple((name, re.compile(pattern, re.IGNORECASE)) for name, pattern in CATEGORIES)
_DEVICE_EVENTS = {"kernel", "gpu_memcpy", "gpu_memset"}
_LAUNCHES = re.compile(r"^(cudaLaunchKernel|cuLaunchKernel|cudaGraphLaunch|cudaMemcpyAsync|cudaMemsetAsync)")


def profile(step: Step, times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Profile one warm step.

    Args:
        step: warmed up already.
        times: as `measure` returns it, to hold the kernels' busy time against.

    Returns:
        What `summarize` returns, with `host_ms` (what each part takes the host to issue, without a profiler),
        `idle_percent` (of the timed step) and `syncs` (where the host waited in forward and backward: place and count).
    """
    host_ms = _host_ms(step)
    found: dict[str, Any] = {"host_ms": host_ms, "syncs": _synchronisations(step)}
    found |= summarize(_trace(step))
    step_ms = sum(statistics.median(part) for part in times.values())
    found["step_ms"] = step_ms
    found["idle_percent"] = max(0.0, 100 * (1 - found["busy_ms"] / step_ms))
    found["layers"] = step.contender.model.config.num_hidden_layers
    return found


def summarize(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the events of a Chrome trace say about the step in them.

    Times in milliseconds. `categories`: a list of name, ms, percent of the kernels' time, and launches; `kernels`: the
    25 that took longest; `launches`: kernels, copies and fills on the device; `host_launches`: calls that issued them;
    `busy_ms`: when at least one ran; `wall_ms`: from the step's begin to its end; `idle_percent_profiled`.
    """
    spans: dict[str, tuple[float, float]] = {}
    launched: dict[int, float] = {}
    device = []
    host_launches = 0
    for event in events:
        kind, name = event.get("cat"), event.get("name", "")
        if event.get("ph") != "X":
            continue
        if kind == "user_annotation" and name.startswith("bench."):
            spans[name.removeprefix("bench.")] = (event["ts"], event["ts"] + event["dur"])
        elif kind in _DEVICE_EVENTS:
            device.append(event)
        elif kind in ("cuda_runtime", "cuda_driver"):
            launched[event["args"].get("correlation", -1)] = event["ts"]
            host_launches += bool(_LAUNCHES.match(name))

    time_by: Counter[str] = Counter()
    count_by: Counter[str] = Counter()
    kernels: dict[str, list[float]] = {}
    for event in device:
        begin, end = spans.get(OPTIMIZER, (0.0, 0.0))
        issued = launched.get(event["args"].get("correlation", -1))
        category = OPTIMIZER if issued is not None and begin <= issued < end else category_of(event["name"])
        time_by[category] += event["dur"] / 1e3
        count_by[category] += 1
        kernels.setdefault(event["name"], []).append(event["dur"] / 1e3)
    total = sum(time_by.values())
    busy = _merged([(event["ts"], event["ts"] + event["dur"]) for event in device]) / 1e3
    begin, end = spans.get("step", (0.0, 0.0))
    wall = (end - begin) / 1e3
    return {
        "categories": [
            {"name": name, "ms": ms, "percent": 100 * ms / total if total else 0.0, "launches": count_by[name]}
            for name, ms in time_by.most_common()
        ],
        "kernels": [
            {"name": name, "ms": sum(times), "count": len(times), "category": category_of(name)}
            for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:25]
        ],
        "launches": len(device),
        "host_launches": host_launches,
        "kernel_ms": total,
        "busy_ms": busy,
        "wall_ms": wall,
        "idle_percent_profiled": max(0.0, 100 * (1 - busy / wall)) if wall else 0.0,
    }


def category_of(kernel: str) -> str:
    """The category of a kernel, by its name."""
    return next((name for name, regex in _REGEXES if regex.search(kernel)), OTHER)


def _merged(spans: list[tuple[float, float]]) -> float:
    """The length of the union: kernels on several streams overlap."""
    covered, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


def _trace(step: Step) -> list[dict[str, Any]]:
    cuda = _is_cuda(step)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch_profile(activities=activities):  # starting it the first time takes long
        torch.zeros(1, device=step.batch["input_ids"].device)
    _synchronize(cuda)
    with torch_profile(activities=activities) as profiler, record_function("bench.step"):
        for name, part in zip(PARTS, step.parts, strict=True):
            with record_function(f"bench.{name}"):
                part()
        _synchronize(cuda)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(errors="replace"))["traceEvents"]


def _host_ms(step: Step) -> dict[str, float]:
    """How long the host takes to issue each part, when the device has nothing queued before it."""
    taken = {}
    for name, part in zip(PARTS, step.parts, strict=True):
        _synchronize(_is_cuda(step))
        start = time.perf_counter()
        part()
        taken[name] = (time.perf_counter() - start) * 1e3
    _synchronize(_is_cuda(step))
    return taken


def _synchronisations(step: Step) -> list[dict[str, Any]]:
    """Where forward and backward make the host wait for the device, and how often."""
    if not _is_cuda(step):
        return []

    def forward_backward() -> None:
        step.forward()
        step.backward()

    _synchronize(True)
    _, places = watch(forward_backward)
    step.optimizer()
    _synchronize(True)
    return [{"place": place, "count": count} for place, count in places.most_common()]


def _is_cuda(step: Step) -> bool:
    return step.batch["input_ids"].device.type == "cuda"


def _synchronize(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()
