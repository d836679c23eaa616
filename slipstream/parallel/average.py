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

    Ranks may reach different parameters, if each reaches one: where a rank reached none it adds zeros, and where none
    did there is no gradient, as on one rank."""

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
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in (reference() for reference in self._added):
            if parameter is not None and parameter.requires_grad:
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for parameters in by_dtype.values():
            reached = [parameter.grad is not None for parameter in parameters]
            grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
            # Where this rank reached all, the host neither sends anything to the device nor waits for it.
            flags = grads[0].new_ones(len(grads)) if all(reached) else grads[0].new_tensor(reached)
            flat = torch.cat([*(grad.flatten() for grad in grads), flags])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            *parts, ranks = flat.split([*(grad.numel() for grad in grads), len(grads)])
            torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])
            anywhere = reached if all(reached) else ranks.tolist()
            for parameter, grad, somewhere in zip(parameters, grads, anywhere, strict=True):
                parameter.grad = grad if somewhere else None
