"""PEFT's LoRA on the linear layers of accelerated models, in the dtype that these compute in.

PEFT keeps adapters in fp32 and gives their factors the input in that dtype, beside layers that compute in bf16 as well:
on a GPU the slowest GEMMs of a step. Here a factor is rounded for the time of its product, as mixed precision does.
All else stays PEFT's own.

What is here of PEFT beyond its public interface is checked against 0.21.2.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_OURS = "_slipstream_linear"  # on the linear layers of accelerated models
_16_BITS = (torch.bfloat16, torch.float16)


class AdapterLinear(nn.Linear):
    """One factor of an adapter. Computes in the dtype of its input; the gradients are in that of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


def mark(model: nn.Module) -> None:
    """Let adapters of the linear layers that `model` has now compute as these do, once `patch` has run."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            setattr(module, _OURS, True)


def patch() -> None:
    """Let PEFT make such adapters."""
    from peft.tuners.lora.layer import Linear

    layer: Any = Linear
    layer.update_layer = _update_layer(layer.update_layer)
    layer._cast_input_dtype = _cast_input_dtype(layer._cast_input_dtype)


def attach(layer: nn.Module) -> None:
    """Let the adapters of `layer`, if it is a linear one of PEFT around one of ours, take its input as it is."""
    from peft.tuners.lora.layer import Linear

    if not isinstance(layer, Linear) or not hasattr(layer.base_layer, _OURS):
        return
    for factors in (layer.lora_A, layer.lora_B):
        for name, linear in factors.items():
            # Who put a forward of its own there (tensor parallelism, offloading) has kept the class's.
            if type(linear) is nn.Linear and name not in layer.lora_variant and "forward" not in vars(linear):
                linear.__class__ = AdapterLinear


def _update_layer(original: Any) -> Any:
    @functools.wraps(original)
    def update_layer(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        attach(self)

    return update_layer


def _cast_input_dtype(original: Any) -> Any:
    @functools.wraps(original)
    def cast_input_dtype(self: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        """PEFT gives factors their input in their own dtype. Variants of LoRA (DoRA) count on it."""
        factors = (*self.lora_A.values(), *self.lora_B.values())
        if x.dtype in _16_BITS and not self.lora_variant and all(isinstance(one, AdapterLinear) for one in factors):
            return x
        cast: Tensor = original(self, x, dtype)
        return cast

    return cast_input_dtype
