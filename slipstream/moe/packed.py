"""Frozen weights of experts in 4 bits: packed in a buffer beside the parameter, which keeps only its shape.

Every expert is packed for itself (`kernels/nf4.py`), so that a rank packs those that it holds.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from slipstream.kernels.nf4 import quantize_nf4
from slipstream.moe.grouped_mlp_4bit import Packed, dequantized

_STORED = "_slipstream_4bit"
_SUFFIX = "_nf4"


class Stored(NamedTuple):
    """What the bytes do not say: the weight's two inner dims as it lies in memory, and its dtype."""

    inner: tuple[int, int]
    dtype: torch.dtype


class Placeholder(torch.Tensor):
    """Shape, dtype and device of a packed weight, for PEFT and for reports; of all its experts where ranks share them.

    Moves with its module. Whatever would read or change values raises ValueError.

    Attributes:
        device_mesh: of the ranks that share the experts, or None.
    """

    device_mesh: Any

    @staticmethod
    def __new__(cls, nothing: Tensor, size: torch.Size, dtype: torch.dtype, mesh: Any = None) -> "Placeholder":
        made: Placeholder = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, size, dtype=dtype, device=nothing.device, requires_grad=False
        )
        return made

    def __init__(self, nothing: Tensor, size: torch.Size, dtype: torch.dtype, mesh: Any = None) -> None:
        # Makes it a wrapper that nn.Module.to can move: such are swapped, not written to.
        self.nothing, self.device_mesh = nothing, mesh

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["nothing"], (self.dtype, self.device_mesh)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], given: Any, size: torch.Size, stride: Any) -> "Placeholder":
        return cls(inner["nothing"], size, *given)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Placeholder({tuple(self.shape)}, {self.dtype}, in 4 bits on {self.device})"

    def requires_grad_(self, requires_grad: bool = True) -> "Placeholder":
        if requires_grad:
            raise ValueError(f"{self!r} cannot train: its weight is stored in 4 bits; train adapters, or load 16 bits")
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if isinstance(args[0], cls):
            own = args[0]
            moved = function is aten._to_copy.default and (kwargs.get("dtype") or own.dtype) == own.dtype
            if moved or function in (aten.detach.default, aten.alias.default, aten.clone.default):
                device = kwargs.get("device") or own.device
                return cls(own.nothing.to(device), own.shape, own.dtype, own.device_mesh)
        own = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        raise ValueError(
            f"{function}: {own!r} has no values, as its weight is stored in 4 bits; load the model in 16 bits for "
            "this, and merge adapters with `slipstream merge`"
        )


def pack(experts: nn.Module, name: str) -> Callable[[], None]:
    """Store the weight `name` of `experts`, `[E, ...]`, in 4 bits, in place. With expert parallelism, this rank's.

    Returns: what has to be called once the model is loaded: it puts the buffer there, whose values `from_pretrained`
        would forget, as of all that are in no checkpoint.
    """
    parameter: Any = experts._parameters[name]
    mesh, weight = None, parameter.data
    if isinstance(parameter, DTensor):
        mesh, weight = parameter.device_mesh, parameter.to_local()
    # On a GPU where there is one: on the host it would take minutes.
    fast = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else weight.device
    if weight.device.type == "meta":
        fast = weight.device
    bytes_EP = quantize_nf4(weight.to(fast)).to(weight.device)
    nothing = torch.empty(0, dtype=torch.uint8, device=weight.device)
    placeholder: Any = nn.Parameter(Placeholder(nothing, parameter.shape, weight.dtype, mesh), requires_grad=False)
    placeholder._is_hf_initialized = True  # or Transformers would draw values for it
    experts._parameters[name] = placeholder
    stored = getattr(experts, _STORED, {})
    setattr(experts, _STORED, stored | {name: Stored((weight.shape[1], weight.shape[2]), weight.dtype)})
    return partial(experts.register_buffer, name + _SUFFIX, bytes_EP, persistent=False)


def is_packed(experts: nn.Module, name: str | None = None) -> bool:
    """Whether the weight `name` of `experts`, or any, is stored in 4 bits."""
    return hasattr(experts, _STORED) and (name is None or name in getattr(experts, _STORED))


def packed(experts: nn.Module, name: str) -> tuple[Packed, torch.dtype]:
    """What `pack` stored as `name`, and the dtype that it had."""
    inner, dtype = getattr(experts, _STORED)[name]
    return Packed(getattr(experts, name + _SUFFIX), inner), dtype


def unpacked(experts: nn.Module, name: str) -> Tensor:
    """The values that `name` of `experts` has now, `[E, ...]` of this rank's experts in the weight's own layout."""
    weight, dtype = packed(experts, name)
    return dequantized(weight.bytes_EP, weight.inner, True, dtype)
