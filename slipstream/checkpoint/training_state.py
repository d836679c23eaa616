"""What of a model, an optimizer and a scheduler a checkpoint holds, by parameter names, and how it is put back.

Plain tensors and DTensors stand for themselves: `torch.distributed.checkpoint` stores and reads them in any layout.
"""

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map_only

from slipstream import shared_adapters
from slipstream.parallel.blocks import by_block

State = dict[str, Any]


@dataclass(frozen=True)
class Leaf:
    """Any object as one entry of a checkpoint; DCP would take a dict or list apart."""

    value: Any


def training_state(model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None) -> State:
    """A copy in host memory of everything that trains, which training may go on beside."""
    fresh = not optimizer.state
    optimizer_state: State = get_optimizer_state_dict(model, optimizer)
    if fresh:  # which get_optimizer_state_dict has filled, as if a step had been made
        optimizer.state.clear()
    state: State = {
        "model": model_state(model),
        "optimizer": {
            "state": {} if fresh else in_any_layout(model, optimizer_state["state"]),
            "param_groups": Leaf(copy.deepcopy(optimizer_state["param_groups"])),
        },
    }
    if scheduler is not None:
        state["scheduler"] = Leaf(copy.deepcopy(scheduler.state_dict()))
    # DCP's own stagers fail on DTensors whose local part does not begin where its storage does. From a GPU,
    # non_blocking copies into pinned memory, which torch keeps for the next checkpoint.
    copied: State = tree_map_only(
        torch.Tensor, lambda tensor: tensor.detach().to("cpu", non_blocking=True, copy=True), state
    )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copied


def model_state(model: nn.Module) -> State:
    """What trains and the persistent buffers, tied weights once."""
    seen: set[int] = set()
    left_out = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad or id(parameter) in seen:
            left_out.add(name)
        seen.add(id(parameter))
    state = {name: tensor for name, tensor in get_model_state_dict(model).items() if name not in left_out}
    return in_any_layout(model, state)


def in_any_layout(model: nn.Module, state: Mapping[str, Any]) -> State:
    """`state`, by parameters' names, with `[A, r, E]` for experts' factors `[A, r * E]`: DCP knows a rank's part of a
    tensor as one block of it. The memory is the same."""
    state = dict(state)
    for name, blocks in shared_adapters.blocks(model).items():
        shape = model.get_parameter(name).shape

        def split(tensor: torch.Tensor, shape: torch.Size = shape, blocks: int = blocks) -> torch.Tensor:
            return by_block(tensor, blocks) if tensor.shape == shape else tensor

        if name in state:
            state[name] = tree_map_only(torch.Tensor, split, state[name])
    return state


def optimizer_template(model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any]) -> tuple[State, list[State]]:
    """Tensors to read a fresh optimizer's state into, those that `saved` has, and the optimizer's groups by names.

    A parameter that had no gradient yet has no state; it gets one when it does.
    """
    state: State = get_optimizer_state_dict(model, optimizer)
    known = {
        name: entries
        for name, entries in state["state"].items()
        if any(f"optimizer.state.{name}.{entry}" in saved for entry in entries)
    }
    return known, state["param_groups"]


def put_back(state: State, groups: list[State], optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
    """Give loaded state to an optimizer whose parameters are in `groups`, by name, and to its scheduler.

    Layouts group parameters differently: Trainer keeps those of different meshes apart.
    """
    saved_groups = state["optimizer"]["param_groups"].value
    home = {name: number for number, group in enumerate(saved_groups) for name in group["params"]}
    # A group without parameters, which Trainer makes too, has no other than its place.
    came_from = [
        home[group["params"][0]] if group["params"] else min(number, len(saved_groups) - 1)
        for number, group in enumerate(groups)
    ]
    numbers = {name: number for number, name in enumerate(name for group in groups for name in group["params"])}
    optimizer.load_state_dict(
        {
            "state": {numbers[name]: entries for name, entries in state["optimizer"].get("state", {}).items()},
            "param_groups": [
                {**saved_groups[number], "params": [numbers[name] for name in group["params"]]}
                for group, number in zip(groups, came_from, strict=True)
            ],
        }
    )
    if scheduler is None:
        return
    values = state["scheduler"].value
    if came_from != [*range(len(saved_groups))]:
        for name, value in values.items():
            if isinstance(value, list) and len(value) == len(saved_groups):  # one entry a group
                values[name] = [value[number] for number in came_from]
    scheduler.load_state_dict(values)


def compare(path: Path, ours: Mapping[str, Any], saved: Mapping[str, Any], prefix: str) -> None:
    """Raise ValueError when the entries of a checkpoint below `prefix`, or their shapes, are not ours."""
    planner = DefaultLoadPlanner()
    planner.set_up_planner(dict(ours), None, False)  # type: ignore[arg-type]
    # The planner flattens names as they are stored.
    ours = {prefix + name: value for name, value in planner.state_dict.items()}
    theirs = {name for name in saved if name.startswith(prefix)}
    shapes = [
        f"{name} is {[*saved[name].size]} there and {[*value.size()]} here"
        for name, value in ours.items()
        if isinstance(value, torch.Tensor) and name in saved and [*getattr(saved[name], "size", ())] != [*value.size()]
    ]
    lacks, more = sorted(ours.keys() - theirs), sorted(theirs - ours.keys())
    for what, names in (("lacks", lacks), ("also has", more), ("differs:", shapes)):
        if names:
            listed = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            raise ValueError(
                f"{path} is of another model or optimizer: it {what} {listed}; "
                "continue it with the recipe that it was made with, or start anew"
            )


def rng_state() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_rng_state(state: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
