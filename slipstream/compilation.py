"""torch.compile, one decoder layer at a time.

What lies between a layer's GEMMs, attention and experts (norms, rotary embedding, residual adds, the router) is many
small kernels, each launched by the host and each moving its input and output through memory; compiling the layer fuses
them. Attention and experts stay operators of their own. Layers of a kind share one graph, and the number of tokens is
dynamic in it, so that neither another layer, nor another step, nor a short last batch compiles anything anew.
"""

import functools
import os
import shutil
import sys
import time
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.modeling_layers import GradientCheckpointingLayer

from slipstream import hf_models

# Graphs per layer class: its kinds (dense, MoE, sliding window, …), in training and evaluation, for one row and more.
_GRAPHS = 64
_BACKEND, _GPU_ONLY = "_slipstream_compile_backend", "_slipstream_compile_on_gpu_only"


def why_not_compiled(model: nn.Module) -> str | None:
    """The reason why compiling the layers of `model` would not pay or work, or None."""
    if not decoder_layers(model):
        return f"{type(model).__name__} has no decoder layers that Transformers marks as such"
    if not torch.cuda.is_available():
        return "not on a GPU: here compiling costs more than it saves"
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))):
        return "Triton needs a C compiler to start its kernels, and none was found: install gcc"
    return None


def compile_layers(
    model: nn.Module, backend: str | Callable[..., Any] = "inductor", gpu_only: bool = False
) -> list[str]:
    """Compile the decoder layers of `model` on their first use, in place; returns the names of their classes.

    Args:
        gpu_only: run them as they are while their inputs are on a CPU, where many models lie until they train.
    """
    layers = decoder_layers(model)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    for layer in layers:
        # Bound to a module-level function named forward, as in loss.py: survives deepcopy and pickle.
        layer.forward = MethodType(forward, layer)
        layer.__dict__[_BACKEND], layer.__dict__[_GPU_ONLY] = backend, gpu_only
    hf_models.record_outside(model, layers)
    return sorted({type(layer).__name__ for layer in layers})


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The layer's own forward, compiled where no cache of keys and values makes every call another one."""
    own = type(self).forward
    if kwargs.get("past_key_values") is not None or torch.compiler.is_compiling():
        return own(self, *args, **kwargs)
    if self.__dict__[_GPU_ONLY] and not any(map(_on_gpu, (*args, *kwargs.values()))):
        return own(self, *args, **kwargs)
    return _compiled(own, self.__dict__[_BACKEND])(self, *_alike(self, args), **kwargs)


def _on_gpu(given: Any) -> bool:
    return isinstance(given, torch.Tensor) and given.is_cuda


def _alike(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """FSDP2 makes a view of what enters a unit, and guards tell views from other tensors: make one for every layer, or
    the first of a unit has a graph of its own."""
    if isinstance(layer, FSDPModule) and args and isinstance(args[0], torch.Tensor) and args[0]._base is None:
        return args[0].view_as(args[0]), *args[1:]
    return args


@functools.cache
def _compiled(own: Callable[..., Any], backend: str | Callable[..., Any]) -> Callable[..., Any]:
    graph = torch.compile(own, dynamic=True, backend=backend)
    config: Any = torch._dynamo.config
    seconds: list[float] = []

    def compiled(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # `dynamic` would also make a tensor of every float of the config, on the host, at every call.
        before, config.specialize_float = config.specialize_float, True
        try:
            return graph(self, *args, **kwargs)
        finally:
            config.specialize_float = before

    def announcing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if seconds:
            return compiled(self, *args, **kwargs)
        started = time.perf_counter()
        out = compiled(self, *args, **kwargs)
        seconds.append(time.perf_counter() - started)
        if int(os.environ.get("RANK", 0)) == 0:
            name = type(self).__name__.removeprefix("FSDP")
            print(f"slipstream: compiled {name} in {seconds[0]:.0f} s (cached on disk)", file=sys.stderr)
        return out

    return announcing


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that Transformers marks as such, those inside another left out."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inner = {id(below) for layer in layers for below in layer.modules() if below is not layer}
    return [layer for layer in layers if id(layer) not in inner]
