"""Times the parts of a training step: forward with loss, backward, optimizer with zero_grad.

CUDA events on a GPU, the wall clock on a CPU. Every step ends in a synchronisation, outside the timed parts; then as
many steps run back to back, as in training, where the host prepares the next step while the GPU works on this one.
"""

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from slipstream.bench.contenders import Batch, Contender
from slipstream.bench.options import Options

PARTS = ("forward", "backward", "optimizer")
GIB = 2**30


def token_ids(config: PretrainedConfig) -> int:
    """How many tokens `config`'s model has logits for; a head may be padded beyond (Inkling's is)."""
    text = config.get_text_config()
    return min(text.vocab_size, getattr(text, "unpadded_vocab_size", None) or text.vocab_size)


def make_batch(options: Options, vocab_size: int, device: torch.device, rank: int) -> Batch:
    """Random tokens that are their own labels, the same for every contender and others on every rank."""
    generator = torch.Generator().manual_seed(1000 + rank)
    ids = torch.randint(0, vocab_size, (options.micro_batch, options.seq_len), generator=generator).to(device)
    batch = {"input_ids": ids, "labels": ids}
    if options.packed is not None:
        positions = torch.arange(options.packed, device=device).repeat(options.seq_len // options.packed)
        batch["position_ids"] = positions.expand(options.micro_batch, -1).contiguous()
    return batch


class Step:
    """One training step of a contender, part by part."""

    def __init__(self, contender: Contender, batch: Batch) -> None:
        self.contender, self.batch = contender, batch
        self._loss: Any = None

    @property
    def parts(self) -> tuple[Callable[[], None], ...]:
        """The parts, in the order of `PARTS`."""
        return self.forward, self.backward, self.optimizer

    def forward(self) -> None:
        graphed = self.contender.graphed
        self._loss = self.contender.loss(self.batch) if graphed is None else graphed(self.batch)

    def backward(self) -> None:
        if self.contender.graphed is None:
            self._loss.backward()

    def optimizer(self) -> None:
        for optimizer in self.contender.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def loss(self) -> float:
        """The last loss, the mean over the ranks."""
        loss = self._loss.detach().float()
        loss = loss.full_tensor() if hasattr(loss, "full_tensor") else loss.clone()
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        return loss.item()

    def timed(self) -> dict[str, float]:
        """Run it; milliseconds of each part, by name."""
        clock = Clock(self.batch["input_ids"].device)
        clock.mark()
        for part in self.parts:
            part()
            clock.mark()
        return dict(zip(PARTS, clock.intervals(), strict=True))


class Clock:
    """Marks points in time, of the device's work on a GPU; `intervals` waits for it: milliseconds between them."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        if self.cuda:
            torch.cuda.synchronize()
            return [start.elapsed_time(end) for start, end in itertools.pairwise(self.marks)]
        return [(end - start) * 1e3 for start, end in itertools.pairwise(self.marks)]


def measure(step: Step, options: Options) -> dict[str, Any]:
    """Warm up, then time `options.steps` steps.

    Returns:
        `times`: milliseconds of every timed step, a list for each part; `back_to_back_ms`: a step's mean over as many
        without waiting in between; `cold_start_s`: the first step's seconds;
        `first_loss`, `last_loss`: means over the ranks; `peak_gib`: the most memory any rank held in the timed steps,
        `peak_gib_with_warmup`: in all of them (0 without a GPU).
    """
    cuda = options.device == "cuda"
    _reset_peak(cuda)
    start = time.perf_counter()
    step.timed()
    first_loss = step.loss()  # synchronises
    cold_start = time.perf_counter() - start
    for _ in range(options.warmup - 1):
        step.timed()
    warmup_peak = _peak(cuda)
    _reset_peak(cuda)
    times = [step.timed() for _ in range(options.steps)]
    back_to_back = _back_to_back(step, options.steps)
    peak = _peak(cuda)
    if step.contender.graphed is not None:
        peak = max(peak, warmup_peak)  # a replay's memory is not counted as allocated
    return {
        "times": {part: [timed[part] for timed in times] for part in PARTS},
        "back_to_back_ms": back_to_back,
        "cold_start_s": cold_start,
        "first_loss": first_loss,
        "last_loss": step.loss(),
        "peak_gib": peak,
        "peak_gib_with_warmup": max(peak, warmup_peak),
    }


def _back_to_back(step: Step, steps: int) -> float:
    clock = Clock(step.batch["input_ids"].device)
    clock.mark()
    for _ in range(steps):
        for part in step.parts:
            part()
    clock.mark()
    return clock.intervals()[0] / steps


def routing_imbalance(step: Step) -> dict[str, float] | None:
    """How unevenly the router loads the experts, max / mean tokens per expert: `mean` and `worst` over the layers.

    From one untimed, uncompiled forward of the batch; None where the contender has no experts to look at.
    """
    contender = step.contender
    if not contender.experts or contender.num_experts is None:
        return None
    counts: list[torch.Tensor] = []

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = args[1] if len(args) > 1 else kwargs["top_k_index"]
        counts.append(torch.bincount(index.flatten(), minlength=contender.num_experts or 0))

    hooks = [module.register_forward_pre_hook(count, with_kwargs=True) for module in contender.experts]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            contender.loss(step.batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not counts:
        return None
    load = torch.stack(counts).float()
    if dist.is_initialized():
        dist.all_reduce(load)
    ratios = load.amax(1) / load.mean(1)
    return {"mean": ratios.mean().item(), "worst": ratios.max().item()}


def _reset_peak(cuda: bool) -> None:
    if cuda:
        torch.cuda.reset_peak_memory_stats()


def _peak(cuda: bool) -> float:
    if not cuda:
        return 0.0
    peak = torch.tensor(torch.cuda.max_memory_allocated() / GIB, device="cuda")
    if dist.is_initialized():
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return peak.item()
