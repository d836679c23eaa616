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
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch._functorch.config
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from slipstream import hf, hf_models
from slipstream.parallel.units import class_of

# Graphs per layer class: its kinds (dense, MoE, sliding window, …), in training and evaluation, for one row and more.
_GRAPHS = 64
_BACKEND, _GPU_ONLY = "_slipstream_compile_backend", "_slipstream_compile_on_gpu_only"
_FLOATS_DIFFER = "_slipstream_floats_differ"
_FEW = 3  # layers that differ in a number alone have a graph each, up to so many
_UNCOMPILED = "_slipstream_uncompiled"  # class -> reason, one dict for all layers of a model


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
    classes = {class_of(layer).__name__ for layer in layers}
    failed = {name: why for name, why in hf_models.NOT_COMPILED.items() if name in classes}
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    held = [_floats(layer) for layer in layers]
    alike: dict[Any, set[tuple[float, ...]]] = {}
    for layer, (places, floats) in zip(layers, held, strict=True):
        alike.setdefault((class_of(layer), places), set()).add(floats)
    for layer, (places, _) in zip(layers, held, strict=True):
        # Bound to a module-level function named forward, as in loss.py: survives deepcopy and pickle.
        layer.forward = MethodType(forward, layer)
        layer.__dict__[_BACKEND], layer.__dict__[_GPU_ONLY] = backend, gpu_only
        layer.__dict__[_UNCOMPILED] = failed
        layer.__dict__[_FLOATS_DIFFER] = len(alike[class_of(layer), places]) > _FEW
    hf_models.record_outside(model, layers)
    return sorted(classes)


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The layer's own forward, compiled where no cache of keys and values makes every call another one."""
    own = type(self).forward
    if kwargs.get("past_key_values") is not None or torch.compiler.is_compiling():
        return own(self, *args, **kwargs)
    if self.__dict__[_GPU_ONLY] and not any(map(_on_gpu, (*args, *kwargs.values()))):
        return own(self, *args, **kwargs)
    name = class_of(self).__name__
    if name in self.__dict__[_UNCOMPILED]:
        return own(self, *args, **kwargs)
    how = self.__dict__[_BACKEND], self.__dict__[_FLOATS_DIFFER]
    if _recomputes_outside(self):
        kwargs.pop("use_cache", None)
        graph = _compiled(hf.without_checkpoint(self), *how)
        run = hf.recomputed(self, functools.partial(graph, self, **kwargs))
    else:
        run = functools.partial(_compiled(own, *how), self, **kwargs)
    try:
        return run(*_alike(self, args))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if isinstance(error.inner_exception, torch.OutOfMemoryError | TimeoutError):  # no fault of the graph's
            raise
        reason = first_line(error.inner_exception)
    except torch._dynamo.exc.TorchRuntimeError as error:  # while tracing, on tensors without values
        reason = first_line(error)
    # Outside of the handler, which would keep the failed call's tensors. An error of the model's comes again here.
    out = own(self, *args, **kwargs)
    self.__dict__[_UNCOMPILED][name] = reason
    if int(os.environ.get("RANK", 0)) == 0:
        warnings.warn(
            f"slipstream: torch.compile failed at {name}, whose layers now run uncompiled: the same results, with the "
            f"norms, rotary embeddings and residuals between their GEMMs slower. BackendConfig(compile='none') leaves "
            f"the attempt out. The reason: {reason}",
            stacklevel=2,
        )
    return out


def _recomputes_outside(layer: nn.Module) -> bool:
    """Whether `layer` is computed again in backward and its experts are split: their forward puts local tensors in the
    place of DTensors, which torch.compile does not allow inside of a checkpoint."""
    return hf.is_recomputed(layer) and any(isinstance(parameter, DTensor) for parameter in layer.parameters())


def uncompiled(model: nn.Module) -> dict[str, str]:
    """The classes of layers that `compile_layers` was to compile, but that torch.compile failed at, and why."""
    return {name: why for layer in decoder_layers(model) for name, why in layer.__dict__.get(_UNCOMPILED, {}).items()}


def first_line(error: BaseException) -> str:
    """The kind of an error and what its message begins with; where that names a generated file or a kind of failure
    alone, the next line says what is wrong."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    unsaid = "".join(lines[:1]).startswith("Failed to import") or "".join(lines[1:2]).startswith("Explanation:")
    told = " ".join(lines[: 2 if unsaid else 1])
    return f"{type(error).__name__}: {told}"[:300] if told else type(error).__name__


def _on_gpu(given: Any) -> bool:
    return isinstance(given, torch.Tensor) and given.is_cuda


def _alike(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """FSDP2 makes a view of what enters a unit, and guards tell views from other tensors: make one for every layer, or
    the first of a unit has a graph of its own."""
    if isinstance(layer, FSDPModule) and args and isinstance(args[0], torch.Tensor) and args[0]._base is None:
        return args[0].view_as(args[0]), *args[1:]
    return args


def _floats(layer: nn.Module) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Where `layer` and its modules hold numbers, and these: one that differs is another graph (DiffLlama's lambda)."""
    found = {
        f"{name}.{key}": value
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if type(value) is float
    }
    return tuple(found), tuple(found.values())


@functools.cache
def _compiled(own: Callable[..., Any], backend: str | Callable[..., Any], floats_differ: bool) -> Callable[..., Any]:
    graph = torch.compile(own, dynamic=True, backend=backend)
    config: Any = torch._dynamo.config
    aot: Any = torch._functorch.config
    seconds: list[float] = []

    def compiled(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # `dynamic` would also make a tensor of every float of the config, on the host, at every call.
        before, config.specialize_float = config.specialize_float, not floats_differ
        # Else a backward that does not compile is an error in the middle of backward.
        eagerly, aot.force_non_lazy_backward_lowering = aot.force_non_lazy_backward_lowering, True
        try:
            return graph(self, *args, **kwargs)
        finally:
            config.specialize_float, aot.force_non_lazy_backward_lowering = before, eagerly

    def announcing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if seconds:
            return compiled(self, *args, **kwargs)
        started = time.perf_counter()
        out = compiled(self, *args, **kwargs)
        seconds.append(time.perf_counter() - started)
        if int(os.environ.get("RANK", 0)) == 0:
            name = class_of(self).__name__
            print(f"slipstream: compiled {name} in {seconds[0]:.0f} s (cached on disk)", file=sys.stderr)
        return out

    return announcing


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that Transformers marks as such, those inside another left out."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inner = {id(below) for layer in layers for below in layer.modules() if below is not layer}
    return [layer for layer in layers if id(layer) not in inner]
