"""Gradients of what neither FSDP2 nor the exchange of tokens looks after."""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slipstream import hf


class AverageGradients:
    """Makes the gradients of parameters their mean over the ranks at the end of backward, all together: one by one they
    are two launches each. Of what was averaged before, the mean is that again, so gradients may accumulate."""

    def __init__(self) -> None:
        self._added = 0
        self._reached: dict[int, dict[int, Tensor]] = {}  # a backward, which may be inside another -> by their number

    def add(self, parameter: nn.Parameter) -> None:
        """From now on also those of `parameter`, once it trains; all ranks add the same, in the same order."""
        trains = parameter.requires_grad
        parameter.requires_grad_(True)  # or it takes no hook
        parameter.register_post_accumulate_grad_hook(functools.partial(self._reach, self._added))
        parameter.requires_grad_(trains)
        hf.mark_averaged(parameter)
        self._added += 1

    def _reach(self, number: int, parameter: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        if backward not in self._reached:
            self._reached[backward] = {}
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(functools.partial(self._finish, backward))
        self._reached[backward][number] = parameter

    def _finish(self, backward: int) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for _, parameter in sorted(self._reached.pop(backward).items()):  # in one order on all ranks
            assert parameter.grad is not None
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for grads in by_dtype.values():
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            parts = flat.split([grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])
