"""A training step's forward and backward as one CUDA graph: the host launches it whole, in under a millisecond.

Eagerly a step is some 150 launches a layer, which take the host 2 to 5 ms, its GPU idle where it has less to do than
that: short rows, LoRA, slow hosts, many GPUs. A graph (Gray 2019, "Getting Started with CUDA Graphs") replays kernels
on the addresses that they had when it was captured, FSDP2's collectives and the experts' exchange among them.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from slipstream.parallel.setup import host_group, rank_and_ranks

Batch = Mapping[str, Any]
# What a rank proposes to do with a batch; see `_agreed`.
_EAGER, _ASSIGN, _ACCUMULATE = range(3)
_PATIENCE = 10  # batches, before we say that nothing can be captured for lack of a forward without gradients
# Beside what experts' layers keep for backward, one layer's tensors in between, in such pre-activations.
_IN_BETWEEN = 6


class _Captured(NamedTuple):
    graph: Any
    loss: Tensor


class GraphedStep:
    """Runs forward and backward of batches, as a CUDA graph once batches of one shape have come `warmup` times.

    Afterwards batches of that shape are replayed; others run eagerly, and so does everything where it cannot be
    captured, for which `reason` says why. Gradients are in `.grad` as after `loss.backward()`, and add up over several
    calls; set them to None before the first (`zero_grad()` does), or nothing is captured.

    A replay runs no Python: hooks, counters and prints in the model ran for the last time when it was captured. The
    memory of its activations stays reserved in between, and cannot be used by anything else.

    With several ranks call it on all of them at once; they replay only where all do. Let go of it before
    `destroy_process_group()`: NCCL does not end while a graph holds its collectives.

    Example:
        step = GraphedStep(model)
        for batch in batches:
            loss = step(batch)
            optimizer.step()
            optimizer.zero_grad()

    Attributes:
        reason: why nothing is captured, or None.
        peak_bytes: the most memory in use while a step was captured, which counters do not see in a replay.
    """

    def __init__(
        self, model: nn.Module, forward_backward: Callable[[dict[str, Any]], Tensor] | None = None, *, warmup: int = 3
    ) -> None:
        """Collective where a process group exists.

        Args:
            model: whose parameters get the gradients.
            forward_backward: a batch -> its loss (scalar), with backward done; of `model(**batch).loss` if left out.
            warmup: eager steps before a shape is captured, at least 2: the first compiles, the last is watched.
        """
        if warmup < 2:
            raise ValueError(f"warmup={warmup}: give 2 or more; the first step compiles, the last is watched")
        self.reason: str | None = None
        self.warmup = warmup
        self.peak_bytes = 0
        self._run = forward_backward or _of_model(model)
        self._model = model
        cuda = torch.cuda.is_available()
        self._stream = torch.cuda.Stream() if cuda else None
        self._group = host_group() if rank_and_ranks()[1] > 1 else None
        self._seen: Counter[Hashable] = Counter()
        self._key: Hashable = None
        self._inputs: dict[str, Tensor] = {}
        self._captured: dict[int, _Captured] = {}
        self._grads: list[tuple[nn.Parameter, Tensor]] = []
        self._without: list[nn.Parameter] = []
        self._room, self._most_bytes = 0.0, 0
        if not cuda:
            self._give_up("there is no GPU")
        elif any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            self._give_up("DistributedDataParallel reduces gradients from hooks; use FSDP2")

    @property
    def captured(self) -> bool:
        """Whether there is a graph."""
        return bool(self._captured)

    def __call__(self, batch: Batch, constants: Sequence[Hashable] = ()) -> Tensor:
        """Forward and backward of `batch`; its loss, detached.

        Args:
            batch: what the model takes, by name. Tensors on the GPU may change from call to call; all else belongs to
                the shape.
            constants: whatever else `forward_backward` computes with that may change.

        Raises:
            RuntimeError: capturing failed, after which the model cannot be used.
        """
        key = _shape(batch, constants)
        action = self._agreed(self._proposed(key))
        if action == _EAGER:
            return self._eagerly(batch, key)
        if action not in self._captured:
            self._capture(action, batch, key)
        captured = self._captured[action]
        for name, static in self._inputs.items():
            static.copy_(batch[name], non_blocking=True)
        captured.graph.replay()
        if action == _ASSIGN:
            for parameter, grad in self._grads:
                parameter.grad = grad
        return captured.loss.clone()

    def _proposed(self, key: Hashable) -> int:
        if self.reason is not None or key is None:
            return _EAGER
        if self._key is None:
            warm = self._seen[key] >= self.warmup
            return _ASSIGN if warm and all(p.grad is None for p in self._model.parameters()) else _EAGER
        if key != self._key or any(parameter.grad is not None for parameter in self._without):
            return _EAGER
        if all(parameter.grad is None for parameter, _ in self._grads):
            return _ASSIGN
        return _ACCUMULATE if all(parameter.grad is grad for parameter, grad in self._grads) else _EAGER

    def _agreed(self, proposed: int) -> int:
        """What all ranks propose, or _EAGER: a replay takes part in exchanges that an eager step agrees on first."""
        if self._group is None:
            return proposed
        bounds = torch.tensor([proposed, -proposed], device="cpu")
        dist.all_reduce(bounds, dist.ReduceOp.MIN, group=self._group)
        return proposed if bounds[0] == -bounds[1] else _EAGER

    def _eagerly(self, batch: Batch, key: Hashable) -> Tensor:
        if self.reason is not None or key is None:
            return self._run(dict(batch)).detach()
        if self._key is None:  # and stays 0 afterwards
            self._seen[key] += 1
        if all(parameter.grad is None for parameter, _ in self._grads):
            # The graph's own gradients take these too, or there would be memory for both.
            for parameter, grad in self._grads:
                parameter.grad = grad.zero_()
        with self._on_stream():
            if self._seen[key] == self.warmup:
                self._room = self._spare_bytes()
                with _reads_of_random_state() as reads:
                    loss, places = watch(lambda: self._run_static(dict(batch)))
                if places:
                    self._give_up(f"the host waits for the device at {', '.join(places)}")
                elif reads:
                    self._give_up("activation checkpointing keeps the random generator's state, which has to be read")
            else:
                loss = self._run(dict(batch))
                self._most_bytes = max(self._most_bytes, torch.cuda.max_memory_allocated() if self._stream else 0)
        if self._seen[key] == self.warmup + _PATIENCE:
            self._give_up("gradients are there before every forward: set them to None after the optimizer's step")
        return loss.detach()

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """On the stream of the capture: gradients are accumulated on the one where their parameter was first used."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def _run_static(self, batch: dict[str, Any]) -> Tensor:
        """A run for whose sizes the host does not wait, as far as there is room for the worst case."""
        from slipstream.moe.dispatch.nvlink_experts import room_for_worst_cases

        with room_for_worst_cases(self._room):
            return self._run(batch)

    def _spare_bytes(self) -> float:
        """What each layer with experts may take of half the memory that eager steps have left free."""
        from slipstream.hf import is_experts  # a rival's environment may have an older Transformers

        if self._stream is None:
            return 0.0
        free, _ = torch.cuda.mem_get_info()
        spare = free + torch.cuda.memory_reserved() - self._most_bytes
        layers = sum(map(is_experts, self._model.modules()))
        return max(0.0, spare / 2 / (layers + _IN_BETWEEN))

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        if rank_and_ranks()[0] == 0:
            warnings.warn(f"slipstream: steps run without CUDA graphs: {reason}", stacklevel=3)

    def _capture(self, action: int, batch: Batch, key: Hashable) -> None:
        if not self._inputs:
            self._inputs = {name: value.clone() for name, value in batch.items() if isinstance(value, Tensor)}
        pool = next(iter(self._captured.values())).graph.pool() if self._captured else None
        self._captured[action] = self._recorded({**batch, **self._inputs}, pool)
        if action == _ASSIGN:
            self._key = key
            self._seen.clear()
            found = [(parameter, parameter.grad) for parameter in self._model.parameters()]
            self._grads = [(parameter, grad) for parameter, grad in found if grad is not None]
            self._without = [parameter for parameter, grad in found if grad is None and parameter.requires_grad]

    def _recorded(self, batch: dict[str, Any], pool: Any) -> _Captured:
        """Capture a run of `batch`, whose tensors a replay reads; nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as NCCL's watchdog, may do meanwhile what a capture forbids.
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                loss = self._run_static(batch).detach()
        except Exception as error:
            from slipstream.compilation import first_line  # a rival's environment may have an older Transformers

            cause = first_line(error.__context__ or error)  # ending the capture fails as well
            raise RuntimeError(
                f"forward and backward could not be captured as a CUDA graph ({cause}); run without: "
                "train.cuda_graphs: false in a recipe"
            ) from error
        self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated())
        return _Captured(graph, loss)


def watch(run: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """What `run` returns; and where it made the host wait for the GPU, as FILE:LINE from the package on, how often."""
    if not torch.cuda.is_available():
        return run(), Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places: Counter[str] = Counter()
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            places[re.sub(r"^.*/(?:site|dist)-packages/", "", f"{warning.filename}:{warning.lineno}")] += 1
        elif "Synchronization debug mode" not in str(warning.message):  # told when it is turned on
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return result, places


@contextmanager
def _reads_of_random_state() -> Iterator[list[None]]:
    """Grows by one with each read of a GPU's random generator, which PyTorch forbids while it captures."""
    reads: list[None] = []
    cuda: Any = torch.cuda
    read = cuda.get_rng_state

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        reads.append(None)
        state: Tensor = read(*args, **kwargs)
        return state

    cuda.get_rng_state = noted
    try:
        yield reads
    finally:
        cuda.get_rng_state = read


def _of_model(model: nn.Module) -> Callable[[dict[str, Any]], Tensor]:
    def forward_backward(batch: dict[str, Any]) -> Tensor:
        loss: Tensor = model(**batch).loss
        loss.backward()
        return loss

    return forward_backward


def _shape(batch: Batch, constants: Sequence[Hashable]) -> Hashable:
    """What a graph is captured for; None where it could not be: values on the CPU would be those of its capture."""
    facts: list[Hashable] = [*constants]
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            facts.append((name, value))
        elif value.device.type == "cpu" and torch.cuda.is_available():
            return None
        else:
            facts.append((name, value.shape, value.stride(), value.dtype))
    key = tuple(facts)
    try:
        hash(key)
    except TypeError:  # a list, say
        return None
    return key
