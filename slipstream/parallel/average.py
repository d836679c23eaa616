"""Gradients of what neither FSDP2 nor the exchange of tokens looks after."""

import functools
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slipstream import hf


class AverageGradients:
    """Makes the gradients of parameters their mean over the ranks at the end of backward, all together: one by one they
    are two launches each. Of what was averaged before, the mean is that again, so gradients may accumulate.

    Ranks may reach different parameters, if each reaches one: a rank adds zeros where it reached none."""

    def __init__(self) -> None:
        self._added: list[weakref.ref[nn.Parameter]] = []  # weak, because garbage collection sees no hooks on tensors
        self._running: set[int] = set()  # backwards, which may be inside one another

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # copies of parameters have no hooks

    def add(self, parameter: nn.Parameter) -> None:
        """From now on also those of `parameter`, once it trains; all ranks add the same, in the same order."""
        trains = parameter.requires_grad
        parameter.requires_grad_(True)  # or it takes no hook
        parameter.register_post_accumulate_grad_hook(self._reach)
        parameter.requires_grad_(trains)
        hf.mark_averaged(parameter)
        self._added.append(weakref.ref(parameter))

    def _reach(self, parameter: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        if backward not in self._running:
            self._running.add(backward)
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(functools.partial(self._finish, backward))

    def _finish(self, backward: int) -> None:
        self._running.remove(backward)
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in (reference() for reference in self._added):
            if parameter is None or not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for grads in by_dtype.values():
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            parts = flat.split([grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])
