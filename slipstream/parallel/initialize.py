"""Random weights of a sharded model: the same values as on one rank, without a whole model anywhere.

Transformers builds a model in steps that all draw random numbers: the constructors (PyTorch's defaults), and after each
of its model classes `_init_weights` of every module in it. Here all of that runs on the meta device first, where each
draw is made on a throw-away tensor so that the generator advances as it would have, and its state before each module is
noted. Then each module in turn is given whole parameters and that state, initialised, and cut to this rank's shards.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode

from slipstream import hf

_aten = torch.ops.aten
_DRAWS = {_aten.uniform_.default, _aten.normal_.default, _aten.exponential_.default, _aten.bernoulli_.float}
_RANDOM_TENSORS = {_aten.rand.default, _aten.randn.default, _aten.randint.low}


def build_sharded(build: Callable[[], Any], distribute: Callable[[Any], Any]) -> Any:
    """`distribute(build())` with the random weights that `build()` alone would have had.

    Args:
        build: makes a model; called on the meta device.
        distribute: splits its parameters, still on the meta device, into DTensors.

    The draws are made where torch makes tensors at the time of the call (`with torch.device("cuda"):`), from rank 0's
    generator state: all ranks have to agree, whatever seeds they were given.
    """
    device = torch.get_default_device()
    generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    state = [generator.get_state()]
    dist.broadcast_object_list(state, src=0)
    generator.set_state(state[0])
    with torch.device("meta"), _take_notes(generator) as notes, _Draw(device):
        model = build()
    after = generator.get_state()
    model = distribute(model)
    compute = torch.device(torch.accelerator.current_accelerator() or "cpu")
    with torch.no_grad():
        for note in notes.values():
            generator.set_state(note.state)
            _initialize(note, device, compute)
        for module in model.modules():
            if module not in notes:
                _initialize(_Note(None, module, after, []), device, compute)
    generator.set_state(after)
    model.tie_weights()
    return model


class _Note(NamedTuple):
    """How Transformers initialises a module: the model that does it, the generator's state before, and the parameters
    of modules below that it sets anew (Nemotron-H's mixer does so with its output projection)."""

    owner: Any
    module: nn.Module
    state: torch.Tensor
    below: list[tuple[nn.Module, str]]


class _Draw(TorchDispatchMode):
    """Advances the generator by every draw that is made on a meta tensor."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _DRAWS and args[0].is_meta:
            func(torch.empty(args[0].shape, dtype=args[0].dtype, device=self.device), *args[1:], **(kwargs or {}))
        elif func in _RANDOM_TENSORS:
            func(*args, **{**(kwargs or {}), "device": self.device})
        return func(*args, **(kwargs or {}))


@contextmanager
def _take_notes(generator: torch.Generator) -> Iterator[dict[nn.Module, _Note]]:
    """Collects a note on each module that Transformers initialises, in its order."""
    notes: dict[nn.Module, _Note] = {}

    def note(model: Any, module: nn.Module, initialize: Callable[[], None]) -> None:
        if module in notes:
            return
        state = generator.get_state()
        versions = {
            (sub, name): parameter._version
            for sub in module.modules()
            for name, parameter in sub._parameters.items()
            if sub is not module and parameter is not None
        }
        initialize()
        below = [(sub, name) for (sub, name), version in versions.items() if sub._parameters[name]._version != version]  # type: ignore[union-attr]
        notes[module] = _Note(model, module, state, below)

    with hf.observing_initialization(note):
        yield notes


def _initialize(note: _Note, device: torch.device, compute: torch.device) -> None:
    """Give a module's own parameters and buffers their first values, drawn on `device`, and keep this rank's part on
    `compute`."""
    module = note.module
    own = [(module, name) for name, parameter in module._parameters.items() if parameter is not None]
    before = {}
    for owner, name in (*own, *note.below):
        parameter: Any = owner._parameters[name]
        before[owner, name] = parameter
        if owner is module:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        else:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.data
        owner._parameters[name] = nn.Parameter(whole.to(device), requires_grad=False)
    for name, tensor in module._buffers.items():
        if tensor is not None:
            module._buffers[name] = torch.empty_like(tensor, device=device)
    if note.owner is not None:
        hf.initialize_module(note.owner, module)
    for (owner, name), parameter in before.items():
        whole = owner._parameters[name].data  # type: ignore[union-attr]
        mine = _own_shard(whole, parameter, compute) if isinstance(parameter, DTensor) else whole.to(compute)
        owner._parameters[name] = nn.Parameter(mine, requires_grad=parameter.requires_grad)
    for name, tensor in module._buffers.items():
        if tensor is not None:
            module._buffers[name] = tensor.to(compute)


def _own_shard(full: torch.Tensor, like: DTensor, device: torch.device) -> DTensor:
    """This rank's part of `full`, a copy on `device`, as a DTensor that lies as `like` does."""
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    part = full[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    part = part.to(device, copy=True).contiguous()
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
