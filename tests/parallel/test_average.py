"""Gradients that become their mean over the ranks at the end of backward."""

import copy
import gc
import pickle
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from slipstream.parallel.average import AverageGradients
from tests.distributed.harness import run_ranks


def _gradients() -> list[Any]:
    """Those of parameters that both ranks reach, that one of them reaches, that none does, and that does not train."""
    rank = dist.get_rank()
    both, first, none, frozen = (nn.Parameter(torch.ones(width)) for width in (3, 5, 2, 4))
    frozen.requires_grad_(False)
    average = AverageGradients()
    for parameter in (both, first, none, frozen):
        average.add(parameter)
    for _ in range(2):  # accumulated
        (both.sum() * (rank + 1) + (first.sum() * 10 if rank == 0 else 0)).backward()
    return [None if parameter.grad is None else parameter.grad.tolist() for parameter in (both, first, none, frozen)]


def test_ranks_that_reach_different_parameters() -> None:
    for found in run_ranks(_gradients, 2):
        assert found == [[3.0] * 3, [10.0] * 5, None, None]


def _without_asking_the_device() -> list[Any]:
    def asked(*args: Any) -> Any:
        raise AssertionError("the host waits for a GPU here")

    parameters = [nn.Parameter(torch.ones(width)) for width in (3, 5)]
    average = AverageGradients()
    for parameter in parameters:
        average.add(parameter)
    torch.Tensor.tolist = torch.Tensor.new_tensor = torch.Tensor.item = asked
    sum(parameter.sum() * (dist.get_rank() + 1) for parameter in parameters).backward()
    return [parameter.grad for parameter in parameters]


def test_where_all_are_reached_the_host_does_not_wait() -> None:
    for found in run_ranks(_without_asking_the_device, 2):
        assert all((grad == 1.5).all() for grad in found)


def test_it_keeps_no_parameter_alive_and_can_be_copied() -> None:
    average, parameter = AverageGradients(), nn.Parameter(torch.ones(3))
    average.add(parameter)
    for other in (copy.deepcopy(average), pickle.loads(pickle.dumps(average))):
        assert isinstance(other, AverageGradients)
    alive = weakref.ref(parameter)
    del average, parameter
    gc.collect()
    assert alive() is None
