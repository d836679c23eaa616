"""Which activation an experts module has, found by what it computes.

A module's own function is evaluated on a few thousand numbers and compared with the family of formulas that have a
fused kernel (`kernels.expert_activation.Activation`). What matches none is used as it is, with autograd for backward.
"""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from slipstream.kernels.expert_activation import FUNCTIONS, Activation

Function = Callable[[torch.Tensor], torch.Tensor]

# By name, because an operator's arguments are tensors, numbers and strings. The names are the same for all layers of a
# kind, so that they share a compiled graph.
_FUNCTIONS: dict[str, Function] = {}
_NAME = "_slipstream_activation"
_LIMITS = ("limit", "swiglu_limit")
_ALPHAS = ("alpha", "swiglu_alpha")


def function_named(name: str) -> Function:
    """The activation `[R, N] -> [R, I]` of that name; an `Activation` where it has a fused kernel."""
    return _FUNCTIONS[name]


def register(name: str, function: Function) -> str:
    """Make `function` known by `name`, unless something is already; returns `name`."""
    _FUNCTIONS.setdefault(name, function)
    return name


def activation_name(experts: Any) -> str | None:
    """The name of the activation of `experts`, or None where it has trainable parameters. Found once per module."""
    name = experts.__dict__.get(_NAME, "")
    if name is None or name in _FUNCTIONS:
        return name
    name = None if _is_trainable(experts) else _find(experts)
    experts.__dict__[_NAME] = name
    return name


def own_function(experts: Any) -> Function:
    """The activation of `experts` as the module itself computes it."""
    return experts._apply_gate if experts.has_gate else experts.act_fn


def _is_trainable(experts: Any) -> bool:
    activation = getattr(experts, "act_fn", None)
    return isinstance(activation, nn.Module) and any(True for _ in activation.parameters())


def _find(experts: Any) -> str:
    own = own_function(experts)
    # Numbers of all sizes, positive and negative, on both sides of what the module clamps at, in an order that pairs
    # them differently as gate and up; made on the CPU also where a default device is set.
    steps = torch.arange(4096, dtype=torch.float64, device="cpu")
    wave_RN = (torch.sin(steps * 1.7) ** 3 * torch.cos(steps * 0.013)).view(64, 64)
    limits = [limit for limit in _numbers(experts, _LIMITS) if math.isfinite(limit)]
    probe_RN = torch.cat([size * wave_RN for size in (12, *(2 * limit for limit in limits))])
    expected = own(probe_RN)
    for candidate in _candidates(experts):
        if torch.allclose(candidate(probe_RN), expected, rtol=1e-6, atol=1e-6):
            return register(str(candidate), candidate)
    # A stand-in without weights, so that a name never keeps a model alive.
    stand_in = copy.copy(experts)
    stand_in._parameters = {}
    numbers = {key: value for key, value in vars(experts).items() if isinstance(value, int | float | str)}
    # In one line: Inductor writes an operator's arguments into comments of its code.
    act_fn = " ".join(str(getattr(experts, "act_fn", None)).split())
    name = f"{type(experts).__module__}.{type(experts).__qualname__} {act_fn} {sorted(numbers.items())}"
    return register(name, own_function(stand_in))


def _numbers(experts: Any, names: tuple[str, ...]) -> list[float]:
    return [float(vars(experts)[name]) for name in names if vars(experts).get(name) is not None]


def _candidates(experts: Any) -> list[Activation]:
    limits, alphas = [math.inf, *_numbers(experts, _LIMITS)], [1.0, *_numbers(experts, _ALPHAS)]
    gated = experts.has_gate
    offsets = (0.0, 1.0) if gated else (0.0,)
    return [
        Activation(function, gated, gated and not experts.is_concatenated, alpha, limit, offset)
        for function, alpha, limit, offset in itertools.product(FUNCTIONS, alphas, limits, offsets)
        if alpha == 1 or function == "silu"
    ]
