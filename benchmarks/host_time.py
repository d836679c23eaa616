"""What the host and the GPU each take for a training step, and the step as a CUDA graph.

    python benchmarks/host_time.py bart biogpt biogpt:plain

Architectures as `slipstream coverage --speed` has them, `:plain` for Transformers with torch's fused AdamW. The host's
times are those until forward, backward and the optimizer's step return, each step begun on an idle GPU.
"""

import argparse
import gc
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

import slipstream
from slipstream.coverage.shapes import timed_config
from slipstream.cuda_graphs import GraphedStep
from slipstream.optim import AdamW

TOKENS, WARMUP, STEPS = 4096, 5, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", help="model types of Transformers, with :plain for Transformers' own step")
    for given in parser.parse_args().models:
        name, _, kind = given.partition(":")
        _measure(name, plain=kind == "plain")
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _measure(name: str, plain: bool) -> None:
    config = timed_config(name, TOKENS)
    config.use_cache = False
    torch.manual_seed(0)
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    if not plain:
        slipstream.accelerate(model)
        optimizer = AdamW(model.parameters())
    ids = torch.randint(5, config.vocab_size, (1, TOKENS), device="cuda")
    batch = {"input_ids": ids, "labels": ids}
    host: Counter[str] = Counter()

    def part(what: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        out = run()
        host[what] += time.perf_counter() - start
        return out

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def step() -> None:
        loss = part("forward", lambda: model(**batch).loss)
        part("backward", loss.backward)
        part("optimizer", update)

    for _ in range(WARMUP):
        step()
    host.clear()
    for _ in range(STEPS):
        step()
        torch.cuda.synchronize()
    told = ", ".join(f"{what} {seconds / STEPS * 1e3:.1f}" for what, seconds in host.items())
    line = f"{_back_to_back(step):.1f} ms back to back; host: {told}; GPU: {_gpu_ms(step):.1f}"
    if plain:
        print(f"{name} of Transformers: {line}", flush=True)
        return
    graphed = GraphedStep(model)

    def replay() -> None:
        graphed(batch)
        update()

    for _ in range(WARMUP + 1):
        replay()
    graph = f"{_back_to_back(replay):.1f}" if graphed.captured else f"none, {graphed.reason}"
    print(f"{name}: {line}; as a CUDA graph: {graph}", flush=True)


def _back_to_back(step: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS * 1e3


def _gpu_ms(step: Callable[[], None]) -> float:
    """The sum of a step's kernels."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    kernels = (e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return sum(kernel.device_time for kernel in kernels if "Optimizer.step" not in kernel.name) / 1e3


if __name__ == "__main__":
    main()
